"""study: the runs behind a table, one after the other; what is finished is skipped.

    python r1mini.py study r1 --seeds 0 1 --threads 2

What follows the name are options for each of its runs, and --seeds. A study is a module of
studies/, which has some of these names:

    SEEDS               that it is made of; if it has none, 0, 1, 2
    RUNS                ordinary runs: a folder, before it perhaps NAME= as report takes it, and the
                        words of its command
    figures(seed, at)   {key: number} read off their logs; if there is none, report's
    measure(folder)     {key: number, or text for a note} of what it measures, or trains itself, in
                        a run folder of its own; with SETTINGS, NEEDS (checkpoints of runs/r1-SEED,
                        from `study r1`) and STAGES
    page(rows, notes)   the lines of its report
"""
import json
import time
from pathlib import Path
from statistics import fmean, stdev

import torch

from engine.errors import UserError
from engine.folder import Folder, read_log
from r1mini import PRESETS
from tools import cli
from tools.report import commit, of_times, report


def main(options, study):
    """Runs a study, a module of studies/, into runs/, then reports on it in results/NAME."""
    name = options.name
    if not hasattr(study, "RUNS") and not hasattr(study, "measure"):
        command = next(line for line in study.__doc__.splitlines() if "python r1mini.py" in line)
        raise UserError(f"study {name} has no runs: {command.strip()}")
    words = cli.Parser(add_help=False, allow_abbrev=False)
    words.add_argument("--seeds", nargs="+", type=int, default=getattr(study, "SEEDS", (0, 1, 2)))
    words.add_argument("--preset", choices=list(PRESETS), default=options.preset)
    given, rest = words.parse_known_args(options.rest)
    options.preset = given.preset
    if any(word.partition("=")[0] == "--out" for word in rest):
        raise UserError("study: --out would be one folder for all its runs; they go into runs/")
    if any(word.partition("=")[0] == "--seed" for word in rest):
        raise UserError("study: --seed would be one for all its runs; it is --seeds 0 1 2 here")
    rest = ["--preset", options.preset, *rest]
    if hasattr(study, "measure"):
        for seed in given.seeds:  # all are there before hours are spent on one
            check(name, study, seed, options.preset)
    pairs = [pair for seed in given.seeds for pair in runs(study, seed, options.preset)]
    for folder, command in pairs:
        out = ["--out", folder.rpartition("=")[2]]
        print("== python r1mini.py", *command, *out, *rest, flush=True)
        if code := cli.main([*command, *out, *rest]):
            return code
    folders = [folder for folder, _ in pairs]
    if not hasattr(study, "page"):
        print(report(folders, results_at(options)))
        return 0
    found = {seed: {} for seed in given.seeds}
    for seed in given.seeds:
        if hasattr(study, "figures"):
            found[seed] |= study.figures(seed, runs_at(options.preset))
        if hasattr(study, "measure"):
            folder = open_folder(name, study, seed, options.preset, rest)
            found[seed] |= study.measure(folder)
            folders.append(folder.path)
    publish(options, study.page, found, folders)
    return 0


def runs_at(preset):
    """Where a preset's runs begin: what others do must not be taken for nano's."""
    return "runs/" + f"{preset}-" * (preset != "nano")


def results_at(options):
    """Where a study's report goes."""
    return f"results/{options.name}" + f"-{options.preset}" * (options.preset != "nano")


def runs(study, seed, preset="nano"):
    """[(folder, perhaps NAME= before it; words of its command)] of one seed of a study."""
    def placed(folder):
        label, equals, own = folder.format(seed=seed).rpartition("=")
        return f"{label}{equals}{runs_at(preset)}{own}"
    return [(placed(folder), [*command.format(seed=seed).replace(
        "runs/", runs_at(preset)).split(), "--seed", str(seed)])
        for folder, command in getattr(study, "RUNS", ())]


def check(name, study, seed, preset):
    """UserError if what a study needs is not there."""
    for needed in study.NEEDS:
        if not (path := Path(f"{runs_at(preset)}r1-{seed}") / needed).exists():
            raise UserError(f"study {name} wants {path}: first run python r1mini.py study "
                            + f"--preset {preset} " * (preset != "nano") + f"r1 --seeds {seed}")


def open_folder(name, study, seed, preset, rest):
    """The Folder of one seed of a study, in which measurements go on."""
    start = ["--from", f"{runs_at(preset)}r1-{seed}/r1.pt"] if study.NEEDS else []
    options = cli.parse(["zero", "--seed", str(seed), *start, *rest,
                                  "--processes", "1", "--out", f"{runs_at(preset)}{name}-{seed}"])
    run = cli.resolve(
        options.preset, [*study.SETTINGS, *options.set], seed=seed, start=options.start or "",
        device=options.device.type, dtype=str(options.dtype).removeprefix("torch."))
    print(f"== {name}, seed {seed}, into {options.out}", flush=True)
    return Folder(options.out, run, options, study.STAGES)


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
    (target / "report.md").write_text("\n".join(lines), "utf-8")
    (target / "summary.json").write_text(json.dumps(summary, indent=1), "utf-8")
    print("\n".join(lines) + f"\nwritten: {target / 'report.md'}, {target / 'summary.json'}; "
          "study r1 again puts this page into its report")
