"""What a run keeps for `python r1mini.py look`: one group at every second step of RL.

    after step 0   the model writes a group of answers to one question     {"answers", "before"}
    after step 1   the updated model reads the same answers                {"after"}
    after step 2   the model writes new answers, and so on

Each is one line of look.jsonl. `before` and `after` hold -log p of each token, in hundredths. An
answer is a text, or a list of token ids if its text would be cut into other tokens.

The question is a train question, and stays the same in the whole run. The model does not learn from
this group: the update is made from the step's own questions. The group has its own seed, the same
at each step. So training draws the same random numbers as without it, and a difference between two
groups comes from what was learnt between them.
"""
import json
import random

import torch

import tasks
from engine.folder import LOOK
from engine.sampling import generate, pad_right
from grpo import logprobs


def look_problem(run):
    """The question that a run watches. Its level is in the middle: to an easy question all answers
    would soon be right."""
    level = sorted(run.zero.levels)[len(run.zero.levels) // 2]
    return tasks.make_problem(random.Random("look"), level, "train", "en", run.corpus.products)


def answer_ids(answer):
    """The token ids of an answer in look.jsonl."""
    return tasks.encode_response(answer) if isinstance(answer, str) else answer


def _records(path):
    """Yields ((stage, step), record) for each line of look.jsonl in a run's folder. A line that
    cannot be read is left out."""
    if not (path / LOOK).exists():
        return
    for line in (path / LOOK).read_bytes().splitlines():
        try:
            record = json.loads(line)
            point = record["stage"], record["step"]
        except (ValueError, KeyError, TypeError):
            continue
        yield point, record


def read_look(path):
    """The groups of a run's folder, a list of dicts: stage; step, which is that of the update;
    question; answers; before and after, for each answer a list of -log p in hundredths. A group
    without its second line is left out."""
    groups, begun, first = [], None, {}  # begun: the stage and step of the line that is due
    for (stage, step), record in _records(path):
        if "answers" in record:
            begun, first = (stage, step + 1), record
        elif (stage, step) == begun and "after" in record:
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
        """After an even step writes new answers. After an odd step reads them again."""
        if step % 2 == 0 and step < self.settings.steps:
            self.write_answers(model, step)
        elif step % 2 == 1:
            self.read_answers(model, step)

    def write_answers(self, model, step):
        """Samples a group, and logs it with what the model thinks of it before the update."""
        s, texts = self.settings, []
        answers = generate(model, [self.prompt] * s.group_size, s.max_new_tokens, tasks.END_ID,
                           tasks.PAD_ID, s.temperature, seed=self.seed).answers()
        for ids in answers:
            text = tasks.decode(ids)
            texts.append(text if tasks.encode_response(text) == ids else ids)
        self.folder.log({"stage": self.stage, "step": step, "question": self.problem.question,
                         "answers": texts, "before": self.surprisals(model, answers)}, LOOK)

    def read_answers(self, model, step):
        """Logs what the updated model thinks of the last answers. They are read from the file, so
        that a continued run knows them too."""
        point, record = None, {}
        for point, record in _records(self.folder.path):
            pass  # only the last record is wanted
        if point == (self.stage, step - 1) and "answers" in record:
            answers = [answer_ids(answer) for answer in record["answers"]]
            self.folder.log({"stage": self.stage, "step": step,
                             "after": self.surprisals(model, answers)}, LOOK)

    @torch.no_grad()
    def surprisals(self, model, answers):
        """-log p of each token, in hundredths. One text for each answer, with a number for each
        token."""
        was_training = model.training
        model.eval()  # otherwise the routing bias would count these tokens
        rows = [self.prompt + ids for ids in answers]
        tokens = pad_right(rows, tasks.PAD_ID, model.device)
        length = torch.tensor([len(row) for row in rows], device=model.device).unsqueeze(1)
        real = torch.arange(tokens.size(1), device=model.device) < length       # (G, T)
        answer = real.clone()
        answer[:, :len(self.prompt)] = False
        logp, _ = logprobs(model, tokens, answer, real, self.settings.temperature)
        model.train(was_training)
        logp = logp.nan_to_num(-99, neginf=-99)  # if the weights are not finite, training says so
        return [" ".join(str(round(-100 * x)) for x in row[wanted].tolist())
                for row, wanted in zip(logp, answer)]
