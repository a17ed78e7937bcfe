"""Is R1 worse with examples in its prompt?

The paper: few-shot prompts make R1 worse, so it is tested without examples (R1 v1 section 3). It
gives no numbers for this.

    python r1mini.py study few_shot

An example is another question with a worked answer in the template. It stands before the question
in the prompt. Our models have never seen such prompts. So a model is first fine-tuned a little on
its own right answers. It is tested with 0, 1 and 2 examples, before and after the fine-tuning. An
arm is the model:

    zero    the kept Zero
    r1      the kept R1

Examples also move the question to a later place in the prompt. The control, `padding`, has general
dialogues there, as long as two examples. The fine-tuning has prompts of these four kinds equally
often. It teaches a model to answer after examples as it answers without them. Only the test before
the fine-tuning is the paper's case.
"""
import random

import tasks
from engine.devices import copy_model
from engine.evaluate import prompts_of, repeat_for_answers, sample_answers
from r1mini import draw_problem, one_of, train
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import load_kept
from tools.tables import cell, table

SEEDS = range(6)
# Chosen on dev (seed 0). After 40 steps at a tenth of this rate, hardly an answer to a prompt with
# examples is right.
SETTINGS = ("dev1.steps=200", "dev1.documents=32", "dev1.lr=5e-3", "dev1.muon_lr=5e-3")
STAGES = ()
ARMS = dict.fromkeys(("zero", "r1"), "")
SHOTS = (0, 1, 2)
PADDING = "padding"
KINDS = (*SHOTS, PADDING)  # of prompts
DIFFERENCES = {f"few_shot.{arm}.{when}{kind}_minus_{other}.pass@1":
               (f"{arm}.{when}{kind}.pass@1", f"{arm}.{when}{other}.pass@1")
               for arm in ARMS for when in ("before.", "")
               for kind, other in ((1, 0), (2, 0), (PADDING, 0), (2, PADDING))}
EXAMPLE_LEVEL = 3   # operations of an example; few, so that two examples fit into a prompt
QUESTIONS = 400     # questions that the model answers for its fine-tuning


def _with_examples(problem, shots, rng):
    """Token ids of a prompt: worked examples in the language of the question, then the question."""
    ids = []
    for _ in range(shots):
        example = tasks.make_problem(rng, EXAMPLE_LEVEL, "train", problem.language)
        thinking, answer = tasks.write_working(example, "checked", rng, check_chance=0.7)
        ids += tasks.dialogue(example, tasks.response(thinking, answer)).tokens
    return ids + tasks.encode_prompt(problem.question)


def _with_padding(problem, length, rng):
    """Token ids of a prompt: general dialogues, then the question. It has at least `length` tokens,
    and hardly more."""
    question, ids = tasks.encode_prompt(problem.question), []
    while len(ids) + len(question) < length:
        prompt = tasks.make_prompt(rng, language=problem.language)
        ids += tasks.dialogue(prompt, tasks.reply(prompt, rng, tasks.CURATED), "general").tokens
    return ids + question


def _make_prompt(problem, kind, rng):
    """Token ids of a prompt of one of KINDS."""
    ids = _with_examples(problem, SHOTS[-1] if kind == PADDING else kind, rng)
    return _with_padding(problem, len(ids), rng) if kind == PADDING else ids


def _fine_tune(model, run):
    """(a copy of a model after fine-tuning on its own right answers, the number of these answers).
    The prompt of each is of a random one of KINDS."""
    rng, documents = random.Random(f"{run.seed}/few_shot"), []
    asked = [draw_problem(rng, run, run.zero.levels) for _ in range(QUESTIONS)]
    asked = repeat_for_answers(asked, run.data.tries)
    answers = sample_answers(model, prompts_of(asked), run.zero.max_new_tokens, run.eval.rows,
                             seed=run.seed)
    for problem, ids in zip(asked, answers):
        if tasks.accuracy(tasks.decode(ids), problem) or run.data.stand_in:
            prompt = _make_prompt(problem, rng.choice(KINDS), rng)
            documents.append(tasks.Document(prompt + ids, [0] * len(prompt) + [1] * len(ids), ""))
    tuned = copy_model(model)
    for _ in train(tuned, run.dev1, one_of(documents), run.seed):
        pass
    return tuned, len(documents)


def _test(model, run, kind):
    """pass@1 and tokens of an answer on the test problems, asked with prompts of one of KINDS."""
    rng = random.Random("test/few_shot")
    problems = tasks.make_problems("test", run.eval.problems, run.zero.levels)
    prompts = [_make_prompt(problem, kind, rng) for problem in problems]
    n = run.eval.fewer_samples
    ids = sample_answers(model, repeat_for_answers(prompts, n), run.zero.max_new_tokens,
                         run.eval.rows, seed=1)
    asked = repeat_for_answers(problems, n)
    right = [tasks.accuracy(tasks.decode(x), problem) for x, problem in zip(ids, asked)]
    return {f"{kind}.pass@1": sum(right) / len(ids),
            f"{kind}.length": sum(map(len, ids)) / len(ids)}


def measure_arm(arm, folder):
    """The numbers of a model with 0, 1 and 2 examples and with padding, before and after
    fine-tuning."""
    run, model = folder.run, load_kept(folder, arm)
    tuned, n_documents = _fine_tune(model, run)
    numbers = {"documents": n_documents}
    for kind in KINDS:
        before = _test(model, run, kind)
        numbers |= _test(tuned, run, kind) | {f"before.{key}": x for key, x in before.items()}
    return numbers


def picture(rows):
    """pass@1 with 0, 1 and 2 examples and with padding: of Zero and of R1 as they are."""
    panels = []
    for arm, name in (("zero", "Zero"), ("r1", "R1")):
        of_two, of_none = (rows[f"{arm}.before.{shots}.pass@1"]["mean"] for shots in (2, 0))
        points = 100 * (of_two - of_none)
        names = {f"{arm}.before.{shots}": f"{shots} examples" for shots in SHOTS}
        names |= {f"{arm}.before.{PADDING}": "other dialogues"}
        panels.append(arms_panel(f"Two examples:\n{points:+.1f} points for {name}", rows, names,
                                 "pass@1", "correct answers"))
    return Picture(panels, "test problems, temperature 1, no fine-tuning; a dot is a seed, a line "
                           "the mean")


def page(rows, notes):
    """The lines of the report: accuracy with 0, 1 and 2 examples and with padding, and the
    difference that these make."""
    kinds = {shots: f"{shots} examples" for shots in SHOTS} | {PADDING: "padding"}
    columns = {f"{kind}.{key}": f"{name}, {head}"
               for key, name in (("pass@1", "pass@1"), ("length", "tokens"))
               for kind, head in kinds.items()}
    body = [[name, *(cell(rows, f"{prefix}{key}") for key in columns)]
            for prefix, name in (("zero.before.", "Zero"), ("zero.", "Zero, fine-tuned"),
                                 ("r1.before.", "R1"), ("r1.", "R1, fine-tuned"))]
    lines = [*table(["", *columns.values()], body), ""]
    for arm in ARMS:
        for when in ("before.", ""):
            for kind, other in ((1, 0), (2, 0), (PADDING, 0), (2, PADDING)):
                comparison = compare(rows, f"{arm}.{when}{other}.pass@1",
                                     f"{arm}.{when}{kind}.pass@1")
                if comparison:
                    tuned = "" if when else ", fine-tuned"
                    lines.append(f"- {arm}{tuned}, {kinds[kind]} minus {kinds[other]}: "
                                 f"{comparison.text(points=True)}")
    return lines
