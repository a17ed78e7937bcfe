"""study: the runs behind a table, one after the other; what is finished is skipped.

    python r1mini.py study r1 --seeds 0 1 --threads 2

What follows the name are options for each of its runs, and --seeds. A study in RUNS is a list of
ordinary runs, reported on together (those in PAGES: on a page of their own). One in MEASURED is a
module that measures, or trains itself: it has SETTINGS, NEEDS (checkpoints of runs/r1-SEED, from
`study r1`), STAGES, measure(folder) -> {figure: number, or text for a note}, and page(rows, notes)
-> the lines of its report. Each seed has a run folder of its own all the same.
"""
import importlib
import json
import time
from pathlib import Path
from statistics import fmean, stdev

import torch

import moe
import r1mini
from extras import choices, options as command_line, webpage
from extras.cost import in_products
from extras.figures import scatter, sheet
from extras.folder import Folder, read_log
from extras.report import cell, commit, of_flops, of_times, report, table
from grpo import OBJECTIVES, RL
from moe import UserError

OTHERS = [name for name in OBJECTIVES if name != RL.objective]
# Where RL stops working: students by width and steps of pretraining, beside the one of every run.
POINTS = ((48, 250), (64, 500), (64, 800))
# What the mixture and MTP buy: bases that take the same products, 6 a parameter in use and token,
# MTP's included. A dense layer is as wide as the experts a token uses; without MTP more is read.
PARTS = {"mixture and MTP": ("both", "model.n_mtp_layers=1"),
         "mixture alone": ("mixture", "model.n_mtp_layers=0 base.steps=1325"),
         "dense, and MTP": ("dense", "model.n_dense_layers=3")}
# Each study is a list of runs: an output folder, before it perhaps NAME= as report takes it, and
# the words of its command.
RUNS = {
    "base": [("base-{seed}", "base")],
    "zero": [("zero-{seed}", "zero")] + [
        (name + "-{seed}", "zero --from runs/zero-{seed}/base.pt "
         f"--set zero.objective={name} eval.longer=1") for name in OTHERS],
    "r1": [("r1-{seed}", "all"),
           ("logits-{seed}", "distill --from runs/r1-{seed}/r1.pt "
            "--data runs/r1-{seed}/distill.jsonl --only distill_logits"),
           ("noformat-{seed}",
            "distill --from runs/r1-{seed}/student.pt --only student_rl_no_format"),
           ("no_language_reward=nolang-{seed}",
            "dev2 --from runs/r1-{seed}/dev1.pt --set dev2.language_weight=0")],
    # Styles mix languages equally often, but a longer one shows it more: compare within one.
    "mixing": [("mixing-{seed}", "zero --set corpus.steps_mixed=0.4 corpus.checked_mixed=0.4")],
    "threshold": [(f"threshold-{dim}-{steps}-{{seed}}",
                   "distill --from runs/r1-{seed}/r1.pt --only student student_rl distill "
                   f"--set student.dim={dim} student.inter_dim={3 * dim} "
                   f"student_base.steps={steps} student_rl.steps=60")
                  # at least distillation's FLOPs: a narrow student's answers shrink to eight tokens
                  for dim, steps in POINTS],
    "parts": [(f"parts-{name}-{{seed}}", f"base --set {words}") for name, words in PARTS.values()],
    "choices": choices.RUNS,  # beside study r1
}
MEASURED = ("compute", "program", "baseline", "scale", "schedules", "speed")
SEEDS = {"base": range(10), "scale": (0,), "speed": (0,)}  # others: 0, 1, 2


def main(options):
    """Runs a study into runs/, then reports on it in results/NAME."""
    name = options.name
    if name not in (*RUNS, *MEASURED):
        raise UserError(f"study {name}: choose one of {', '.join((*RUNS, *MEASURED))}")
    words = command_line.Parser(add_help=False, allow_abbrev=False)
    words.add_argument("--seeds", nargs="+", type=int, default=SEEDS.get(name, (0, 1, 2)))
    words.add_argument("--preset", choices=list(moe.PRESETS), default=options.preset)
    given, rest = words.parse_known_args(options.rest)
    options.preset = given.preset
    if any(word.partition("=")[0] == "--out" for word in rest):
        raise UserError("study: --out would be one folder for all its runs; they go into runs/")
    if any(word.partition("=")[0] == "--seed" for word in rest):
        raise UserError("study: --seed would be one for all its runs; it is --seeds 0 1 2 here")
    rest = ["--preset", options.preset, *rest]
    if name in MEASURED:
        module = importlib.import_module(f"extras.{name}")
        for seed in given.seeds:  # all are there before hours are spent on one
            check(name, module, seed, options.preset)
        found, folders = {}, []
        for seed in given.seeds:
            folder = open_folder(name, module, seed, options.preset, rest)
            found[seed] = module.measure(folder)
            folders.append(folder.path)
        publish(options, module.page, found, folders)
        return 0
    for folder, command in (pair for seed in given.seeds
                            for pair in runs(name, seed, options.preset)):
        out = ["--out", folder.rpartition("=")[2]]
        print("== python r1mini.py", *command, *out, *rest, flush=True)
        if code := r1mini.main([*command, *out, *rest]):
            return code
    folders = [folder for seed in given.seeds for folder, _ in runs(name, seed, options.preset)]
    if name in PAGES:
        measure, page = PAGES[name]
        publish(options, page, {seed: measure(seed, runs_at(options.preset))
                                for seed in given.seeds}, folders)
    else:
        print(report(folders, results_at(options)))
    return 0


def runs_at(preset):
    """Where a preset's runs begin: what others do must not be taken for nano's."""
    return "runs/" + f"{preset}-" * (preset != "nano")


def results_at(options):
    """Where a study's report goes."""
    return f"results/{options.name}" + f"-{options.preset}" * (options.preset != "nano")


def runs(name, seed, preset="nano"):
    """[(folder, perhaps NAME= before it; words of its command)] of one seed of a study."""
    def placed(folder):
        label, equals, own = folder.format(seed=seed).rpartition("=")
        return f"{label}{equals}{runs_at(preset)}{own}"
    return [(placed(folder), [*command.format(seed=seed).replace(
        "runs/", runs_at(preset)).split(), "--seed", str(seed)]) for folder, command in RUNS[name]]


def check(name, module, seed, preset):
    """UserError if what a study of MEASURED needs is not there."""
    for needed in module.NEEDS:
        if not (path := Path(f"{runs_at(preset)}r1-{seed}") / needed).exists():
            raise UserError(f"study {name} wants {path}: first run python r1mini.py study "
                            + f"--preset {preset} " * (preset != "nano") + f"r1 --seeds {seed}")


def open_folder(name, module, seed, preset, rest):
    """The Folder of one seed of a study in MEASURED, in which measurements go on."""
    start = ["--from", f"{runs_at(preset)}r1-{seed}/r1.pt"] if module.NEEDS else []
    options = command_line.parse(["zero", "--seed", str(seed), *start, *rest,
                                  "--processes", "1", "--out", f"{runs_at(preset)}{name}-{seed}"])
    run = command_line.resolve(
        options.preset, [*module.SETTINGS, *options.set], seed=seed, start=options.start or "",
        device=options.device.type, dtype=str(options.dtype).removeprefix("torch."))
    print(f"== {name}, seed {seed}, into {options.out}", flush=True)
    return Folder(options.out, run, options, module.STAGES)


def once(folder, kind, work):
    """The record of a kind in a folder's log: the one there is, or that of work(), now logged."""
    known = [r for r in read_log(folder.path) if r["kind"] == kind]
    if not known:
        began = time.monotonic()
        known = [{"kind": kind} | work()]
        folder.log(known[0])
        folder.clock(kind, 0, began)
        print(f"{kind}: {time.monotonic() - began:.0f} seconds", flush=True)
    return {key: value for key, value in known[0].items() if key != "kind"}


def tested(path, stage):
    """A stage's record of a run on the test problems, at temperature 1."""
    records = [r for r in read_log(path) if r["kind"] == "test" and r["stage"] == stage
               and r["set"] == "test" and r["temperature"] == 1.0]
    if not records:
        raise UserError(f"{path}: {stage} is not finished, there is no test of it in its log")
    return records[0]


def publish(options, page, found, folders):
    """Writes results/NAME/report.md and summary.json of figures {seed: {key: value}}."""
    values, notes = {}, {}
    for seed, figures in found.items():
        for key, x in figures.items():
            if x is not None:
                (notes if isinstance(x, str) else values).setdefault(key, {})[str(seed)] = x
    rows = {key: {"mean": round(fmean(seeds.values()), 9),
                  "std": round(stdev(seeds.values()), 9) if len(seeds) > 1 else 0.0,
                  "per_seed": seeds} for key, seeds in sorted(values.items())}
    sized = f"--preset {options.preset} " * (options.preset != "nano")
    command = " ".join((f"python r1mini.py study {sized}{options.name}", *options.rest))
    lines = [f"# {options.name}", "", f"`{command}`", "", *page(rows, notes), ""]
    machines = {f"{m['machine']}, {m['threads']} threads, torch {torch.__version__}"
                for m, _, _ in map(of_times, folders)}
    summary = {"command": command, "commit": commit(), "machine": "; ".join(sorted(machines)),
               "seeds": list(found), "metrics": rows, "notes": notes}
    target = Path(results_at(options))
    target.mkdir(parents=True, exist_ok=True)
    webpage.publish("\n".join(lines), target)
    (target / "summary.json").write_text(json.dumps(summary, indent=1), "utf-8")
    print("\n".join(lines) + f"\nwritten: {target / 'report.md'}, {target / 'summary.json'}; "
          "study r1 again puts this page into its report")


# What became of a student: its base, and what RL and distillation made of it.
FATES = {"base": "student", "RL": "student_rl", "distilled": "distill"}


def threshold(seed, at="runs/"):
    """pass@1 of what became of each student of a seed, and the TFLOP that took, by key such as
    64-500.RL and 64-500.RL.tflop."""
    folders = {f"{dim}-{steps}": f"{at}threshold-{dim}-{steps}-{seed}" for dim, steps in POINTS}
    folders["default"] = f"{at}r1-{seed}"
    found = {}
    for name, folder in folders.items():
        log = read_log(folder)
        dev = [r for r in log if r["kind"] == "dev" and r["stage"] == "student"]
        found[f"{name}.base, on dev"] = dev[-1]["pass@1"]
        for fate, stage in FATES.items():
            found[f"{name}.{fate}"] = tested(folder, stage)["pass@1"]
            found[f"{name}.{fate}.tflop"] = of_flops(log)[stage]
    return found


def threshold_page(rows, notes):
    """From what base on does RL work? Sorted by the base, each seed's students for themselves."""
    names = {f"{dim}-{steps}": f"width {dim}, {steps} steps" for dim, steps in POINTS}
    names["default"] = "the table's: width 48, 400 steps"
    columns = [*FATES, "base, on dev", *(f"{fate}.tflop" for fate in FATES)]
    students = [([rows[f"{key}.{column}"]["per_seed"][seed] for column in columns],
                 f"{name}, seed {seed}")
                for key, name in names.items() for seed in rows[f"{key}.base"]["per_seed"]]
    lower = [b for (b, rl, distilled, *_), _ in students if rl < distilled]
    stuck = [b for (b, rl, *_), _ in students if rl < 0.5]
    cheap = [name for values, name in students if values[-2] < values[-1]]
    reached = {fate: [(values[0], values[i]) for values, _ in students]
               for i, fate in enumerate(FATES) if i}
    plot = sheet("results/threshold", "threshold", (
        "pass@1 reached", scatter, "pass@1 of the base", reached))
    heads = [column.replace(".tflop", ", TFLOP") for column in columns]
    return [*table(["student", *heads], [[name, *(f"{x:.3f}" for x in values)]
                                         for values, name in sorted(students)]), "", *plot, "",
            f"Distilled beats RL on {len(lower)} of {len(students)} students"
            + (f", the best of them with a base at {max(lower):.3f}" if lower else "")
            + f". RL stays below one half on {len(stuck)}"
            + (f", with bases up to {max(stuck):.3f}." if stuck else ".")
            + f" RL took fewer FLOPs than distillation on {len(cheap)}. The table's student was "
            "chosen on dev, before this curve.", "",
            "The paper: DeepSeek's own dense base of 7B and mixture of 16B gained nothing by RL on "
            "AIME, larger ones did (R1 v2 G.1); Qwen2-Math-7B came to 22.3 (Table 17); Qwen-32B "
            "reached 47.0 by RL, 72.6 distilled (R1 v1 Table 6)."]


def parts(seed, at="runs/"):
    """What became of each base of a seed, by key such as dense.pass@1; loss is the mean of the
    last hundred steps, all of documents never read before."""
    found = {}
    for name, _ in PARTS.values():
        folder = f"{at}parts-{name}-{seed}"
        log, test = read_log(folder), tested(folder, "base")
        steps = [r for r in log if r["kind"] == "base"]
        tokens = sum(r["tokens"] for r in steps)
        work = 6 * in_products(moe.Config(**log[0]["model"])) * tokens / 1e12
        values = {"loss": fmean(r["loss"] for r in steps[-100:]), "pass@1": test["pass@1"],
                  "cons": test[f"cons@{test['samples']}"], "steps": len(steps),
                  "reflection": test["reflection"], "tokens": tokens, "tflop": work}
        found |= {f"{name}.{key}": x for key, x in values.items()}
    return found


def parts_page(rows, notes):
    """Do the mixture and MTP pay at this size? Each is taken away at equal work."""
    columns = ("loss", "pass@1", "cons", "reflection", "tflop", "tokens", "steps")
    lines = table(["base", *columns], [[text, *(cell(rows, f"{name}.{key}") for key in columns)]
                                       for text, (name, _) in PARTS.items()])
    for text, other in (("MTP", "mixture"), ("the mixture", "dense")):
        for key, better in (("loss", -1), ("pass@1", 1)):
            both, without = (rows[f"{name}.{key}"]["per_seed"] for name in ("both", other))
            gains = [better * (both[seed] - without[seed]) for seed in both]
            wins = sum(gain > 0 for gain in gains)
            lines += ["", f"- By {key}, {text} pays on {wins} of {len(gains)} seeds; gain "
                      f"{fmean(gains):+.3f} ({', '.join(f'{gain:+.3f}' for gain in gains)})."]
    return [*lines, "", "TFLOP: 6 times the parameters in products, MTP's included, the "
            "embedding's not, and tokens read."]


PAGES = {"threshold": (threshold, threshold_page), "parts": (parts, parts_page),
         "choices": (choices.measure, choices.page)}
