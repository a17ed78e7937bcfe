"""Why does R1-Zero mix languages, and does mixing help it?

The paper: R1-Zero mixes English and Chinese in one chain of thought; its base has read mostly
these two languages (R1 v2 section A.1). A reward for keeping to one language costs a little
accuracy (R1 v2 section B.6). Two reasons are possible: mixing helps to think, or the reward
competes with that for right answers.

    python r1mini.py study mixing

In our corpus, checked solutions mix languages more often than short ones. In this study both
mix them equally often, so RL cannot raise mixing by choosing a style. Longer answers have more
words, and so more chances to mix. So compare answers of one style with each other. From one
base, Zero's RL goes on in three arms:

    free      as always
    masked    words of the other language cannot be written: the mask is in sampling and in the
              trainer. No reward says so
    reward    the language reward of Dev2

In all arms each rollout has questions of one language, in turn, so that one mask serves a whole
rollout. There is no KL penalty, since the reference policy has no mask.
"""
import dataclasses

import torch

import tasks
from engine.devices import copy_model
from engine.evaluate import prompts_of, repeat_for_answers, sample_answers
from grpo import train_rl
from r1mini import base, draw_problem, make_task, rule_rewards
from tools.compare import compare
from tools.study import start_folder, test_record
from tools.tables import cell, table

SEEDS = range(6)
SETTINGS = ("corpus.steps_mixed=0.4", "corpus.checked_mixed=0.4", "eval.longer=1",
            "data.prompts=8", "eval.samples=8", "zero.dev_every=6", "zero.beta=0")
STAGES = ("base",)
ARMS = dict.fromkeys(("free", "masked", "reward"), "")
DIFFERENCES = {f"mixing.{arm}.minus_free.pass@1": (f"{arm}.pass@1", "free.pass@1")
               for arm in ("masked", "reward")}
LANGUAGE_WEIGHT = 0.5  # of the language reward, as in Dev2


# ------------------------------------------------------------------------------
# The mask


def _letters(language):
    """The ids of all tokens with letters of a language. Chinese letters have bytes above 127."""
    is_letter = bytes.isalpha if language == "en" else (lambda byte: byte[0] > 127)
    return [i for token, i in tasks.RANKS.items()
            if any(is_letter(bytes([byte])) for byte in token)]


class Mask:
    """A hook on a model's head: it takes their chance from tokens of the other language.

    language: of the questions that are asked.
    """

    def __init__(self):
        self.language = None
        self.forbidden = {language: torch.tensor(_letters(tasks.other_language(language)))
                          for language in tasks.LANGUAGES}

    def __call__(self, head, inputs, logits):
        """The logits (.., V) with a mask. It is not -inf: times a probability of 0, as in the
        entropy, that would be nan."""
        return logits.index_fill(-1, self.forbidden[self.language].to(logits.device), -1e9)


# ------------------------------------------------------------------------------
# The arms


def _test(model, mask, problems, samples, run, seed):
    """The numbers of a model's answers. Questions of one language are asked at a time. mask: None
    or the model's."""
    texts, asked, lengths = [], [], []
    for language in tasks.LANGUAGES:
        if mask:
            mask.language = language
        some = repeat_for_answers([p for p in problems if p.language == language], samples)
        ids = sample_answers(model, prompts_of(some), run.zero.max_new_tokens, run.eval.rows,
                             seed=seed)
        texts += [tasks.decode(x) for x in ids]
        asked += some
        lengths += map(len, ids)
    checked = [i for i, text in enumerate(texts)
               if tasks.parse(text)[1] is not None and tasks.style_of(text) == "checked"]
    numbers = {"pass@1": sum(map(tasks.accuracy, texts, asked)) / len(texts),
               "length": sum(lengths) / len(texts)}
    for name in ("mixing", "language", "reflection"):
        numbers[name] = tasks.MEASURES[name](texts, asked)
    numbers["checked.mixing"] = tasks.MEASURES["mixing"]([texts[i] for i in checked],
                                                         [asked[i] for i in checked])
    return {key: value for key, value in numbers.items() if value == value}  # nan: no words


def measure_arm(arm, folder):
    """The numbers of an arm on test, and on dev every few rollouts; in free also the base's."""
    run, start = folder.run, start_folder(folder, arm, STAGES)
    model, mask = copy_model(base(start, {})), None
    if arm == "masked":
        mask = Mask()
        model.head.register_forward_hook(mask)
    s = run.zero
    if arm == "reward":
        s = dataclasses.replace(s, language_weight=LANGUAGE_WEIGHT)

    def draw(rng, n, step):
        language = tasks.LANGUAGES[step % 2]
        if mask:
            mask.language = language
        problems = []
        while len(problems) < n:
            problem = draw_problem(rng, run, s.levels)
            if problem.language == language:
                problems.append(problem)
        return problems

    task = dataclasses.replace(make_task(run, s, rule_rewards(s)), draw=draw)
    dev = tasks.make_problems("dev", run.eval.dev_problems, s.levels)
    numbers = {}
    for record, _ in train_rl(model, task, s, run.seed):
        if record["step"] % s.dev_every == 0:
            found = _test(model, mask, dev, run.eval.samples, run, seed=0)
            numbers |= {f"dev{record['step']}": found["pass@1"],
                        f"dev_mixing{record['step']}": found.get("mixing")}
            print(f"  rollout {record['step']}: dev {found['pass@1']:.3f}", flush=True)
    test = tasks.make_problems("test", run.eval.problems, s.levels)
    numbers |= _test(model, mask, test, run.eval.fewer_samples, run, seed=1)
    if arm == "free":
        tested = test_record(start.path, "base")
        numbers |= {"base.pass@1": tested["pass@1"], "base.mixing": tested["mixing"],
                    "base.checked.mixing": tested["mixing_by_style"]["checked"]}
    return numbers


def combine(numbers):
    """The base and Zero with languages free, under the names that other pages use."""
    names = {"base.pass@1": "free.base.pass@1", "base.mixing": "free.base.mixing",
             "base.checked.mixing": "free.base.checked.mixing", "zero.pass@1": "free.pass@1",
             "zero.mixing": "free.mixing", "zero.checked.mixing": "free.checked.mixing"}
    return {name: numbers.get(key) for name, key in names.items()}


NAMES = {"free.base.": "base", "free.": "Zero, languages free", "masked.": "one language only",
         "reward.": "language reward"}


def page(rows, notes):
    """The lines of the report: base and arms, and each arm against free."""
    steps = sorted(int(key.removeprefix("free.dev")) for key in rows
                   if key.startswith("free.dev") and key.removeprefix("free.dev").isdigit())
    columns = {"pass@1": "pass@1", "mixing": "mixes", "checked.mixing": "of checked answers",
               "language": "words in the question's language", "length": "tokens",
               "reflection": "checks"} | {f"dev{step}": f"dev, rollout {step}" for step in steps}
    body = [[name, *(cell(rows, f"{prefix}{key}") for key in columns)]
            for prefix, name in NAMES.items()]
    lines = [*table(["", *columns.values()], body), ""]
    for arm in ("masked", "reward"):
        comparison = compare(rows, "free.pass@1", f"{arm}.pass@1")
        if comparison:
            lines.append(f"- {NAMES[f'{arm}.']}, minus languages free: "
                         f"{comparison.text(points=True)}")
    return lines
