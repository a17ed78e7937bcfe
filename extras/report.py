"""report: the numbers of finished runs, and the paper's tables in miniature.

summary.json is written here and nowhere else, always from the logs of runs:
{"command", "commit", "machine", "seeds", "metrics": {KEY: {"mean", "std", "per_seed"}}}. Keys are
stage.metric (zero.pass@1) at temperature 1, the policy as it is; stage.eval.metric as R1 was
evaluated (temperature 0.6, top-p 0.95); stage.eval.longer.metric so on problems longer than any in
training.
"""
import json
import subprocess
from pathlib import Path

import tasks
from extras.folder import read_log
from grpo import OBJECTIVES
from moe import UserError

TESTED = ("pass@1", "cons@16", "length", "reflection", "correction", "mixing", "language", "format",
          "cut_off")
CURVES = ("pass@1", "cons@16", "length", "reflection", "correction", "mixing")


def moving_mean(curve, width=3):
    """Means over `width` neighbours of a list."""
    return [sum(curve[i:i + width]) / width for i in range(len(curve) - width + 1)] or curve


def of_tests(log):
    """Figures of the held-out test records of a log, by key."""
    out = {}
    for r in (r for r in log if r["kind"] == "test"):
        longer = r["set"] == "longer"
        key = r["stage"] + ".eval" * (r["temperature"] != 1.0) + ".longer" * longer
        out |= {f"{key}.{name}": r[name] for name in TESTED if name in r}
        for i, (level, x) in enumerate(r["by_level"].items(), 1):
            out[f"{key}.plus{i}" if longer else f"{key}.level{level}"] = x
        if not longer:
            out |= {f"{key}.{style}.{n if n == 'share' else f'level{n}'}": x for style, row in
                    r["by_style"].items() for n, x in row.items() if x is not None}
    return out


def of_climb(log):
    """Figures of zero's curve on dev, from its base at step 0, and of its updates, by key."""
    climb = [r for r in log if r["kind"] == "dev" and r["stage"] == "zero"]
    updates, out = [r for r in log if r["kind"] == "zero"], {}
    if len(climb) < 2 or not updates:
        return {}
    for name in ("length", "reflection"):
        values = [r[name] for r in climb]
        smooth, first = moving_mean(values[1:]), max(values[0], 1e-9)
        out[f"zero.{name}_ratio"] = max(smooth) / first
        out[f"zero.{name}_ratio_at_end"] = smooth[-1] / first
    vote = next(k for k in climb[0] if k.startswith("cons@"))
    out["zero.vote_above_pass"] = sum(r[vote] > r["pass@1"] for r in climb) / len(climb)
    reached = [r["step"] for r in climb if r["pass@1"] >= 0.85]
    out |= {"zero.steps_to_85": reached[0]} if reached else {}
    return out | {"zero.gap_p999": max(r["gap_p999"] for r in updates),
                  "zero.gap_max": max(r["gap_max"] for r in updates),
                  "zero.flips": sum(r["flips"] for r in updates),
                  "zero.skipped": sum(r["skipped"] for r in updates),
                  "zero.expert_load": max(r["expert_load"] for r in updates)}


def metrics(path):
    """(config, figures by key, dev curves by name) of one run folder."""
    log = read_log(path)
    config, out = log[0], of_tests(log) | of_climb(log)
    if not out:
        raise UserError(f"{path}: this run is not finished, there is no test in its log")
    lines = (Path(path) / "timing.jsonl").read_text("utf-8").splitlines()
    machines = [json.loads(line) for line in lines if "machine" in line]
    timing = [json.loads(line) for line in lines if "seconds" in line]
    objective = {f"objective.{config['zero']['objective']}.{k.removeprefix('zero.')}": v
                 for k, v in out.items() if k.startswith("zero.") and "longer" not in k
                 and k.rsplit(".", 1)[1] in (*TESTED, "length_ratio", "reflection_ratio",
                                             "steps_to_85")}
    if {"zero.length", "base.length"} <= set(out):
        out["zero.test_length_ratio"] = out["zero.length"] / out["base.length"]
    if config["start"]:  # a run from another's base speaks for its objective only
        out = objective
    else:
        out |= objective | {"peak_gib": max(t["peak_gib"] for t in timing)}
        if machines[-1]["machine"].endswith(f", {machines[-1]['threads']} cores"):
            # Times of a run that had the machine to itself, as far as its threads can tell.
            out["minutes"] = sum(t["seconds"] for t in timing) / 60
            for stage in {t["stage"] for t in timing}:
                out[f"minutes.{stage}"] = sum(
                    t["seconds"] for t in timing if t["stage"] == stage) / 60
    curves = {name: [[r["stage"], r["step"], r[name]] for r in log if r["kind"] == "dev"
                     and name in r] for name in CURVES}
    return config | machines[-1], out, curves


# What a reader wants to know first: its name, its key, and what the paper saw in R1-Zero.
STORY = (("right at the first try (pass@1)", "pass@1", "AIME 15.6% to 71.0% (v1), 77.9% (Nature)"),
         ("right by majority of 16 (cons@16)", "cons@16", "AIME 86.7%"),
         ("tokens in an answer", "length", "hundreds to thousands"),
         ("answers that check themselves", "reflection", "reflective words 5 to 7 times"),
         ("answers that stop and mend a step", "correction", '"wait" rises late'),
         ("answers that mix languages", "mixing", "seen, not counted"),
         ("pass@1, one step longer than any learnt", "longer.plus1", ""),
         ("pass@1, two steps longer", "longer.plus2", ""))


def story(rows):
    """The lines of a table: base and zero on held-out problems, beside the paper."""
    def cell(key):
        if key not in rows:
            return ""
        digits = 1 if rows[key]["mean"] > 10 else 3
        spread = f" ± {rows[key]['std']:.{digits}f}" if len(rows[key]["per_seed"]) > 1 else ""
        return f"{rows[key]['mean']:.{digits}f}{spread}"
    lines = ["| held-out problems | base | zero | base, evaluated | zero, evaluated | paper |",
             "|---" * 6 + "|"]
    return lines + [f"| {name} | " + " | ".join(
        cell(f"{stage}.{key}") for stage in ("base", "zero", "base.eval", "zero.eval"))
        + f" | {paper} |" for name, key, paper in STORY]


def climb(curves):
    """The lines of a table: dev at temperature 1 against the RL step, means over runs."""
    columns = {}
    for curve in curves:
        for name, points in curve.items():
            for stage, step, value in points:
                if stage == "zero":
                    columns.setdefault(step, {}).setdefault(name, []).append(value)
    lines = ["| RL step | " + " | ".join(CURVES) + " |", "|---" * (1 + len(CURVES)) + "|"]
    return lines + [f"| {step} | " + " | ".join(
        f"{mean(values[name]):.{1 if name == 'length' else 3}f}" if name in values else ""
        for name in CURVES) + " |"
        for step, values in sorted(columns.items())]


def bases(rows):
    """The lines of a table: what each seed's base can do at temperature 1, by operations."""
    if "base.pass@1" not in rows:
        return []
    levels = [n for n in range(1, 10) if f"base.level{n}" in rows]
    parts = [(part, n) for part in ("", "checked ") for n in levels]
    keys = ["base.pass@1"] + [f"base.{part.replace(' ', '.')}level{n}" for part, n in parts]
    lines = ["| seed | pass@1 | " + " | ".join(f"{part}{n}" for part, n in parts) + " |",
             "|---" * (1 + len(keys)) + "|"]
    for seed in rows[keys[0]]["per_seed"]:
        values = [rows[key]["per_seed"].get(seed) if key in rows else None for key in keys]
        lines.append(f"| {seed} | " + " | ".join("-" if v is None else f"{v:.2f}"
                                                 for v in values) + " |")
    return lines


def objectives(rows):
    """The lines of a table: what each objective makes of the same bases."""
    names = [name for name in OBJECTIVES if f"objective.{name}.pass@1" in rows]
    columns = ("pass@1", "eval.pass@1", "cons@16", "length", "reflection", "mixing", "steps_to_85")
    lines = ["| objective | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in names:
        cells = [rows.get(f"objective.{name}.{column}") for column in columns]
        lines.append(f"| {name} | " + " | ".join(
            f"{c['mean']:.{1 + 2 * (c['mean'] < 2)}f} ± {c['std']:.{1 + 2 * (c['mean'] < 2)}f}"
            if c else "-" for c in cells) + " |")
    return lines


def report(paths, to=None):
    """Writes report.md (and with `to`, summary.json and curves.json there); returns the story."""
    runs = [metrics(path) for path in paths]
    table = {}
    for config, figures, _ in runs:
        for key, value in figures.items():
            seeds = table.setdefault(key, {})
            if str(config["seed"]) in seeds:
                raise UserError(f"two of these runs speak for {key}, seed {config['seed']}")
            seeds[str(config["seed"])] = round(value, 9)
    rows = {key: {"mean": mean(seeds.values()), "std": deviation(seeds.values()), "per_seed": seeds}
            for key, seeds in sorted(table.items())}
    command = f"python r1mini.py report {' '.join(map(str, paths))}" + (f" --to {to}" if to else "")
    figures = [f"| `{key}` | {r['mean']:.4g} ± {r['std']:.2g} | "
               + " ".join(f"{v:.4g}" for v in r["per_seed"].values()) + " |"
               for key, r in rows.items()]
    own = [curves for config, _, curves in runs if not config["start"]]
    parts = [["# Report", "", f"`{command}`", ""], story(rows), ["", "## The climb, on dev", ""],
             climb(own), ["", "## The bases, by seed and number of operations", ""], bases(rows),
             ["", "## The objectives", ""], objectives(rows),
             ["", "## All figures", "", "| figure | mean ± std | by seed |",
                          "|---|---|---|", *figures, ""]]
    for path in paths:
        write_samples(path)
    target = Path(to or paths[0])
    if to or len(paths) == 1:
        target.mkdir(parents=True, exist_ok=True)
        (target / "report.md").write_text("\n".join(sum(parts, [])), "utf-8")
    if to:
        summary = {"command": command, "commit": commit(),
                   "machine": "; ".join(sorted({f"{c['machine']}, {c['threads']} threads, torch "
                                                f"{c['versions']['torch']}" for c, _, _ in runs})),
                   "seeds": sorted({config["seed"] for config, _, _ in runs}), "metrics": rows}
        (target / "summary.json").write_text(json.dumps(summary, indent=1), "utf-8")
        curves = {f"{c['zero']['objective']}-seed{c['seed']}": curve for c, _, curve in runs}
        (target / "curves.json").write_text(json.dumps(curves), "utf-8")
    return "\n".join(story(rows))


def mean(values):
    """The mean of some numbers."""
    return round(sum(values) / len(values), 9)


def deviation(values):
    """The sample standard deviation; 0 of one number."""
    m, n = sum(values) / len(values), len(values)
    return round((sum((v - m) ** 2 for v in values) / (n - 1)) ** 0.5, 9) if n > 1 else 0.0


def write_samples(path):
    """samples.md of a run: the same held-out problems answered by each stage."""
    lines = ["# The same held-out problems, stage by stage", ""]
    records = [r for r in read_log(path) if r["kind"] == "samples"]
    for i in range(len(records[0]["answers"]) if records else 0):
        question, answer, _ = records[0]["answers"][i]
        lines += [f"## {question} (answer {answer})", ""]
        for r in records:
            text = r["answers"][i][2]
            right = tasks.accuracy(text, tasks.Problem(question, answer, "", 0))
            lines.append(f"- **{r['stage']}, step {r['step']}**, {'right' if right else 'wrong'}: "
                         f"`{text}`")
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
