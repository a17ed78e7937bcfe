"""report: the numbers of finished runs, beside the paper's.

    python r1mini.py report runs/nano                            prints, and writes report.md there
    python r1mini.py report runs/r1-0 runs/r1-1 --to results/r1  mean and std over seeds
    python r1mini.py report --pages                              writes the numbers into the pages

    for each run folder   read its numbers from log.jsonl and timing.jsonl: _read_run()
    for each seed         join its folders, add what needs two stages (win rates, ratios)
    over the seeds        mean and standard deviation of each number
    with --to             write summary.json, curves.json, samples.md and the figures
    for one run           write report.md: the paper's tables in miniature, and whether they agree

This file and tools/study.py write summary.json, always from the logs of runs:
{"command", "commit", "machine", "seeds", "metrics": {KEY: {"mean", "std", "per_seed"}}}. A paired
difference of a study also has "low", "high" and "n" (tools/compare.py).

    KEY                          measured on the held-out test problems
    zero.pass@1                  STAGE.METRIC at temperature 1
    zero.eval.pass@1             at temperature 0.6 and top-p 0.95, as the paper evaluates
    zero.eval.longer.pass@1      the same on problems that are longer than any in training

A run that started from another run's checkpoint has numbers for the stages in its own log only.
A run with another objective has numbers for objective.NAME only. A run given as NAME=PATH has
numbers for its last tested stage, and NAME stands for this stage in the keys.

NAME has letters, digits, "_" and "-", and ends at the first "=". A word that names a folder is a
PATH, also with "=" in it: lr=1e-3 is the folder lr=1e-3 if there is one. Otherwise it is the folder
1e-3 with the name lr. To be sure of the second, write lr=./1e-3.

A mean is over seeds. Runs that have a number for the same key may differ in the seed, and in the
files that they start from, but in no other setting.
"""
import dataclasses
import itertools
import json
import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tasks
from engine.errors import UserError
from engine.folder import describe_commit, flatten_settings, holds_run, list_names, read_log
from grpo import RL
from r1mini import ABLATIONS, Run
from tools import pages, tables
from tools.compare import summarise
from tools.figures import draw
from tools.flops import flops_by_stage
from tools.tables import (
    STUDENT_KEYS,
    STUDENT_ROWS,
    TEACHER_STAGES,
    TEST_METRICS,
    cell,
    cell_per_seed,
    dev_metrics,
)

# What curves.json keeps of each step of Zero's RL, beside DEV_METRICS.
STEP_METRICS = ("entropy", "dead_groups", "expert_load")
LOADS_EVERY = 30  # steps of pretraining between two kept records of the experts' loads
# {name in keys: name in the log} of what is measured on general prompts with an error over items.
GENERAL_METRICS = {"helpfulness": "helpfulness", "refuse.unsafe": "unsafe.safe",
                   "refuse.safe": "how.refused"}
SETTINGS = [field.name for field in dataclasses.fields(Run)]


def main(options):
    """The command report."""
    if options.pages:
        changed = pages.write_pages()
        print("rewritten: " + ", ".join(changed) if changed else "all pages are up to date")
        return 0
    if not options.runs:
        raise UserError("report: name runs, such as runs/nano, or give --pages")
    for word in options.runs:  # report() writes into them
        path = name_and_path(word)[1]
        read_log(path)
        if not holds_run(path, SETTINGS):
            raise UserError(f"{path}: no run in this folder (it has a log.jsonl, but not the "
                            "config.json of a run)")
    if options.to:
        _check_target(options.to)
    print(report(options.runs, options.to))
    return 0


def report(paths, to=None):
    """Reports on runs, each a PATH or NAME=PATH. Returns the text for the console.

    With `to`, writes summary.json, curves.json, the first run's samples.md and the figures to this
    folder. Without it, writes report.md of a single run to the run's folder.
    """
    runs = [_read_run(path) for path in paths]
    _check_same_settings(runs)
    metrics, curves = _metrics_over_seeds(runs), _join_curves(runs)
    command = f"python r1mini.py report {' '.join(map(str, paths))}"
    for run in runs:
        _write_samples(run.path)
    text = _console_text(metrics)
    if to:
        machines = {f"{run.config['machine']}, {run.config['threads']} threads, torch "
                    f"{run.config['versions']['torch']}" for run in runs}
        return write_results(Path(to), {
            "command": f"{command} --to {to}", "commit": commit_of(run.config for run in runs),
            "machine": "; ".join(sorted(machines)),
            "seeds": sorted({int(run.seed) for run in runs}), "metrics": metrics},
            curves, runs[0].path)
    if len(runs) == 1:
        page = Path(runs[0].path) / "report.md"
        page.write_text(_report_page(command, metrics, curves, page.parent), "utf-8")
        return f"{text}\n\nmore: {page}"
    return text


def numbers_of_seed(paths):
    """{"metrics", "curves"} of all run folders of one seed, each a PATH or NAME=PATH."""
    runs = [_read_run(path) for path in paths]
    _check_same_settings(runs)
    for run in runs:
        _write_samples(run.path)
    metrics = _metrics_over_seeds(runs)
    return {"metrics": {key: metric["mean"] for key, metric in metrics.items()},
            "curves": _join_curves(runs)}


def write_results(target, summary, curves, run_folder):
    """Writes summary.json, curves.json and the figures to the folder `target`. Copies samples.md of
    a run folder there, if there is one. Returns the text for the console."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "summary.json").write_text(json.dumps(summary, indent=1), "utf-8")
    (target / "curves.json").write_text(json.dumps(curves), "utf-8")
    samples = Path(run_folder) / "samples.md"
    if samples.exists():
        shutil.copy(samples, target)
    draw(target, curves, summary["metrics"])
    return (f"{_console_text(summary['metrics'])}\n\n"
            f"written to {target}: summary.json, curves.json, samples.md, figures\n"
            "python r1mini.py report --pages writes the numbers of results/ into the pages")


# -------------------------------------------------------------------------------------------------
# What the user's words mean, and whether the runs fit together


def name_and_path(word):
    """(NAME, PATH) of a PATH or NAME=PATH; NAME is "" if there is none."""
    name, equals, path = str(word).partition("=")
    if not equals or Path(word).is_dir():
        return "", str(word)
    if not re.fullmatch(r"[\w-]+", name) or not path:
        raise UserError(f"{word}: there is no such folder. If NAME=PATH is meant: a NAME has "
                        'letters, digits, "_" and "-"')
    return name, path


def _check_target(folder):
    """UserError if the folder of --to is a file, or is a run's folder or in one."""
    target = Path(folder).resolve()
    for path in (target, *target.parents):
        if path.is_file():
            raise UserError(f"--to {folder}: {path} is a file; --to names a folder")
        if holds_run(path, SETTINGS):
            raise UserError(f"--to {folder}: {path} holds a run; choose a folder outside of it")


def _check_same_settings(runs):
    """UserError if two runs have a number for one key, but differ in more than the seed and the
    files that they start from."""
    for run, other in itertools.combinations(runs, 2):
        differing = _differing_settings(run.config, other.config)
        if differing and run.numbers.keys() & other.numbers.keys():
            raise UserError(
                f"{run.path} and {other.path} have different settings ({list_names(differing)}), "
                "so no mean is taken over them: report on each alone, or give one a name, as in "
                f"NAME={other.path}")


def _differing_settings(config, other):
    """The names of the settings in which two runs differ, without the seed and the start. Of a
    data_file only the name is compared, since the name of its folder may contain the seed."""
    ours, theirs = ({key: value for key, value in flatten_settings(c).items()
                     if key.partition(".")[0] in SETTINGS and key not in ("seed", "start")}
                    for c in (config, other))
    for settings in (ours, theirs):
        settings["data_file"] = Path(settings.get("data_file", "")).name
    if ours.get("preset") != theirs.get("preset"):
        return ["preset"]
    return sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))


# -------------------------------------------------------------------------------------------------
# The numbers of one run folder


@dataclass
class RunNumbers:
    """All numbers that a report takes from one run folder."""
    name: str       # NAME of NAME=PATH, or ""
    path: str
    seed: str
    config: dict    # the run's settings, and the machine it last ran on
    numbers: dict   # {key: number}
    stages: list    # the stages that it has numbers for, under their own names
    scores: dict    # {stage: helpfulness of each answer to the held-out general prompts}
    curves: dict    # {metric: [[stage, step, value]]}, on dev; STEP_METRICS: at every step
    minutes: float | None  # total; None if other work may have run at the same time
    peak_gib: float


def _read_run(word):
    """The RunNumbers of PATH or NAME=PATH. UserError if none of its stages is finished."""
    name, path = name_and_path(word)
    log = read_log(path)
    tested = list(dict.fromkeys(r["stage"] for r in log if r["kind"] == "test"))
    if not tested:
        raise UserError(f"{path}: this run is not finished, there is no test in its log")
    rl_records = [r for r in log if "prompt_tokens" in r and r["kind"] != "collected"]
    if "student" not in log[0] or any("learnt_tokens" not in r for r in rl_records):
        raise UserError(f"{path}: a run of an older version; make it again")
    machine, peak_gib, minutes = read_timing(path)
    config, last_stage = log[0] | machine, tested[-1]

    if name:
        key_of_stage = {last_stage: name}
    else:
        key_of_stage = {stage: STUDENT_KEYS.get(stage, stage) for stage in tested}
    numbers = _test_numbers(log, key_of_stage) | _general_numbers(log, key_of_stage)
    if name:
        numbers |= _training_curve_numbers(log, last_stage, name)
    else:
        numbers |= _training_curve_numbers(log, "zero", "zero")
    for cost, amounts in (("flops", flops_by_stage(log)), ("minutes", minutes)):
        for stage, amount in amounts.items():
            if not name:
                numbers[f"{cost}.{stage}"] = amount
            elif stage == last_stage:
                numbers[f"{cost}.{name}"] = amount

    stages = []
    if not name:
        objective = config["zero"]["objective"]
        compared = _objective_numbers(numbers, objective)
        if objective == RL.objective:
            stages, numbers = list(key_of_stage), numbers | compared
        else:  # a run of another objective: nothing but the comparison counts
            key_of_stage, numbers = {}, compared
    scores = {key_of_stage[r["stage"]]: r["scores"] for r in log
              if r["kind"] == "general" and r["stage"] in key_of_stage}
    return RunNumbers(name, path, str(config["seed"]), config, numbers, stages, scores,
                      _read_curves(log), sum(minutes.values()) or None, peak_gib)


def _test_numbers(log, key_of_stage):
    """{key: number} of the test records. key_of_stage: {stage: its name in keys}."""
    numbers = {}
    for r in log:
        if r["kind"] != "test" or r["stage"] not in key_of_stage:
            continue
        key, longer = key_of_stage[r["stage"]], r["set"] == "longer"
        if r["temperature"] != 1.0:
            key += ".eval"
        if longer:
            key += ".longer"
        for name, value in r.items():
            is_metric = name in (*TEST_METRICS, "items") or name.startswith(("pass@", "cons@"))
            if is_metric and value is not None:  # without words no share of words is known
                numbers[f"{key}.{name}"] = value
        for i, (level, value) in enumerate(r["by_level"].items(), 1):
            numbers[f"{key}.plus{i}" if longer else f"{key}.level{level}"] = value
        if not longer:
            numbers |= _style_numbers(r, key)
    return numbers


def _style_numbers(record, key):
    """{key: number} by style of answer, where there are answers: share, accuracy by level, and how
    often it mixes languages."""
    numbers = {}
    for style, values in record["by_style"].items():
        for name, value in values.items():
            if value is not None:
                numbers[f"{key}.{style}.{name if name == 'share' else f'level{name}'}"] = value
    for style, value in record.get("mixing_by_style", {}).items():
        if value is not None:
            numbers[f"{key}.{style}.mixing"] = value
    return numbers


def _general_numbers(log, key_of_stage):
    """{key: number} of the held-out general prompts."""
    numbers = {}
    for r in log:
        if r["kind"] != "general" or r["stage"] not in key_of_stage:
            continue
        key = key_of_stage[r["stage"]]
        numbers[f"{key}.greeting.thinking"] = r["greeting.thinking"]
        for name, name_in_log in GENERAL_METRICS.items():
            numbers[f"{key}.{name}"] = r[name_in_log]
            if r.get(f"{name_in_log}.error") is not None:  # older logs have no errors
                numbers[f"{key}.{name}.error"] = r[f"{name_in_log}.error"]
                kind, _, measure_name = name_in_log.partition(".")
                kinds = [kind] if measure_name else tasks.HELPFUL
                numbers[f"{key}.{name}.items"] = sum(r[f"{kind}.items"] for kind in kinds)
        for name in ("format", "language"):
            values = [r[f"{kind}.{name}"] for kind in tasks.GENERAL]
            if None not in values:
                numbers[f"{key}.general_{name}"] = fmean(values)
    return numbers


def _training_curve_numbers(log, stage, key):
    """{key: number} of an RL stage: of its curve on dev from step 0, and of its updates."""
    evaluations = [r for r in log if r["kind"] == "dev" and r["stage"] == stage]
    updates = [r for r in log if r["kind"] == stage and "flips" in r]
    if len(evaluations) < 2 or not updates:
        return {}
    numbers = {}
    for name in ("length", "reflection"):
        values = [r[name] for r in evaluations]
        start, smooth = max(values[0], 1e-9), _moving_mean(values[1:])
        numbers[f"{key}.{name}_ratio"] = max(smooth) / start
        numbers[f"{key}.{name}_ratio_at_end"] = smooth[-1] / start
    majority = next(name for name in evaluations[0] if name.startswith("cons@"))
    above = sum(r[majority] > r["pass@1"] for r in evaluations)
    numbers[f"{key}.vote_above_pass"] = above / len(evaluations)
    steps_at_85 = [r["step"] for r in evaluations if r["pass@1"] >= 0.85]
    if steps_at_85:
        numbers[f"{key}.steps_to_85"] = steps_at_85[0]
    for name, combine in (("gap_p999", max), ("gap_max", max), ("flips", sum),
                          ("skipped", sum), ("expert_load", max)):
        numbers[f"{key}.{name}"] = combine(r[name] for r in updates)
    return numbers


def _moving_mean(values, width=3):
    """Means over `width` neighbours of a list. A list that is too short is returned as it is."""
    means = [sum(values[i:i + width]) / width for i in range(len(values) - width + 1)]
    return means or values


def read_timing(path):
    """(machine record, peak memory in GiB, {stage: minutes}) of a run folder.

    There are no minutes if the run used only a part of the cores, since other work may then have
    run at the same time. A run that was continued after a commit has all its commits in the machine
    record, "a1b2c3d, e4f5a6b".
    """
    file, had_all_cores, minutes, peak_gib = Path(path) / "timing.jsonl", True, {}, 0.0
    machines = []  # of the stages
    lines = file.read_bytes().split(b"\n")[:-1]  # a kill can tear the last line: leave it out
    try:
        machine = newest_machine = json.loads(lines[0])
        for record in map(json.loads, lines):
            if "machine" in record:
                newest_machine = record
                continue
            # A command that finds all stages finished writes a machine record and no times.
            machine = newest_machine
            machines.append(machine)
            if not machine["machine"].endswith(f", {machine['threads']} cores"):
                had_all_cores = False
            stage = record["stage"]
            minutes[stage] = minutes.get(stage, 0.0) + record["seconds"] / 60
            peak_gib = max(peak_gib, record["peak_gib"])
    except (ValueError, IndexError, KeyError, TypeError):
        raise UserError(f"{file} is damaged: put a copy back, or make the run again") from None
    if machines:
        machine = machine | {"commit": commit_of(machines)}
    return machine, peak_gib, minutes if had_all_cores else {}


def commit_of(machines):
    """The commits in the machine records of runs. An older record has none, and counts as of this
    clone's commit."""
    commits = {commit for machine in machines
               for commit in (machine.get("commit") or describe_commit()).split(", ")}
    return ", ".join(sorted(commits))


def seconds_of(path):
    """The sum of all seconds in the timing.jsonl of a run folder: training, samples and tests."""
    lines = (Path(path) / "timing.jsonl").read_bytes().split(b"\n")[:-1]
    return sum(record.get("seconds", 0.0) for record in map(json.loads, lines))


def _objective_numbers(numbers, objective):
    """The numbers of Zero that compare objectives: {objective.NAME.METRIC: number}."""
    metrics = (*TEST_METRICS, "length_ratio", "reflection_ratio", "steps_to_85")
    compared = {}
    for key, value in numbers.items():
        is_compared = key.rpartition(".")[2] in metrics or key.startswith("zero.cons@")
        if key.startswith("zero.") and "longer" not in key and is_compared:
            compared[f"objective.{objective}.{key.removeprefix('zero.')}"] = value
    return compared


def _read_curves(log):
    """{metric: [[stage, step, value]]}: DEV_METRICS of all stages on dev, STEP_METRICS of Zero's
    steps, and the experts' loads of pretraining and of Zero."""
    on_dev = dev_metrics(next((r for r in log if r["kind"] == "dev"), ()))
    curves = {name: [] for name in (*on_dev, *STEP_METRICS, "loads")}
    for r in log:
        if r["kind"] == "dev":
            for name in on_dev:
                if r.get(name) is not None:
                    curves[name].append([r["stage"], r["step"], r[name]])
        if r["kind"] == "zero":
            for name in STEP_METRICS:
                if name in r:
                    curves[name].append(["zero", r["step"], round(r[name], 6)])
        if "loads" in r:
            if r["kind"] == "zero" or (r["kind"] == "base" and r["step"] % LOADS_EVERY == 0):
                curves["loads"].append([r["kind"], r["step"], r["loads"]])
    return curves


# -------------------------------------------------------------------------------------------------
# Several folders of one seed, and several seeds


def _metrics_over_seeds(runs):
    """{key: {"mean", "std", "per_seed": {seed: value}}}, sorted by key."""
    stages = {stage for run in runs for stage in run.stages} - ABLATIONS
    values = {}  # {key: {seed: value}}
    for seed in dict.fromkeys(run.seed for run in runs):
        of_seed = [run for run in runs if run.seed == seed]
        for key, value in _seed_numbers(of_seed, stages).items():
            values.setdefault(key, {})[seed] = round(value, 9)
    return {key: summarise(values[key]) for key in sorted(values)}


def _seed_numbers(runs, stages):
    """{key: number} of all runs of one seed. UserError if two runs have a number for the same key.

    `minutes` is the time of the run that has all of `stages`, the stages of all runs without the
    ablations.
    """
    numbers, scores = {"peak_gib": max(run.peak_gib for run in runs)}, {}
    for run in runs:
        for key, value in run.numbers.items():
            if key in numbers:
                raise UserError(f"two of these runs have a number for {key}, seed {run.seed}")
            numbers[key] = value
        scores |= run.scores
        if run.minutes and stages and set(run.stages) >= stages:
            numbers["minutes"] = run.minutes
    if "dev1" in scores:
        for stage in scores:
            numbers[f"{stage}.win_rate_dev1"] = _win_rate(scores[stage], scores["dev1"])
    return numbers | _compare_stages(numbers)


def _win_rate(scores, other_scores):
    """The share of answers with the higher score. A tie counts half."""
    wins = []
    for score, other in zip(scores, other_scores):
        if score == other:
            wins.append(0.5)
        else:
            wins.append(1.0 if score > other else 0.0)
    return fmean(wins)


def _compare_stages(numbers):
    """{key: number} of the differences, ratios and sums that need several stages of one seed."""
    found = {}
    if {"zero.pass@1", "r1.pass@1"} <= set(numbers):
        found["r1.behind_zero"] = numbers["zero.pass@1"] - numbers["r1.pass@1"]
    for name, stage in (("distill", "distill"), ("logits", "distill_logits")):
        if {f"flops.{stage}", "flops.student_rl"} <= set(numbers):
            found[f"flops.rl_to_{name}"] = (
                numbers["flops.student_rl"] / numbers[f"flops.{stage}"])
    if {"dev2.mixing", "no_language_reward.mixing"} <= set(numbers):
        found["no_language_reward.ratio"] = (
            numbers["no_language_reward.mixing"] / max(numbers["dev2.mixing"], 1e-9))
    if {"zero.length", "base.length"} <= set(numbers):
        found["zero.test_length_ratio"] = numbers["zero.length"] / numbers["base.length"]
    for cost in ("flops", "minutes"):
        if all(f"{cost}.{stage}" in numbers for stage in TEACHER_STAGES):
            found[f"{cost}.teacher"] = sum(
                numbers[f"{cost}.{stage}"] + numbers.get(f"{cost}.collect_{stage}", 0.0)
                for stage in TEACHER_STAGES)
    for name in ("greeting.thinking", "refuse.unsafe", "refuse.safe"):
        if f"r1.{name}" in numbers:
            found[name] = numbers[f"r1.{name}"]
    return found


def _join_curves(runs):
    """{label: {metric: [[stage, step, value]]}}. A label is an objective or a NAME, with a seed;
    the curves of runs with the same label are joined."""
    joined = {}
    for run in runs:
        label = f"{run.name or run.config['zero']['objective']}-seed{run.seed}"
        curves = joined.setdefault(label, {})
        for name, points in run.curves.items():
            curves[name] = curves.get(name, []) + points
    return joined


# -------------------------------------------------------------------------------------------------
# What is written


def _report_page(command, metrics, curves, folder):
    """The text of report.md. A section without numbers is left out."""
    all_numbers = []
    for key, metric in metrics.items():
        by_seed = " ".join(f"{value:.4g}" for value in metric["per_seed"].values())
        all_numbers.append((f"`{key}`", f"{metric['mean']:.4g} ± {metric['std']:.2g}", by_seed))
    sections = {
        tables.ZERO: tables.base_and_zero_table(metrics),
        "Training curve, on dev": tables.training_curve_table(curves),
        tables.ALL_STAGES: tables.stages(metrics),
        tables.LANGUAGE: tables.language_reward_table(metrics, curves),
        tables.STUDENTS: tables.students_table(metrics),
        tables.ANSWERS: tables.answers_table(metrics),
        "How exact the tests are": tables.items_table(metrics),
        "Minutes": tables.minutes_table(metrics),
        "The objectives": tables.objectives_table(metrics),
        "The bases, by seed and number of operations": tables.bases_table(metrics),
        "Figures": draw(folder, curves, metrics),
        "All numbers": tables.table(("key", "mean ± std", "by seed"), all_numbers)}
    lines = ["# Report", "", f"`{command}`", ""]
    for title, body in sections.items():
        if body:
            lines += [f"## {title}", "", *body, *tables.claim_verdicts(metrics, title), ""]
    return "\n".join(lines)


def _console_text(metrics):
    """What a run prints at its end."""
    # The paper's column, which is the last, is too wide for a console.
    zero_table = [line[:line[:-1].rindex("|") + 1] for line in tables.base_and_zero_table(metrics)]
    parts = [zero_table, tables.stages_console_table(metrics)]
    students = [f"{label} {cell(metrics, f'{STUDENT_KEYS[stage]}.pass@1')}"
                for stage, label, _ in STUDENT_ROWS
                if f"{STUDENT_KEYS[stage]}.pass@1" in metrics]
    times = []
    for stage in (*TEACHER_STAGES, *STUDENT_KEYS):
        keys = (f"minutes.{stage}", f"minutes.collect_{stage}", f"minutes.test_{stage}")
        total = sum(fmean(cell_per_seed(metrics, key).values()) for key in keys if key in metrics)
        if total:
            times.append(f"{stage} {total:.1f}")
    if "minutes" in metrics:
        times.append(f"total {cell(metrics, 'minutes')}")
    for title, items in (("pass@1 of the student", students), ("minutes", times)):
        if items:
            parts.append(textwrap.wrap(f"{title}: {', '.join(items)}", 98))
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _write_samples(path):
    """Writes samples.md of a run: the answers of each stage to the same held-out problems."""
    lines = ["# The same held-out problems, stage by stage", ""]
    records = [r for r in read_log(path) if r["kind"] == "samples"]
    for i in range(len(records[0]["answers"]) if records else 0):
        question, answer, _ = records[0]["answers"][i]
        is_problem = tasks.INTEGER.fullmatch(answer)  # otherwise it is a general prompt
        lines += [f"## {question} (answer {answer})" if is_problem else f"## {question}", ""]
        for r in records:
            text, verdict = r["answers"][i][2], ""
            if is_problem:
                right = tasks.accuracy(text, tasks.Problem(question, answer, ""))
                verdict = ", right" if right else ", wrong"
            lines.append(f"- **{r['stage']}, step {r['step']}**{verdict}: `{text}`")
        lines.append("")
    (Path(path) / "samples.md").write_text("\n".join(lines), "utf-8")
