"""Why does R1-Zero mix languages, and does mixing help it?

The paper: R1-Zero mixes English and Chinese in one chain of thought; its base has read mostly
these two languages (R1 v2 section A.1). With a reward for keeping to one language, accuracy is
equal on maths and slightly lower on code (R1 v2 section B.6, Fig 7). A loss could have two
reasons: mixing helps to think, or the reward competes with the one for right answers.

    python r1mini.py study mixing

In our corpus, checked solutions mix languages more often than short ones. In this study both
mix them equally often, so RL cannot raise mixing by choosing checks. Longer answers have more
words, and so more chances to mix. Answers without working never mix. So the table has columns for
checked answers and for short workings alone.

All arms start RL from the same base. zero is compared with the base, and masked and reward are
compared with free:

    zero      Zero's RL, unchanged
    free      the control of the next two: the model may write both languages
    masked    the model cannot write words of the other language. The mask is in sampling, in the
              trainer and in the tests. There is no reward for it
    reward    the language reward of Dev2

A mask may change the accuracy by itself, before anything is learnt. So base and free are also
tested with it. The reward pays for the share of words in the question's language, and nothing for
an answer without words. So it also pays for words; "no words" counts these answers.

free, masked and reward are not quite Zero's RL. In each of them a rollout has questions of one
language, and the two languages take turns, so that one mask serves a whole rollout. They have no KL
penalty, since the reference policy has no mask.
"""
import dataclasses

import torch

import tasks
from engine.devices import copy_model
from engine.evaluate import prompts_of, repeat_for_answers, sample_answers
from grpo import train_rl
from r1mini import base, draw_problem, make_task, rule_rewards
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import start_folder
from tools.tables import cell, table

SEEDS = range(6)
SETTINGS = ("corpus.steps_mixed=0.4", "corpus.checked_mixed=0.4", "eval.longer=1",
            "data.prompts=8", "eval.samples=8", "zero.dev_every=6")
STAGES = ("base",)
ARMS = dict.fromkeys(("zero", "free", "masked", "reward"), "")
DIFFERENCES = {f"mixing.{arm}.minus_free.pass@1": (f"{arm}.pass@1", "free.pass@1")
               for arm in ("masked", "reward")}
# What the mask does at once, to models that were trained without it.
DIFFERENCES |= {f"mixing.{arm}.mask_at_test": (f"{arm}.mask_at_test.pass@1", f"{arm}.pass@1")
                for arm in ("free", "zero.base")}


# ------------------------------------------------------------------------------
# The mask


def _letters(language):
    """The ids of all tokens with a letter of a language. Chinese letters have bytes above 127."""
    is_letter = bytes.isalpha if language == "en" else (lambda byte: byte[0] > 127)
    return [i for token, i in tasks.RANKS.items()
            if any(is_letter(bytes([byte])) for byte in token)]


class Mask:
    """A hook on a model's head. It gives tokens of the other language a probability of 0.

    language: the language of the questions. Set it before the model answers them.
    """

    def __init__(self):
        self.language = None
        self.forbidden = {language: torch.tensor(_letters(tasks.other_language(language)))
                          for language in tasks.LANGUAGES}

    def __call__(self, head, inputs, logits):
        """The logits (.., V) with the mask. It is -1e9 and not -inf, since the entropy multiplies
        it by the probability 0, and -inf would give nan."""
        return logits.index_fill(-1, self.forbidden[self.language].to(logits.device), -1e9)


# ------------------------------------------------------------------------------
# The arms


def _test(model, mask, problems, samples, run, seed):
    """The numbers of a model's answers. All questions of one language are asked together. mask: the
    model's Mask, or None."""
    texts, asked, lengths = [], [], []
    for language in tasks.LANGUAGES:
        if mask:
            mask.language = language
        questions = repeat_for_answers([p for p in problems if p.language == language], samples)
        ids = sample_answers(model, prompts_of(questions), run.zero.max_new_tokens, run.eval.rows,
                             seed=seed)
        texts += [tasks.decode(x) for x in ids]
        asked += questions
        lengths += map(len, ids)
    numbers = {"pass@1": sum(map(tasks.accuracy, texts, asked)) / len(texts),
               "length": sum(lengths) / len(texts)}
    for name in ("mixing", "language", "wordless", "reflection"):
        numbers[name] = tasks.MEASURES[name](texts, asked)
    for style in ("checked", "steps"):
        in_style = [i for i, text in enumerate(texts)
                    if tasks.parse(text)[1] is not None and tasks.style_of(text) == style]
        numbers[f"{style}.mixing"] = tasks.MEASURES["mixing"]([texts[i] for i in in_style],
                                                              [asked[i] for i in in_style])
    return {key: value for key, value in numbers.items() if value == value}  # nan: no words


def _settings(arm, run):
    """The settings of an arm's RL."""
    if arm == "zero":
        return run.zero
    weight = run.dev2.language_weight if arm == "reward" else 0.0
    return dataclasses.replace(run.zero, beta=0.0, language_weight=weight)


def _make_task(arm, run, s, mask):
    """The task of an arm's RL. mask: the model's Mask, or None."""
    task = make_task(run, s, rule_rewards(s))
    if arm == "zero":
        return task

    def draw(rng, n, step):
        """n problems of one language, which the mask is told."""
        language, problems = tasks.LANGUAGES[step % 2], []
        if mask:
            mask.language = language
        while len(problems) < n:
            problem = draw_problem(rng, run, s.levels)
            if problem.language == language:
                problems.append(problem)
        return problems

    return dataclasses.replace(task, draw=draw)


def measure_arm(arm, folder):
    """The numbers of an arm on test, and on dev every few rollouts; in zero also the base's."""
    run, start = folder.run, start_folder(folder, arm, STAGES)
    model = copy_model(base(start, {}))
    mask = _put_on_mask(model) if arm == "masked" else None
    s = _settings(arm, run)
    task = _make_task(arm, run, s, mask)
    dev = tasks.make_problems("dev", run.eval.dev_problems, s.levels)
    numbers = {}
    for record, _ in train_rl(model, task, s, run.seed):
        if record["step"] % s.dev_every == 0:
            on_dev = _test(model, mask, dev, run.eval.samples, run, seed=0)
            numbers |= {f"dev{record['step']}": on_dev["pass@1"],
                        f"dev_mixing{record['step']}": on_dev.get("mixing")}
            print(f"  rollout {record['step']}: dev {on_dev['pass@1']:.3f}", flush=True)
    test = tasks.make_problems("test", run.eval.problems, s.levels)

    def on_test(m, mask):
        return _test(m, mask, test, run.eval.fewer_samples, run, seed=1)

    numbers |= on_test(model, mask)
    if arm == "free":
        numbers["mask_at_test.pass@1"] = on_test(model, _put_on_mask(model))["pass@1"]
    if arm == "zero":
        start_model = copy_model(base(start, {}))
        numbers |= {f"base.{key}": value for key, value in on_test(start_model, None).items()}
        masked = on_test(start_model, _put_on_mask(start_model))
        numbers["base.mask_at_test.pass@1"] = masked["pass@1"]
    return numbers


def _put_on_mask(model):
    """Puts a Mask on a model's head. Returns it."""
    mask = Mask()
    model.head.register_forward_hook(mask)
    return mask


def combine(numbers):
    """The base's numbers under the base's name. The arm zero measures them."""
    return {key: numbers.get(f"zero.{key}")
            for key in ("base.pass@1", "base.mixing", "base.checked.mixing", "base.steps.mixing")}


NAMES = {"zero.base": "base", "zero": "Zero", "free": "free: both languages",
         "masked": "the other language masked", "reward": "language reward"}


def picture(rows):
    """How often each arm mixes, and how often it is right. None for results that are older than the
    arm masked."""
    if "masked.pass@1" not in rows:
        return None
    masked, reward = (100 * (rows[f"{arm}.pass@1"]["mean"] - rows["free.pass@1"]["mean"])
                      for arm in ("masked", "reward"))
    names = {"zero.base": "base", "free": "free", "masked": "masked", "reward": "reward"}
    return Picture([arms_panel(f"Mask: {masked:+.1f} points,\nreward: {reward:+.1f}", rows, names,
                               "pass@1", "correct answers"),
                    arms_panel("beside RL with\nboth languages", rows, names, "mixing",
                               "answers that mix languages")],
                   "test problems, temperature 1; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: base and arms, how masked and reward differ from free, and what a
    mask does at once."""
    steps = sorted(int(key.removeprefix("free.dev")) for key in rows
                   if key.startswith("free.dev") and key.removeprefix("free.dev").isdigit())
    columns = {"pass@1": "pass@1", "mixing": "mixes", "checked.mixing": "of checked answers",
               "steps.mixing": "of short workings", "language": "words in the question's language",
               "wordless": "no words", "length": "tokens", "reflection": "checks"}
    columns |= {f"dev{step}": f"dev, rollout {step}" for step in steps}
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm, name in NAMES.items()]
    lines = [*table(["", *columns.values()], body), "", "All rows after Zero have questions of one "
             "language in a rollout and no KL penalty, so free is not quite Zero.", ""]
    for arm in ("masked", "reward"):
        comparison = compare(rows, "free.pass@1", f"{arm}.pass@1")
        if comparison:
            lines.append(f"- {NAMES[arm]}, minus {NAMES['free']}: {comparison.text(points=True)}")
    for arm in ("free", "zero.base"):
        comparison = compare(rows, f"{arm}.pass@1", f"{arm}.mask_at_test.pass@1")
        if comparison:
            lines.append(f"- {NAMES[arm]}, with a mask at test alone: "
                         f"{comparison.text(points=True)}")
    return lines
