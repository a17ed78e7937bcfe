"""report: the numbers of finished runs, and the paper's tables in miniature.

    for each folder        its own figures, from log.jsonl and timing.jsonl: an Account
    for each seed          the folders together, and what takes two of them (win rates, ratios)
    over seeds             mean and deviation of each figure: summary.json
    for each paper table   the same in miniature, and whether it agrees: report.md

summary.json is written here and by tools/study.py, always from the logs of runs:
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
from engine.errors import UserError
from engine.folder import read_log
from grpo import RL
from moe import Config
from r1mini import ABLATIONS
from tools import pages
from tools.cost import in_products
from tools.figures import draw
from tools.tables import (
    CURVES,
    SHORT,
    STUDENTS,
    TAUGHT,
    TEACHER,
    TESTED,
    bases,
    cell,
    climb,
    language,
    objectives,
    per_seed,
    stages,
    story,
    students,
    table,
    times,
    verdicts,
    votes,
)

UPDATES = ("entropy", "dead_groups", "expert_load")  # of RL's steps, not of evaluations on dev

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
    """Writes report.md (with `to`, there, and summary.json, curves.json and the
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
        (target / "report.md").write_text(page(command, rows, curves, target), "utf-8")
        said += f"\n\nmore: {target / 'report.md'}"
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
    if options.pages:
        changed = pages.write_pages()
        print("written anew: " + ", ".join(changed) if changed else "all pages are up to date")
        return 0
    if not options.runs:
        raise UserError("report: name runs, such as runs/nano, or give --pages")
    print(report(options.runs, options.to))
    return 0
