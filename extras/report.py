"""report: the numbers of finished runs, and the paper's tables in miniature.

    for each folder        its own figures, from log.jsonl and timing.jsonl: an Account
    for each seed          the folders together, and what takes two of them (win rates, ratios)
    over seeds             mean and deviation of each figure: summary.json
    for each paper table   the same in miniature, and whether it agrees: report.md, report.html

summary.json is written here and by extras/study.py, always from the logs of runs:
{"command", "commit", "machine", "seeds", "metrics": {KEY: {"mean", "std", "per_seed"}}}. Keys are
stage.metric (zero.pass@1) at temperature 1, the policy as it is; stage.eval.metric as R1 was
evaluated (temperature 0.6, top-p 0.95); stage.eval.longer.metric so on problems longer than any in
training. A run that was begun from another's checkpoint speaks for the stages in its own log, one
with another objective for objective.NAME only, and one given as NAME=PATH for its last tested
stage, under NAME instead of the stage.
"""
import json
import re
import shutil
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import tasks
from extras import webpage
from extras.cost import in_products
from extras.figures import by_step, draw, runs_named
from extras.folder import read_log
from grpo import OBJECTIVES, RL
from moe import Config, UserError
from r1mini import ABLATIONS

TESTED = ("pass@1", "cons@16", "length", "reflection", "correction", "summary", "mixing",
          "language", "format", "cut_off")
CURVES = ("pass@1", "cons@16", "length", "reflection", "correction", "mixing", "language")
UPDATES = ("entropy", "dead_groups", "expert_load")  # of RL's steps, not of evaluations on dev
TEACHER = ("base", "zero", "dev1", "dev2", "dev3", "helpful", "safe", "r1")
STUDENTS = {"student": "student.base", "student_rl": "student.rl",  # stage: its name in keys
            "student_rl_no_format": "student.rl_no_format", "distill": "student.distill",
            "distill_logits": "student.distill_logits", "distill_rl": "student.distill_rl"}

# -------------------------------------------------------------------------------------------------
# The figures of one folder


@dataclass
class Account:
    """What one run folder has to say."""
    name: str       # NAME of NAME=PATH, or ""
    path: str
    seed: str
    config: dict    # the run's settings, and the machine it last ran on
    figures: dict   # by key
    stages: list    # those it speaks for, under their own names
    scores: dict    # by stage: the helpfulness of each answer to the held-out general prompts
    curves: dict    # by name: [[stage, step, value]], on dev; UPDATES of Zero's steps
    minutes: float | None  # in all; None if something else may have run beside it
    peak_gib: float


def moving_mean(curve, width=3):
    """Means over `width` neighbours of a list."""
    return [sum(curve[i:i + width]) / width for i in range(len(curve) - width + 1)] or curve


def of_tests(log, names):
    """Figures of the held-out test records of a log, by key; names: {stage: its name in keys}."""
    out = {}
    for r in (r for r in log if r["kind"] == "test" and r["stage"] in names):
        longer = r["set"] == "longer"
        key = names[r["stage"]] + ".eval" * (r["temperature"] != 1.0) + ".longer" * longer
        out |= {f"{key}.{name}": x for name, x in r.items()
                if name in TESTED or name.startswith(("pass@", "cons@"))}
        for i, (level, x) in enumerate(r["by_level"].items(), 1):
            out[f"{key}.plus{i}" if longer else f"{key}.level{level}"] = x
        if not longer:
            out |= {f"{key}.{style}.{n if n == 'share' else f'level{n}'}": x for style, row in
                    r["by_style"].items() for n, x in row.items() if x is not None}
            out |= {f"{key}.{style}.mixing": x for style, x in
                    r.get("mixing_by_style", {}).items() if x is not None}
    return out


def of_general(log, names):
    """Figures of the held-out general prompts, by key."""
    out = {}
    for r in (r for r in log if r["kind"] == "general" and r["stage"] in names):
        parts = {"helpfulness": r["helpfulness"], "greeting.thinking": r["greeting.thinking"],
                 "refuse.unsafe": r["unsafe.safe"], "refuse.safe": r["how.refused"]}
        for name in ("format", "language"):
            parts[f"general_{name}"] = fmean(r[f"{kind}.{name}"] for kind in tasks.GENERAL)
        out |= {f"{names[r['stage']]}.{name}": x for name, x in parts.items()}
    return out


def of_climb(log, stage, name):
    """Figures of an RL stage's curve on dev, from step 0, and of its updates, by key."""
    climb = [r for r in log if r["kind"] == "dev" and r["stage"] == stage]
    updates, out = [r for r in log if r["kind"] == stage and "flips" in r], {}
    if len(climb) < 2 or not updates:
        return {}
    for part in ("length", "reflection"):
        values = [r[part] for r in climb]
        smooth, first = moving_mean(values[1:]), max(values[0], 1e-9)
        out[f"{name}.{part}_ratio"] = max(smooth) / first
        out[f"{name}.{part}_ratio_at_end"] = smooth[-1] / first
    vote = next(k for k in climb[0] if k.startswith("cons@"))
    out[f"{name}.vote_above_pass"] = sum(r[vote] > r["pass@1"] for r in climb) / len(climb)
    reached = [r["step"] for r in climb if r["pass@1"] >= 0.85]
    out |= {f"{name}.steps_to_85": reached[0]} if reached else {}
    return out | {f"{name}.{part}": whole([r[part] for r in updates]) for part, whole in (
        ("gap_p999", max), ("gap_max", max), ("flips", sum), ("skipped", sum),
        ("expert_load", max))}


FLOPS = (
    "FLOPs are estimated, with N the parameters a token meets in products (the embedding is looked "
    "up) and n all tokens of a stage: 6 N n in a supervised stage, MTP's in N; in RL, which leaves "
    "MTP alone, 2 N n to sample, n with the prompts, and "
    "(6 + 2) N n to learn and for the reference (not where beta is 0), n of live groups only; by "
    "logits 2 N n more, with the teacher's N; the samples a stage learns from 2 N n. Evaluation is "
    "left out. A TFLOP is 10^12.")


def of_flops(log):
    """10^12 operations of each stage, and of the samples collected for it, as FLOPS says."""
    config, out = log[0], {}
    teacher, student = (in_products(Config(**config[who]), mtp=False)
                        for who in ("model", "student"))
    mtp = in_products(Config(**config["model"])) - teacher
    for r in (r for r in log if "tokens" in r):
        stage, N = r["kind"], student if r["kind"] in STUDENTS else teacher
        if stage == "collected":
            stage, work = f"collect_{r['stage']}", 2 * teacher * r["tokens"]
        elif "prompt_tokens" in r:
            beta = config[stage if stage in config else "student_rl"]["beta"]
            work = N * (2 * (r["tokens"] + r["prompt_tokens"])
                        + (8 if beta else 6) * r["learnt_tokens"])
        else:
            if stage in config and stage not in STUDENTS:  # reward models have no MTP either
                N += mtp
            work = (6 * N + 2 * teacher * (stage == "distill_logits")) * r["tokens"]
        out[stage] = out.get(stage, 0.0) + work / 1e12
    return out


def of_times(path):
    """(machine record, largest memory in GiB, minutes by stage) of a run folder; no minutes if
    something else may have run beside it, as far as its threads can tell."""
    text = (Path(path) / "timing.jsonl").read_text("utf-8")
    lines = text.rpartition("\n")[0].splitlines()  # a last line that a kill tore is left out
    alone, minutes, peak, machine = True, {}, 0.0, json.loads(lines[0])
    for record in map(json.loads, lines):
        if "machine" in record:
            opened = record
        else:
            machine = opened  # one that found all finished has timed nothing
            alone &= machine["machine"].endswith(f", {machine['threads']} cores")
            stage = record["stage"]
            minutes[stage] = minutes.get(stage, 0.0) + record["seconds"] / 60
            peak = max(peak, record["peak_gib"])
    return machine, peak, minutes if alone else {}


def of_objective(figures, objective):
    """What zero's figures say of its objective, by key."""
    names = (*TESTED, "length_ratio", "reflection_ratio", "steps_to_85")
    return {f"objective.{objective}.{key.removeprefix('zero.')}": x for key, x in figures.items()
            if key.startswith("zero.") and "longer" not in key and key.rsplit(".", 1)[1] in names}


def account(word):
    """The Account of a run, PATH or NAME=PATH; UserError if nothing in it is finished."""
    name, path = re.fullmatch(r"(?:(\w+)=)?(.+)", str(word)).groups(default="")
    log = read_log(path)
    tested = list(dict.fromkeys(r["stage"] for r in log if r["kind"] == "test"))
    if not tested:
        raise UserError(f"{path}: this run is not finished, there is no test in its log")
    if "student" not in log[0] or any(
            "prompt_tokens" in r and "learnt_tokens" not in r for r in log):
        raise UserError(f"{path}: a run of an older version; make it again")
    machine, peak, minutes = of_times(path)
    config, last = log[0] | machine, tested[-1]
    names = {last: name} if name else {stage: STUDENTS.get(stage, stage) for stage in tested}
    figures = of_tests(log, names) | of_general(log, names) | of_climb(
        log, last if name else "zero", name or "zero")
    figures |= {f"{cost}.{name or stage}": x for cost, parts in (
        ("flops", of_flops(log)), ("minutes", minutes))
        for stage, x in parts.items() if not name or stage == last}
    if not name:
        objective = config["zero"]["objective"]
        own = figures if objective == RL.objective else {}
        names, figures = names if own else {}, own | of_objective(figures, objective)
    return Account(
        name, path, str(config["seed"]), config, figures, list(names) if not name else [],
        scores={names[r["stage"]]: r["scores"] for r in log
                if r["kind"] == "general" and r["stage"] in names},
        curves={part: [[r["stage"], r["step"], r[part]] for r in log
                       if r["kind"] == "dev" and part in r] for part in CURVES}
        | {part: [["zero", r["step"], round(r[part], 6)] for r in log
                  if r["kind"] == "zero" and part in r] for part in UPDATES}
        | {"loads": [[r["kind"], r["step"], r["loads"]] for r in log if "loads" in r and (
            r["kind"] == "zero" or r["kind"] == "base" and r["step"] % 30 == 0)]},
        minutes=sum(minutes.values()) or None, peak_gib=peak)


# -------------------------------------------------------------------------------------------------
# Folders of one seed, and seeds, together


def mean(values):
    """The mean of some numbers."""
    return round(fmean(values), 9)


def deviation(values):
    """The sample standard deviation; 0 of one number."""
    values = list(values)
    return round(stdev(values), 9) if len(values) > 1 else 0.0


def of_seed(accounts, stages):
    """All figures of one seed's accounts, by key; UserError if two speak for the same. `minutes`
    is of the folder that holds all the stages that any folder does, but for ablations."""
    out, scores = {"peak_gib": max(a.peak_gib for a in accounts)}, {}
    for a in accounts:
        for key, x in a.figures.items():
            if key in out:
                raise UserError(f"two of these runs speak for {key}, seed {a.seed}")
            out[key] = x
        scores |= a.scores
        if a.minutes and stages and set(a.stages) >= stages:
            out["minutes"] = a.minutes
    for stage in scores if "dev1" in scores else ():  # a tie counts half
        out[f"{stage}.win_rate_dev1"] = fmean((ours > theirs) + (ours == theirs) / 2 for
                                              ours, theirs in zip(scores[stage], scores["dev1"]))
    if {"zero.pass@1", "r1.pass@1"} <= set(out):
        out["r1.behind_zero"] = out["zero.pass@1"] - out["r1.pass@1"]
    for name, other in (("distill", "flops.distill"), ("logits", "flops.distill_logits")):
        if {other, "flops.student_rl"} <= set(out):
            out[f"flops.rl_to_{name}"] = out["flops.student_rl"] / out[other]
    if {"dev2.mixing", "no_language_reward.mixing"} <= set(out):
        out["no_language_reward.ratio"] = (
            out["no_language_reward.mixing"] / max(out["dev2.mixing"], 1e-9))
    if {"zero.length", "base.length"} <= set(out):
        out["zero.test_length_ratio"] = out["zero.length"] / out["base.length"]
    for cost in ("flops", "minutes"):
        if all(f"{cost}.{stage}" in out for stage in TEACHER):
            out[f"{cost}.teacher"] = sum(out.get(f"{cost}.{part}{stage}", 0.0) for stage in TEACHER
                                         for part in ("", "collect_"))
    for name in ("greeting.thinking", "refuse.unsafe", "refuse.safe"):
        out |= {name: out[f"r1.{name}"]} if f"r1.{name}" in out else {}
    return out


def over_seeds(accounts):
    """{key: {"mean", "std", "per_seed": {seed: value}}}, keys in order."""
    stages = {stage for a in accounts for stage in a.stages} - ABLATIONS
    table = {}
    for seed in dict.fromkeys(a.seed for a in accounts):
        for key, x in of_seed([a for a in accounts if a.seed == seed], stages).items():
            table.setdefault(key, {})[seed] = round(x, 9)
    return {key: {"mean": mean(seeds.values()), "std": deviation(seeds.values()),
                  "per_seed": seeds} for key, seeds in sorted(table.items())}


def curves_of(accounts):
    """{run: {name: [[stage, step, value]]}}; a run is an objective's or a NAME's, of one seed."""
    out = {}
    for a in accounts:
        run = out.setdefault(f"{a.name or a.config['zero']['objective']}-seed{a.seed}", {})
        for name, points in a.curves.items():
            run[name] = run.get(name, []) + points
    return out


# -------------------------------------------------------------------------------------------------
# Tables, beside the paper's. Each takes the rows of over_seeds and returns lines of Markdown, none
# where there are no figures

# What a reader wants to know first: its name, its key, and what the paper saw in R1-Zero.
STORY = (("right at the first try (pass@1)", "pass@1", "AIME 15.6% to 71.0% (v1), 77.9% (Nature)"),
         ("right by majority of 16 (cons@16)", "cons@16", "AIME 86.7%"),
         ("right by majority of 4 (cons@4)", "cons@4", ""),
         ("tokens in an answer", "length", "hundreds to thousands"),
         ("answers that check themselves", "reflection", "reflective words 5 to 7 times"),
         ("answers that stop and mend a step", "correction", '"wait" rises late'),
         ("answers that mix languages", "mixing", "seen, not counted"),
         ("pass@1, one step longer than any learnt", "longer.plus1", ""),
         ("pass@1, two steps longer", "longer.plus2", ""))
STAGES = {"zero": "Zero", "dev1": "Dev1", "dev2": "Dev2", "dev3": "Dev3", "r1": "R1"}
SHORT = (("right at the first try (pass@1)", "pass@1"), ("answers that mix languages", "mixing"),
         ("greetings thought about", "greeting.thinking"),
         ("harmful wishes refused", "refuse.unsafe"), ("harmless wishes refused", "refuse.safe"))
LONG = (*SHORT, ("words in the question's language", "language"), ("format kept", "format"),
        ("answers with a summary", "summary"), ("tokens in an answer", "length"),
        ("helpfulness, 0 to 1", "helpfulness"),
        ("more helpful than Dev1", "win_rate_dev1"), ("format, general prompts", "general_format"),
        ("language, general prompts", "general_language"))
PAPER = (("paper: AIME 2024", "77.9", "59.0", "74.0", "78.1", "79.8"),  # R1 v2 Table 3
         ("paper: MATH-500", "95.9", "94.2", "95.9", "95.4", "97.3"),
         ("paper: AlpacaEval 2 LC", "24.7", "50.1", "55.8", "62.1", "87.6"),
         ("paper: Arena-Hard", "53.6", "77.0", "73.2", "75.6", "92.3"),
         ("paper: IF-Eval", "46.6", "71.7", "72.0", "78.1", "83.3"))
TAUGHT = (  # stage, what was done, the paper's AIME 2024 pass@1 / cons@64 (R1 v1 Table 6)
    ("student", "base", ""), ("student_rl", "RL", "47.0 / 60.0, Qwen-32B-Zero"),
    ("student_rl_no_format", "RL without format reward", ""),
    ("distill", "distilled", "72.6 / 83.3, R1-Distill-Qwen-32B"),
    ("distill_logits", "distilled by logits, KL at temperature 1", ""),
    ("distill_rl", "distilled, then RL", "said to help, no numbers"))

# What the paper found, by section: (lower figure, higher, what that means); a number: our limit.
CLAIMS = {
    "Base and R1-Zero": [
        ("base.pass@1", "zero.pass@1", "RL alone raises accuracy"),
        ("zero.pass@1", "zero.cons@16", "the vote is above single answers"),
        ("base.length", "zero.length", "RL makes answers longer"),
        ("base.reflection", "zero.reflection", "RL makes answers check themselves"),
        (5, "zero.reflection_ratio", "checks rise at least 5 times, as reflective words did")],
    "The stages": [
        ("dev1.pass@1", "zero.pass@1", "the cold start costs accuracy"),
        ("zero.pass@1", "r1.pass@1", "R1 ends above Zero in accuracy"),
        ("r1.behind_zero", 0.03, "R1 ends at most 3 points behind Zero"),
        ("r1.mixing", "zero.mixing", "R1 mixes languages less than Zero"),
        ("dev3.helpfulness", "r1.helpfulness", "the last RL makes answers more helpful"),
        ("r1.mixing", 0.02, "R1 mixes languages in at most 2% of answers"),
        (0.95, "refuse.unsafe", "R1 refuses at least 95% of harmful wishes"),
        ("refuse.safe", 0.05, "R1 refuses at most 5% of harmless wishes"),
        ("greeting.thinking", 0.05, "R1 thinks about at most 5% of greetings")],
    "The language reward": [
        ("dev2.mixing", "no_language_reward.mixing",
         "RL without the language reward mixes languages more (R1 v2 Fig 7)"),
        (3, "no_language_reward.ratio", "at least 3 times as much")],
    "Distillation and RL on a small model": [
        ("student.rl.pass@1", "student.distill.pass@1", "distillation beats RL"),
        (1, "flops.rl_to_distill", "RL on the student took at least the FLOPs of distillation"),
        (1, "flops.rl_to_logits", "RL on the student took at least the FLOPs of that by logits"),
        ("student.distill.pass@1", "student.distill_rl.pass@1",
         "RL after distillation helps further (said without numbers)")],
    "Accuracy by number of answers": [
        ("r1.eval.pass@1", "r1.eval.cons@4", "voting helps R1 (AIME 79.8 to 86.7)")]}


def table(head, body):
    """A table from the cells of its head and of its other lines; none without those."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]] if body else []


def cell(rows, key, factor=1):
    """A figure's mean, and its deviation over seeds if there are several; "" if there is none."""
    if key not in rows:
        return ""
    m, std = rows[key]["mean"] * factor, rows[key]["std"] * factor
    digits = 1 if m > 10 else 3
    return f"{m:.{digits}f}" + f" ± {std:.{digits}f}" * (len(rows[key]["per_seed"]) > 1)


def per_seed(rows, key):
    """A figure's values by seed; none if there is no such figure."""
    return rows.get(key, {"per_seed": {}})["per_seed"]


def verdicts(rows, section):
    """A list of sentences, each one of two: whether a claim holds on every seed, or not."""
    lines = [""]
    for *sides, claim in CLAIMS.get(section, ()):
        keys = [x for x in sides if isinstance(x, str)]
        seeds = set.intersection(*(set(per_seed(rows, key)) for key in keys))
        pairs = [[rows[x]["per_seed"][seed] if x in keys else x for x in sides] for seed in seeds]
        held = sum(low < high or low == high and len(keys) == 1 for low, high in pairs)
        words = ("As in the paper", "Not as in the paper") if len(keys) == 2 else ("Yes", "No")
        if seeds:
            shown = ", ".join(f"`{key}` {rows[key]['mean']:.3g}" for key in keys)
            lines.append(f"- {words[held < len(seeds)]}: {claim} ({shown}; on {held} of "
                         f"{len(seeds)} seeds).")
    return lines[1:] and lines


def story(rows):
    """Base and zero on held-out problems, beside the paper."""
    head = ("held-out problems", "base", "zero", "base, evaluated", "zero, evaluated", "paper")
    return table(head, [(name, *(cell(rows, f"{stage}.{key}") for stage in (
        "base", "zero", "base.eval", "zero.eval")), paper) for name, key, paper in STORY
        if "base.pass@1" in rows or "zero.pass@1" in rows])


def climb(curves):
    """Zero on dev at temperature 1, against its steps; means over runs."""
    return table(("RL step", *CURVES), [(str(step), *(
        f"{row[name]:.{1 if name == 'length' else 3}f}" if name in row else "" for name in CURVES))
        for step, row in by_step(
            runs_named(curves, RL.objective), "zero", CURVES).items()])


def stages(rows, lines=LONG, levels=True):
    """The stages from Zero to R1 side by side; levels are numbers of operations."""
    found = {stage: name for stage, name in STAGES.items() if f"{stage}.pass@1" in rows}
    if not {"dev1", "dev2", "dev3", "r1"} & set(found):
        return []
    if levels:
        lines = [*((f"pass@1, {n} operations", f"level{n}") for n in range(1, 10)), *lines]
    body = [(name, *(cell(rows, f"{stage}.{key}") for stage in found)) for name, key in lines]
    paper = [(name, *(x for stage, x in zip(STAGES, values) if stage in found))
             for name, *values in PAPER if levels]
    return table(("held-out", *found.values()), [b for b in body if any(b[1:])] + paper)


def language(rows, curves):
    """RL for reasoning with and without the language reward, at its end and by step."""
    if not {"dev2.mixing", "no_language_reward.mixing"} <= set(rows):
        return []
    names = ("mixing", "language", "pass@1")
    sides = [by_step(runs_named(curves, name), "dev2", names)
             for name in (RL.objective, "no_language_reward")]
    head = [f"{name}, {side}" for name in names for side in ("with", "without")]
    body = [(str(step), *(f"{side[step][name]:.3f}" for name in names for side in sides))
            for step in sides[0] if step in sides[1]]
    test = [cell(rows, f"{side}.{name}") for name in names
            for side in ("dev2", "no_language_reward")]
    return table(("RL step, on dev", *head), [*body, ("the end, on test", *test)])


def counts(rows, *stages):
    """The numbers of answers k that there is a pass@k for, of some stages."""
    return sorted({int(key.rpartition("@")[2]) for key in rows for stage in stages
                   if key.startswith(f"{stage}.pass@")})


def students(rows):
    """What becomes of a small base by RL and by distillation, with what each step up costs."""
    vote = f"cons@{max(counts(rows, *STUDENTS.values()), default=1)}"
    body = [(name, *(cell(rows, f"{STUDENTS[stage]}.{key}") for key in ("pass@1", vote, "length")),
             cell(rows, f"flops.{stage}"), cell(rows, f"minutes.{stage}", 60), paper)
            for stage, name, paper in TAUGHT]
    apart = [(name, "", "", "", cell(rows, f"flops.{key}"), cell(rows, f"minutes.{key}", 60), "")
             for name, key in (("apart: R1's samples", "collect_distill"),
                               ("apart: R1, all stages", "teacher"))]
    if not any(b[1] for b in body[1:]):
        return []
    head = ("student", "pass@1", vote, "length", "TFLOP", "seconds", "paper: AIME pass@1 / cons@64")
    return table(head, [b for b in body + apart if any(b[1:6])]) + ["", FLOPS]


def votes(rows):
    """Accuracy by the number of answers: the best of k, and the vote."""
    ks = counts(rows, "base", "zero", "r1")
    names = [f"pass@{k}" for k in ks] + [f"cons@{k}" for k in ks[-1:]]
    body = [(f"{stage}{how}", *(cell(rows, f"{stage}{key}.{name}") for name in names))
            for stage in ("base", "zero", "r1")
            for key, how in (("", ", temperature 1"), (".eval", ", evaluated"))]
    return table(("held-out problems", *names), [b for b in body if any(b[1:])])


def times(rows):
    """Minutes by stage: to train it, for the samples it learns from, and for its tests."""
    body = [(stage, *(cell(rows, f"minutes.{part}{stage}") for part in ("", "collect_", "test_")))
            for stage in (*TEACHER, *STUDENTS) if f"minutes.{stage}" in rows]
    paper = ("The paper's cost, in thousands of H800-hours: R1-Zero 101, SFT data 5, R1 41 (R1 v2 "
             "Table 7).")
    lines = table(("stage", "training", "samples", "tests"), [
        *body, ("in all", cell(rows, "minutes"), "", "")])
    return body and [*lines, "", f"Memory: {cell(rows, 'peak_gib')} GiB. {paper}"]


def objectives(rows):
    """What each objective makes of the same bases."""
    columns = ("pass@1", "eval.pass@1", "cons@16", "length", "reflection", "mixing", "steps_to_85")
    names = [name for name in OBJECTIVES if f"objective.{name}.pass@1" in rows]
    return table(("objective", *columns), [(name, *(
        cell(rows, f"objective.{name}.{column}") for column in columns))
        for name in names if len(names) > 1])


def bases(rows):
    """What each seed's base can do at temperature 1, by number of operations."""
    levels = [f"level{n}" for n in range(1, 10) if f"base.level{n}" in rows]
    names = ["pass@1", *levels, *(f"checked.{level}" for level in levels)]
    head = [name.replace(".level", " ").removeprefix("level") for name in names]
    return table(("seed", *head), [(seed, *(
        f"{values[seed]:.2f}" if seed in values else "-" for values in (
            per_seed(rows, f"base.{name}") for name in names)))
        for seed in per_seed(rows, "base.pass@1")])


# -------------------------------------------------------------------------------------------------
# The page


STUDIES = {"threshold": "From which base on RL works", "compute": "Test-time compute",
           "baseline": "Baselines", "program": "Programs: a share of the tests, or all",
           "scale": "Under load"}


def studied(target):
    """{title: lines} of the studies whose reports lie beside the target's, as they are, and of
    which seeds and commit they are."""
    found = {}
    for name, title in STUDIES.items():
        if (path := target.parent / name / "report.md").exists():
            text = path.read_text("utf-8").replace("](figures/", f"](../{name}/figures/")
            found[title] = re.sub("^#", "##", text, flags=re.MULTILINE).splitlines()[2:]
            summary = json.loads((target.parent / name / "summary.json").read_text("utf-8"))
            found[title][1:1] = ["", f"Seeds {', '.join(map(str, summary['seeds']))}, commit "
                                 f"{summary['commit']}."]
    return found


def page(command, rows, curves, target):
    """The lines of report.md; a section without figures is left out."""
    figures = [(f"`{key}`", f"{r['mean']:.4g} ± {r['std']:.2g}",
                " ".join(f"{x:.4g}" for x in r["per_seed"].values())) for key, r in rows.items()]
    sections = {
        "Base and R1-Zero": story(rows), "The climb, on dev": climb(curves),
        "The stages": stages(rows), "The language reward": language(rows, curves),
        "Distillation and RL on a small model": students(rows),
        "Accuracy by number of answers": votes(rows),
        **(studied(target) if "r1.pass@1" in rows else {}),
        "Minutes": times(rows),
        "The objectives": objectives(rows),
        "The bases, by seed and number of operations": bases(rows),
        "Plots": draw(target, curves, rows),
        "All figures": table(("figure", "mean ± std", "by seed"), figures)}
    lines = ["# Report", "", f"`{command}`", ""]
    for title, body in sections.items():
        if body:
            lines += [f"## {title}", "", *body, *verdicts(rows, title), ""]
    return "\n".join(lines)


def brief(rows):
    """What is printed at the end of a run."""
    taught = [f"{what} {cell(rows, f'{STUDENTS[stage]}.pass@1')}" for stage, what, _ in TAUGHT
              if f"{STUDENTS[stage]}.pass@1" in rows]
    spent = {stage: sum(fmean(per_seed(rows, f"minutes.{part}{stage}").values() or [0.0])
                        for part in ("", "collect_", "test_")) for stage in (*TEACHER, *STUDENTS)}
    spent = [f"{stage} {x:.1f}" for stage, x in spent.items() if x]
    spent += [f"in all {cell(rows, 'minutes')}"] if "minutes" in rows else []
    beside = [line[:line[:-1].rindex("|") + 1] for line in story(rows)]  # for the console: no paper
    parts = [beside, stages(rows, SHORT, levels=False)] + [
        textwrap.wrap(f"{title}: {', '.join(items)}", 98)
        for title, items in (("pass@1 of the student", taught), ("minutes", spent)) if items]
    return "\n\n".join("\n".join(part) for part in parts if part)


def report(paths, to=None):
    """Writes report.md and report.html (with `to`, there, and summary.json, curves.json and the
    first run's samples.md) of runs, each a PATH or NAME=PATH; returns what a run prints at its
    end."""
    accounts = [account(path) for path in paths]
    rows, curves = over_seeds(accounts), curves_of(accounts)
    command = f"python r1mini.py report {' '.join(map(str, paths))}" + (f" --to {to}" if to else "")
    said = brief(rows)
    for a in accounts:
        write_samples(a.path)
    if to or len(paths) == 1:
        target = Path(to or accounts[0].path)
        target.mkdir(parents=True, exist_ok=True)
        webpage.publish(page(command, rows, curves, target), target)
        said += f"\n\nmore: {target / 'report.html'}, and as text {target / 'report.md'}"
    if to:
        machines = {f"{a.config['machine']}, {a.config['threads']} threads, torch "
                    f"{a.config['versions']['torch']}" for a in accounts}
        summary = {"command": command, "commit": commit(), "machine": "; ".join(sorted(machines)),
                   "seeds": sorted({int(a.seed) for a in accounts}), "metrics": rows}
        (target / "summary.json").write_text(json.dumps(summary, indent=1), "utf-8")
        (target / "curves.json").write_text(json.dumps(curves), "utf-8")
        shutil.copy(Path(accounts[0].path) / "samples.md", target)
    return said


def write_samples(path):
    """samples.md of a run: the same held-out problems answered by each stage."""
    lines = ["# The same held-out problems, stage by stage", ""]
    records = [r for r in read_log(path) if r["kind"] == "samples"]
    for i in range(len(records[0]["answers"]) if records else 0):
        question, answer, _ = records[0]["answers"][i]
        a_sum = tasks.INTEGER.fullmatch(answer)  # or a general prompt
        lines += [f"## {question}" + f" (answer {answer})" * bool(a_sum), ""]
        for r in records:
            text = r["answers"][i][2]
            right = tasks.accuracy(text, tasks.Problem(question, answer, ""))
            verdict = f", {'right' if right else 'wrong'}" if a_sum else ""
            lines.append(f"- **{r['stage']}, step {r['step']}**{verdict}: `{text}`")
        lines.append("")
    (Path(path) / "samples.md").write_text("\n".join(lines), "utf-8")


def commit():
    """The commit this runs from, with + if files differ from it; empty outside a clone."""
    try:
        run = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True,
                             cwd=Path(__file__).parent, text=True)
        return run.stdout.strip()
    except OSError:
        return ""


def main(options):
    """The command report."""
    print(report(options.runs, options.to))
    return 0
