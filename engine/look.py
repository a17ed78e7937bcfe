"""What a run keeps for `python r1mini.py look`: one group at every second step of RL.

    after step 0   the model writes a group of answers to one question     {"answers", "before"}
    after step 1   the updated model reads the same answers                {"after"}
    after step 2   it writes new answers, ...

The lines go to look.jsonl. `before` and `after` hold -log p of each token, in hundredths. An answer
is a text, or a list of token ids if its text would be cut into other tokens.

The question is one of train and stays the same in the whole run. Nobody learns from this group: the
update is made from the step's own questions. The group has its own seed, the same at each step. So
training draws the numbers that it would draw anyway, and what differs between two groups is what
was learnt between them.
"""
import contextlib
import json
import random

import torch

import tasks
from engine.folder import LOOK
from engine.sampling import generate, pad_right
from grpo import logprobs


def look_problem(run):
    """The question of a run, of a middle level: an easy one would soon be right in all answers."""
    level = sorted(run.zero.levels)[len(run.zero.levels) // 2]
    return tasks.make_problem(random.Random("look"), level, "train", "en", run.corpus.products)


def answer_ids(answer):
    """The token ids of an answer in look.jsonl."""
    return tasks.encode_response(answer) if isinstance(answer, str) else answer


def _records(path):
    """The lines of look.jsonl in a run's folder. What cannot be read is left out."""
    for line in (path / LOOK).read_bytes().splitlines() if (path / LOOK).exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            yield (record["stage"], record["step"]), record


def read_look(path):
    """The groups of a run's folder, a list of dicts: stage, step (which made the update), question,
    answers, before and after (for each answer a list of hundredths). A group without its second
    line is left out."""
    groups, begun, first = [], None, {}
    for (stage, step), record in _records(path):
        if "answers" in record:
            begun, first = (stage, step + 1), record
        elif (stage, step) == begun:
            group = first | record
            for when in ("before", "after"):
                group[when] = [[int(x) for x in row.split()] for row in group[when]]
            groups.append(group)
    return groups


class Look:
    """Called after each step of a stage of RL, and before the first one, as look(model, step)."""

    def __init__(self, folder, stage, settings):
        self.folder, self.stage, self.settings = folder, stage, settings
        self.problem = look_problem(folder.run)
        self.prompt = tasks.encode_prompt(self.problem.question)
        self.seed = random.Random(f"{folder.run.seed}/look").getrandbits(60)

    def __call__(self, model, step):
        """Does what is due after a step."""
        if step % 2 == 0 and step < self.settings.steps:
            self.write_answers(model, step)
        elif step % 2 == 1:
            self.read_answers(model, step)

    def write_answers(self, model, step):
        """Logs new answers."""
        s, texts = self.settings, []
        answers = generate(model, [self.prompt] * s.group_size, s.max_new_tokens, tasks.END_ID,
                           tasks.PAD_ID, s.temperature, seed=self.seed).answers()
        for ids in answers:
            text = tasks.decode(ids)
            texts.append(text if tasks.encode_response(text) == ids else ids)
        self.folder.log({"stage": self.stage, "step": step, "question": self.problem.question,
                         "answers": texts, "before": self.surprise(model, answers)}, LOOK)

    def read_answers(self, model, step):
        """Logs what the model now thinks of the last answers. They are read from the file, so that
        a continued run knows them too."""
        point, record = None, {}
        for point, record in _records(self.folder.path):
            pass  # the last one counts
        if point == (self.stage, step - 1) and "answers" in record:
            answers = [answer_ids(answer) for answer in record["answers"]]
            self.folder.log({"stage": self.stage, "step": step,
                             "after": self.surprise(model, answers)}, LOOK)

    @torch.no_grad()
    def surprise(self, model, answers):
        """-log p of each token of some answers, in hundredths: one text of numbers an answer."""
        was_training = model.training
        model.eval()  # otherwise these tokens would count in the experts' load
        rows = [self.prompt + ids for ids in answers]
        tokens = pad_right(rows, tasks.PAD_ID, model.device)
        length = torch.tensor([len(row) for row in rows], device=model.device).unsqueeze(1)
        real = torch.arange(tokens.size(1), device=model.device) < length       # (G, T)
        answer = real.clone()
        answer[:, :len(self.prompt)] = False
        logp, _ = logprobs(model, tokens, answer, real, self.settings.temperature)
        model.train(was_training)
        logp = logp.nan_to_num(-99, neginf=-99)  # broken weights are not this file's to report
        return [" ".join(str(round(-100 * x)) for x in row[wanted].tolist())
                for row, wanted in zip(logp, answer)]
