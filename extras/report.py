"""report and study: numbers of finished runs, and the lists of runs behind the README's tables.

summary.json is written here and nowhere else, always from the logs of runs:
{"command", "commit", "machine", "seeds", "metrics": {KEY: {"mean", "std", "per_seed"}}}. Keys are
stage.metric (zero.pass@1) at the evaluation temperature, stage.t1.metric at temperature 1, and
stage.longer.metric on problems longer than any in training.
"""
import json
import platform
import subprocess
from pathlib import Path

import torch

import r1mini
import tasks

TESTED = ("pass@1", "cons@16", "length", "reflection", "correction", "mixing", "language", "format",
          "cut_off")
CURVES = ("pass@1", "cons@16", "length", "reflection", "correction", "mixing")

# Each study is a list of runs: an output folder, and the words of its command.
OBJECTIVES = [name for name in r1mini.OBJECTIVES if name != r1mini.RL.objective]
STUDIES = {
    "base": [(f"base-{seed}", f"base --seed {seed}") for seed in range(10)],
    "zero": [(f"zero-{seed}", f"zero --seed {seed}") for seed in range(3)],
    "objectives": [(f"{name}-{seed}", f"zero --seed {seed} --from runs/zero-{seed}/base.pt "
                    f"--set zero.objective={name}") for seed in range(3) for name in OBJECTIVES],
}


def moving_mean(curve, width=3):
    """Means over `width` neighbours of a list."""
    return [sum(curve[i:i + width]) / width for i in range(len(curve) - width + 1)] or curve


def of_tests(log):
    """Figures of the held-out test records of a log, by key."""
    out = {}
    for r in (r for r in log if r["kind"] == "test"):
        key = r["stage"] + ".t1" * (r["temperature"] == 1.0) + ".longer" * (r["set"] == "longer")
        out |= {f"{key}.{name}": r[name] for name in TESTED if name in r}
        out |= {f"{key}.level{n}": x for n, x in r["by_level"].items()}
        for style, row in r["by_style"].items():
            out |= {f"{key}.{style}.{n if n == 'share' else f'level{n}'}": x
                    for n, x in row.items() if x is not None}
    return out


def of_climb(log):
    """Figures of the dev curve from the base to the end of RL, and of the RL log, by key."""
    dev = [r for r in log if r["kind"] == "dev"]
    climb = [r for r in dev if r["stage"] == "zero"]
    updates = [r for r in log if r["kind"] == "zero"]
    if not climb:
        return {}
    start, out = ([r for r in dev if r["stage"] == "base"] or climb)[-1], {}
    for name in ("length", "reflection"):
        smooth, first = moving_mean([r[name] for r in climb]), max(start[name], 1e-9)
        out[f"zero.{name}_ratio"] = max(smooth) / first
        out[f"zero.{name}_ratio_at_end"] = smooth[-1] / first
    vote = next(k for k in start if k.startswith("cons@"))
    out["zero.vote_above_pass"] = sum(r[vote] > r["pass@1"] for r in climb) / len(climb)
    reached = [r["step"] for r in climb if r["pass@1"] >= 0.85]
    if reached:
        out["zero.steps_to_85"] = reached[0]
    return out | {"zero.gap_p999": max(r["gap_p999"] for r in updates),
                  "zero.gap_max": max(r["gap_max"] for r in updates),
                  "zero.gap_flips": sum(r["gap_flips"] for r in updates),
                  "zero.expert_load": max(r["expert_load"] for r in updates)}


def metrics(path):
    """(config, figures by key, dev curves by name) of one run folder."""
    log = r1mini.read_log(path)
    config, out = log[0], of_tests(log) | of_climb(log)
    timing = [json.loads(line) for line in (Path(path) / "timing.jsonl").open(encoding="utf-8")]
    objective = {f"objective.{config['zero']['objective']}.{k.removeprefix('zero.')}": v
                 for k, v in out.items() if k.startswith("zero.") and "longer" not in k
                 and k.rsplit(".", 1)[1] in (*TESTED, "length_ratio", "reflection_ratio")}
    if config["start"]:  # a run from another's base speaks for its objective only
        out = objective
    else:
        out |= objective | {"peak_gib": max(t["peak_gib"] for t in timing)}
        out["minutes"] = sum(t["seconds"] for t in timing) / 60
        for stage in {t["stage"] for t in timing}:
            out[f"minutes.{stage.replace(' ', '_')}"] = sum(
                t["seconds"] for t in timing if t["stage"] == stage) / 60
    curves = {name: [[r["stage"], r["step"], r[name]] for r in log if r["kind"] == "dev"
                     and name in r] for name in CURVES}
    return config, out, curves


# What a reader wants to know first: name, key, and what the paper saw.
STORY = (("right at the first try (pass@1)", "pass@1", "AIME 15.6% to 71.0% (v1), 77.9% (Nature)"),
         ("right by majority of 16 (cons@16)", "cons@16", "AIME 86.7%"),
         ("tokens in an answer", "length", "hundreds to thousands"),
         ("answers that check themselves", "reflection", "reflective words 5 to 7 times"),
         ("answers that stop and mend a step", "correction", '"wait" rises late'),
         ("answers that mix languages", "mixing", "seen, not counted"),
         ("pass@1, one step longer than any learnt", "longer.level7", ""),
         ("pass@1, two steps longer", "longer.level8", ""))


def story(rows):
    """The lines of a table: base and zero at the evaluation temperature, beside the paper."""
    def cell(key):
        row = rows.get(key)
        if not row:
            return ""
        return f"{row['mean']:.3f}" + f" ± {row['std']:.3f}" * (len(row["per_seed"]) > 1)
    lines = ["| on held-out problems | base | zero | R1-Zero in the paper |", "|---|---|---|---|"]
    return lines + [f"| {name} | {cell(f'base.{key}')} | {cell(f'zero.{key}')} | {paper} |"
                    for name, key, paper in STORY]


def climb(curves):
    """The lines of a table: dev at temperature 1 against the RL step, means over runs."""
    columns = {}
    for curve in curves:
        for name, points in curve.items():
            for i, (stage, step, value) in enumerate(points):
                if stage == "zero" or i + 1 == len(points) or points[i + 1][0] == "zero":
                    columns.setdefault(step if stage == "zero" else 0, {}).setdefault(
                        name, []).append(value)
    lines = ["| RL step | " + " | ".join(CURVES) + " |", "|---" * (1 + len(CURVES)) + "|"]
    return lines + [f"| {step} | " + " | ".join(
        f"{mean(values[name]):.3f}" if name in values else "" for name in CURVES) + " |"
        for step, values in sorted(columns.items())]


def report(paths, to=None):
    """Writes report.md (and with `to`, summary.json and curves.json there); returns the story."""
    runs = [metrics(path) for path in paths]
    table = {}
    for config, figures, _ in runs:
        for key, value in figures.items():
            table.setdefault(key, {})[str(config["seed"])] = round(value, 5)
    rows = {key: {"mean": mean(seeds.values()), "std": deviation(seeds.values()), "per_seed": seeds}
            for key, seeds in sorted(table.items())}
    command = f"python r1mini.py report {' '.join(map(str, paths))}" + (f" --to {to}" if to else "")
    figures = [f"| `{key}` | {r['mean']:.3f} ± {r['std']:.3f} | "
               f"{' '.join(f'{v:.3f}' for v in r['per_seed'].values())} |" for key, r in rows.items()]
    own = [curves for config, _, curves in runs if not config["start"]]
    parts = [["# Report", "", f"`{command}`", ""], story(rows), ["", "## The climb, on dev", ""],
             climb(own), ["", "## All figures", "", "| figure | mean ± std | by seed |",
                          "|---|---|---|", *figures, ""]]
    for path in paths:
        write_samples(path)
    target = Path(to or paths[0])
    if to or len(paths) == 1:
        target.mkdir(parents=True, exist_ok=True)
        (target / "report.md").write_text("\n".join(sum(parts, [])), "utf-8")
    if to:
        summary = {"command": command, "commit": commit(),
                   "machine": f"{processor()}, torch {torch.__version__}",
                   "seeds": sorted({config["seed"] for config, _, _ in runs}), "metrics": rows}
        (target / "summary.json").write_text(json.dumps(summary, indent=1), "utf-8")
        curves = {f"{c['zero']['objective']}-seed{c['seed']}": curve for c, _, curve in runs}
        (target / "curves.json").write_text(json.dumps(curves), "utf-8")
    return "\n".join(story(rows))


def mean(values):
    """The mean of some numbers."""
    return round(sum(values) / len(values), 5)


def deviation(values):
    """The sample standard deviation; 0 of one number."""
    m, n = sum(values) / len(values), len(values)
    return round((sum((v - m) ** 2 for v in values) / (n - 1)) ** 0.5, 5) if n > 1 else 0.0


def write_samples(path):
    """samples.md of a run: the same held-out problems answered by each stage."""
    lines = ["# The same held-out problems, stage by stage", ""]
    records = [r for r in r1mini.read_log(path) if r["kind"] == "samples"]
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


def processor():
    """The processor's name and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def study(name, preset):
    """Runs every command of a study into runs/; what is finished is skipped."""
    for folder, words in STUDIES[name]:
        print(f"== python r1mini.py {words} --out runs/{folder}", flush=True)
        code = r1mini.main([*words.split(), "--out", f"runs/{folder}", "--preset", preset])
        if code:
            return code
    return 0


def main(options):
    """The commands report and study."""
    if options.command == "study":
        if options.name not in STUDIES:
            raise r1mini.UserError(f"study {options.name}: choose one of {', '.join(STUDIES)}")
        return study(options.name, options.preset)
    print(report(options.runs, options.to))
    return 0
