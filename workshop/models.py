"""The models that are kept with the code: look at them before you train anything.

    python workshop/models.py                  one held-out question, answered by each model
    python workshop/models.py 25-7+9+6         your question
    python workshop/models.py compare          right answers, tokens and languages of each

    base      a model that has read people's sums, many of them wrong
    zero      R1-Zero: the base after RL
    r1        R1: from the same base, after all stages of the recipe
    student   a smaller base; distillation starts from it

`python r1mini.py chat results/checkpoints/0/r1.pt` is a conversation with one of them.
"""
import random
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import tasks
from engine import checkpoint
from engine.errors import UserError
from engine.evaluate import evaluate, prompts_of, sample_answers

NAMES = ("base", "zero", "r1", "student")
KEPT = ROOT / "results" / "checkpoints" / "0"  # of seed 0
LIMIT = 200                                    # tokens of an answer
LEVELS = (3, 4, 5, 6)                          # operations of the problems that are compared
SHOWS = {"pass@1": "right", "length": "tokens", "reflection": "checks", "mixing": "mixes",
         "format": "format"}


def path_of(name):
    """The file of a kept model. UserError if it is missing."""
    path = KEPT / f"{name}.pt"
    if not path.exists():
        raise UserError(f"{path} is missing: git checkout results/checkpoints brings it back")
    return path


def load(name):
    """A kept model."""
    return checkpoint.load(path_of(name))[0]


def _make_question(text):
    """The Problem that a user's text asks, such as 25-7+9. Without a text, a held-out
    Problem."""
    if not text:
        return tasks.make_problem(random.Random(), 4, "test", language="en")
    expression = re.sub(r"^compute|\s", "", text.lower())
    if not re.fullmatch(r"\d+([+-]\d+)*", expression):
        raise UserError(f"{text!r} is no sum such as 25-7+9+6")
    answer = sum(map(int, re.findall(r"[+-]?\d+", expression)))
    return tasks.Problem(tasks.WORDS["en"]["ask"] + expression, str(answer), "en")


def ask(text):
    """Prints one answer of each model to a question."""
    problem = _make_question(text)
    prompts, seed = prompts_of([problem]), random.getrandbits(30)
    print(f"{problem.question} (right: {problem.answer})")
    for name in NAMES:
        [ids] = sample_answers(load(name), prompts, LIMIT, rows=1, seed=seed)
        answer = tasks.decode(ids)
        verdict = "right" if tasks.accuracy(answer, problem) else "wrong"
        print(f"\n{name}, {len(ids)} tokens, {verdict}\n    {answer}", flush=True)


def compare():
    """Prints a table of all models on dev problems, four answers to each at temperature 1."""
    problems = tasks.make_problems("dev", 48, LEVELS)
    print(f"{'':8}" + "".join(f"{word:>8}" for word in SHOWS.values()))
    for name in NAMES:
        means, _ = evaluate(load(name), problems, 4, 1.0, 1.0, LIMIT)
        cells = [f"{means[key]:8.0f}" if key == "length" else f"{means[key] or 0:8.0%}"
                 for key in SHOWS]
        print(f"{name:8}" + "".join(cells), flush=True)


def main(words):
    """Runs what the words ask for. Returns 0, or 2 for what the user can correct."""
    try:
        if words == ["compare"]:
            compare()
        else:
            ask(" ".join(words))
    except (UserError, OSError) as error:
        print(f"models: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
