"""Does reflection come by itself?

The paper: reflection and other strategies "arise spontaneously" in R1-Zero (R1 v1 section
2.2.4, the "aha moment"). Its base has read the internet, where people check their work.

    python r1mini.py study emergence

Here we know the base's corpus. Each arm pretrains a base and makes Zero from it. Only the
corpus differs between arms:

    0, 1, 4, 16   percent of the documents that are checked workings. Together with short
                  workings they are 38%
    unmixed       the default corpus (19% checked), but no working mixes the languages
    mixed         the default corpus, but half of the workings mix the languages

What is checking good for? Each Zero is tested at temperatures 1, 0.6 and 1.3. Single steps
fail more often at 1.3.
"""
from engine.evaluate import evaluate
from engine.folder import read_log
from r1mini import pretrain, rl
from tasks import make_problems
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import test_record
from tools.tables import cell, table

SETTINGS, STAGES = ("eval.longer=1", "data.prompts=8"), ("base", "zero")
PERCENTS = (0, 1, 4, 16)  # percent of the documents that are checked workings
WORKINGS = 38             # percent of the documents are checked or short workings, as by default
ARMS = {str(p): f"corpus.checked={p / 100} corpus.steps={(WORKINGS - p) / 100}"
        for p in PERCENTS}
ARMS |= {name: f"corpus.steps_mixed={share} corpus.checked_mixed={share}"
         for name, share in (("unmixed", 0.0), ("mixed", 0.5))}
HOT = 1.3  # temperature
DIFFERENCES = {f"16_minus_{p}.{key}": (f"16.{key}", f"{p}.{key}")
               for p in PERCENTS[:-1] for key in ("zero.pass@1", "zero.hot", "zero.cool")}


def measure_arm(arm, folder):
    """The numbers of a base and of Zero: at temperatures 1, 0.6 (cool) and HOT."""
    run = folder.run
    base = pretrain(folder, "base", run.model, run.base)
    models = {"base": base, "zero": rl(folder, "zero", {"base": base}, "base", run.zero)}
    problems = make_problems("test", run.eval.problems, run.zero.levels)
    numbers = {}
    for stage, model in models.items():
        test = test_record(folder.path, stage)
        for key in ("pass@1", "length", "reflection", "correction", "mixing"):
            numbers[f"{stage}.{key}"] = test[key]
        cool = test_record(folder.path, stage, run.eval.temperature)
        numbers[f"{stage}.cool"] = cool["pass@1"]
        hot, _ = evaluate(model, problems, run.eval.fewer_samples, HOT, 1.0,
                          run.zero.max_new_tokens, run.eval.rows, seed=1)
        numbers[f"{stage}.hot"] = hot["pass@1"]
    updates = [r for r in read_log(folder.path) if r["kind"] == "zero"]
    numbers["most_reflection"] = max(r["reflection"] for r in updates)
    return {key: value for key, value in numbers.items() if value is not None}


def combine(numbers):
    """How often Zero checks, by the percent of checked workings in the corpus."""
    return {f"emergence.{p}.reflection": numbers[f"{p}.zero.reflection"] for p in PERCENTS}


def picture(rows):
    """How often Zero checks, and how often it is right, by the share of checked workings."""
    names = {str(p): f"{p}% checked" for p in PERCENTS}
    names |= {"unmixed": "unmixed", "mixed": "mixed"}
    few, many = (rows[f"{p}.zero.reflection"]["mean"] for p in (4, 16))
    right = [rows[f"{p}.zero.pass@1"]["mean"] for p in (4, 16)]
    return Picture([arms_panel(f"4% checked become {few:.0%},\n16% become {many:.0%};", rows, names,
                               "zero.reflection", "answers of Zero that check"),
                    arms_panel(f"{right[0]:.0%} and {right[1]:.0%}\nare right", rows, names,
                               "zero.pass@1", "correct answers")],
                   "test problems, temperature 1; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: the arms, and what checked workings gain at each temperature."""
    columns = {"base.reflection": "base checks", "zero.reflection": "Zero checks",
               "most_reflection": "most in a rollout", "base.mixing": "base mixes",
               "zero.mixing": "Zero mixes", "base.pass@1": "base", "zero.pass@1": "Zero",
               "zero.cool": "at 0.6", "zero.hot": f"at {HOT}", "zero.length": "tokens"}
    body = [[f"{arm}% checked" if arm.isdigit() else arm,
             *(cell(rows, f"{arm}.{key}") for key in columns)] for arm in ARMS]
    lines = [*table(["corpus", *columns.values()], body), ""]
    for key, name in (("zero.pass@1", "1"), ("zero.cool", "0.6"), ("zero.hot", HOT)):
        comparison = compare(rows, f"0.{key}", f"16.{key}")
        if comparison:
            lines.append(f"- Zero at temperature {name}, 16% checked minus 0%: "
                         f"{comparison.text(points=True)}")
    return lines
