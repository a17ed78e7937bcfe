"""study: makes all runs behind a page of results/, one after the other. Skips finished runs.

    python r1mini.py study r1 --seeds 0 1 --threads 2
    python r1mini.py study all

The words after the name are --seeds and options for each run. `all` says which seeds of which
studies are missing, and how long they will take if they take as long as the finished ones. Then it
runs them. A study is a module of studies/. It has some of these names:

    SEEDS                 the default of --seeds; without it 0, 1, 2
    RUNS                  ordinary runs: (folder, or NAME=folder as report takes it; command)
    numbers(seed, at)     returns {key: number}, read from the logs of RUNS; `at` is where folders
                          begin, such as runs/. Without numbers and measure, a seed has the
                          numbers and curves that tools/report.py takes from the logs
    measure(folder)       trains and measures what no command does, in a run folder of its own.
                          Returns {key: number, or a text for a note}. It comes with
        SETTINGS          the settings of this folder, as after --set
        NEEDS             the checkpoints that it takes from runs/r1-SEED (`study r1` makes them)
        STAGES            the stages that it trains
    ARMS                  {arm: its settings}. An arm is measured by itself. It takes no folder of
                          other studies, but may start from the kept models. With it come SETTINGS,
                          STAGES and
        measure_arm(arm, folder)  returns {key: number, or a text for a note}
    combine(numbers)      returns more numbers of a seed. It is given {ARM.key: number} of all arms
    DIFFERENCES           {key: (key, key)}: summary.json gets the first number less the second,
                          paired by seed, with its 95% interval (tools/compare.py)
    page(metrics, notes)  returns the lines that are printed
    picture(metrics)      returns a Picture of tools/figures.py. It is written beside summary.json

results/NAME/runs.jsonl has a line for each finished seed. If the study has ARMS, it has a line for
each finished arm of each seed. A line is valid while the settings (device and dtype are among them)
and the kept models of its seed stay the same. A change of the code is not noticed: then delete the
lines.

    study NAME    does not measure an arm again that has a line. A study without ARMS makes its
                  missing folders again, since other studies may start from them
    study all     skips each seed that has all its lines

summary.json has the seeds of --seeds, and the default ones that have lines. It goes to
results/NAME, or for another preset than nano to results/NAME-PRESET. The page
results/NAME/README.md is written by hand; `report --pages` fills in its numbers.
"""
import contextlib
import dataclasses
import hashlib
import json
import time
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace

import torch
from tqdm import tqdm

import tasks
from engine import checkpoint
from engine.devices import copy_model
from engine.errors import UserError
from engine.evaluate import evaluate
from engine.folder import Folder, describe_commit, describe_machine, read_log, release_locks
from grpo import train_rl
from r1mini import PRESETS
from tools import cli
from tools.compare import paired_difference, summarise
from tools.figures import write_picture
from tools.report import (
    commit_of,
    name_and_path,
    numbers_of_seed,
    read_timing,
    seconds_of,
    write_results,
)
from tools.tables import table


def main(options, study):
    """The command study: runs a module of studies/ and reports on it. Returns the exit code."""
    if not cli.has_runs(study):
        command = next(line for line in study.__doc__.splitlines() if "python r1mini.py" in line)
        raise UserError(f"study {options.name} has no runs: {command.strip()}")
    seeds, run_options = _read_words(options, study)
    if hasattr(study, "measure"):
        for seed in seeds:  # before hours are spent on the first seed
            _check_needs(options.name, study, seed, options.preset)
    for seed in seeds:
        folders = []
        for folder, command in _study_runs(study, seed, options.preset):
            words = [*command, "--out", name_and_path(folder)[1], "--preset", options.preset,
                     *run_options]
            print("== python r1mini.py", *words, flush=True)
            code = cli.main(words)
            if code:
                return code
            folders.append(folder)
        if hasattr(study, "ARMS"):
            _measure_arms(options, study, seed, run_options)
        else:
            _measure_seed(options, study, seed, run_options, folders)
    lines = []
    for seed in sorted({*seeds, *_default_seeds(study)}):
        lines += _finished_lines(options, study, seed, run_options)
    _publish(options, study, lines, run_options)
    return 0


def main_all(options, studies):
    """The command `study all`: says what is missing, and runs it. studies: {name: module}. Returns
    the exit code."""
    if options.rest:
        raise UserError("study all takes no more words; --preset stands before `all`, and other "
                        "options are for one study")
    missing, rows, known_seconds = {}, [], 0.0  # missing: {name: seeds}
    for name, study in studies.items():
        study_options = SimpleNamespace(name=name, preset=options.preset)
        seeds = [seed for seed in _default_seeds(study)
                 if not _finished_lines(study_options, study, seed, [])]
        if seeds:
            missing[name] = seeds
            seconds = _seconds_of_a_seed(study_options, study) * len(seeds)
            known_seconds += seconds
            rows.append([name, " ".join(map(str, seeds)),
                         f"{seconds / 60:.0f}" if seconds else "not known"])
    print("\n".join(table(["study", "missing seeds", "expected minutes"], rows)))
    print(f"missing: {len(missing)} of {len(studies)} studies. Those with a known time take "
          f"{known_seconds / 3600:.1f} hours.", flush=True)
    failed = []
    for name, seeds in missing.items():
        # A fresh clone has r1's lines, but not the models that this study starts from.
        needing_r1 = [seed for seed in seeds if _lacks_r1(studies[name], seed, options.preset)]
        for name_to_run, seeds_to_run in (("r1", needing_r1), (name, seeds)):
            if not seeds_to_run or name_to_run in failed:
                continue
            code = cli.main(["study", "--preset", options.preset, name_to_run, "--seeds",
                             *map(str, seeds_to_run)])
            release_locks()  # otherwise hundreds of folders would stay open
            if code >= 128:  # Ctrl-C, or a signal
                return code
            if code:
                failed.append(name_to_run)
    if failed:
        raise UserError(f"not finished: {', '.join(failed)}; the lines above say why")
    return 0


def _read_words(options, study):
    """(seeds, options for each run) from the words after the study's name. Sets options.preset."""
    words = cli.Parser(add_help=False, allow_abbrev=False)
    words.add_argument("--seeds", nargs="+", type=int, default=_default_seeds(study))
    words.add_argument("--preset", choices=list(PRESETS), default=options.preset)
    given, run_options = words.parse_known_args(options.rest)
    for word in run_options:
        if word.partition("=")[0] == "--out":
            raise UserError("study: --out names one folder, and a study has several runs; their "
                            "folders are in runs/")
        if word.partition("=")[0] == "--seed":
            raise UserError("study: --seed would give all runs one seed; use --seeds 0 1 2")
    options.preset = given.preset
    return given.seeds, run_options


def _default_seeds(study):
    """The seeds of a study without --seeds."""
    return getattr(study, "SEEDS", (0, 1, 2))


# -------------------------------------------------------------------------------------------------
# Folders


def _runs_prefix(preset):
    """How the folders of a preset's runs begin. Other presets must not be taken for nano."""
    return "runs/" if preset == "nano" else f"runs/{preset}-"


def _results_folder(options):
    """The folder of a study's results."""
    name = options.name if options.preset == "nano" else f"{options.name}-{options.preset}"
    return f"results/{name}"


def _study_runs(study, seed, preset="nano"):
    """[(folder or NAME=folder, words of its command)] of one seed of a study."""
    pairs = []
    for folder, command in getattr(study, "RUNS", ()):
        label, equals, path = folder.format(seed=seed).rpartition("=")
        words = command.format(seed=seed).replace("runs/", _runs_prefix(preset)).split()
        folder = f"{label}{equals}{_runs_prefix(preset)}{path}"
        pairs.append((folder, [*words, "--seed", str(seed)]))
    return pairs


def _check_needs(name, study, seed, preset):
    """UserError if a checkpoint that a study needs is missing."""
    for name_of_file in study.NEEDS:
        path = Path(f"{_runs_prefix(preset)}r1-{seed}") / name_of_file
        if not path.exists():
            preset_words = "" if preset == "nano" else f"--preset {preset} "
            raise UserError(f"study {name} needs {path}: first run python r1mini.py study "
                            f"{preset_words}r1 --seeds {seed}")


def _lacks_r1(study, seed, preset):
    """Whether a study starts from files of the study r1 that are not there."""
    r1_folder, runs = f"{_runs_prefix(preset)}r1-{seed}", _study_runs(study, seed, preset)
    if r1_folder in [folder for folder, _ in runs]:  # it is r1 itself
        return False
    files = [f"{r1_folder}/{name}" for name in getattr(study, "NEEDS", ())]
    files += [word for _, words in runs for word in words if word.startswith(f"{r1_folder}/")]
    return not all(Path(file).exists() for file in files)


def _open_folder(name, study, seed, preset, run_options):
    """The run folder in which a study trains and measures one seed."""
    start = f"{_runs_prefix(preset)}r1-{seed}/r1.pt" if study.NEEDS else ""
    path = f"{_runs_prefix(preset)}{name}-{seed}"
    run, options = _resolve_run(preset, study.SETTINGS, seed, start, path, run_options)
    print(f"== {name}, seed {seed}, in {path}", flush=True)
    return Folder(path, run, options, study.STAGES)


def _resolve_run(preset, settings, seed, start, path, run_options):
    """(settings of a run, options of its command) of a folder that a study fills itself."""
    from_words = ["--from", start] if start else []
    options = cli.parse_arguments(["zero", "--preset", preset, "--seed", str(seed), *from_words,
                                   *run_options, "--processes", "1", "--out", path])
    run = cli.resolve_settings(
        preset, [*settings, *options.set], seed=seed, start=start, device=options.device.type,
        dtype=str(options.dtype).removeprefix("torch."))
    return run, options


# -------------------------------------------------------------------------------------------------
# Lines of runs.jsonl


def _measure_arms(options, study, seed, run_options):
    """Measures the arms of a seed that have no line. Returns the lines of all its arms."""
    for arm in study.ARMS:
        run, parsed_options, key = _settings_of(options, study, arm, seed, run_options)
        if _find_line(_lines_file(options), key) is None:
            path = parsed_options.out
            print(f"== {options.name}, {arm}, seed {seed}, in {path}", flush=True)
            began = time.monotonic()
            folder = Folder(path, run, parsed_options, study.STAGES)
            metrics = study.measure_arm(arm, folder)
            _write_line(options, key | {
                "commit": _commits_of_arm(folder, arm), "machine": describe_machine(),
                "seconds": round(time.monotonic() - began), "metrics": metrics})
    return _finished_lines(options, study, seed, run_options)


def _commits_of_arm(folder, arm):
    """The commits at which an arm's models were trained, and at which it was measured. Its folder,
    and the one that the arms share, may be of an earlier session."""
    machines = [{"commit": describe_commit()}]
    for path in (folder.path, _start_path(folder, arm)):
        if (path / "timing.jsonl").exists():
            machine, _, _ = read_timing(path)
            machines.append(machine)
    return commit_of(machines)


def _measure_seed(options, study, seed, run_options, folders):
    """Reads and measures a seed of a study without arms. Writes its line, if there is none with the
    same numbers. folders: of its runs, which are finished."""
    _, _, key = _settings_of(options, study, "", seed, run_options)
    paths = [name_and_path(folder)[1] for folder in folders]
    if hasattr(study, "page"):
        metrics = {}
        if hasattr(study, "numbers"):
            metrics |= study.numbers(seed, _runs_prefix(options.preset))
        if hasattr(study, "measure"):
            folder = _open_folder(options.name, study, seed, options.preset, run_options)
            metrics |= study.measure(folder)
            paths.append(folder.path)
        result = {"metrics": metrics}
    else:
        result = numbers_of_seed(folders)
    machines = [read_timing(path)[0] for path in paths]
    names = {f"{machine['machine']}, {machine['threads']} threads, torch {torch.__version__}"
             for machine in machines}
    line = key | {"commit": commit_of(machines), "machine": "; ".join(sorted(names)),
                  "seconds": round(sum(map(seconds_of, paths)))} | result
    old_line = _find_line(_lines_file(options), key)
    if old_line is None or any(old_line.get(name) != line[name] for name in result):
        _write_line(options, line)


def _finished_lines(options, study, seed, run_options):
    """The lines of a seed; [] if one is missing."""
    lines = []
    for arm in getattr(study, "ARMS", [""]):
        _, _, key = _settings_of(options, study, arm, seed, run_options)
        lines.append(_find_line(_lines_file(options), key))
    return [] if None in lines else lines


def _settings_of(options, study, arm, seed, run_options):
    """(settings of a run, options of its command, the values by which its line is found). arm: ""
    if the study has none."""
    arm_settings = study.ARMS[arm].split() if arm else []
    name = f"{options.name}-{arm}" if arm else options.name
    run, parsed_options = _resolve_run(
        options.preset, [*getattr(study, "SETTINGS", ()), *arm_settings], seed, "",
        f"{_runs_prefix(options.preset)}{name}-{seed}", run_options)
    sha256 = hashlib.sha256(json.dumps(dataclasses.asdict(run)).encode())
    if arm:  # it starts from the kept models
        for file in sorted(Path(f"results/checkpoints/{seed}").glob("*.pt")):
            sha256.update(file.name.encode() + file.read_bytes())
    else:
        commands = [words for _, words in _study_runs(study, seed, options.preset)]
        sha256.update(json.dumps(commands).encode())
    key = {"arm": arm, "seed": seed, "settings": sha256.hexdigest()[:12]}
    return run, parsed_options, key


def _lines_file(options):
    """The file of a study's lines."""
    return Path(_results_folder(options)) / "runs.jsonl"


def _write_line(options, line):
    """Appends a line."""
    path = _lines_file(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text("utf-8") if path.exists() else ""
    ends_torn = text != "" and not text.endswith("\n")  # a kill tore the last line
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if ends_torn else "") + json.dumps(line) + "\n")


def _seconds_of_a_seed(options, study):
    """How long a seed takes: the sum over arms of the median of the finished seeds. 0 if no line
    has its seconds."""
    seconds_of_arm = {arm: [] for arm in getattr(study, "ARMS", [""])}
    for line in _read_lines(_lines_file(options)):
        if line.get("seconds") and line.get("arm") in seconds_of_arm:
            seconds_of_arm[line["arm"]].append(line["seconds"])
    return sum(median(seconds) for seconds in seconds_of_arm.values() if seconds)


def _read_lines(path):
    """The lines of a runs.jsonl, without a torn one."""
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _find_line(path, key):
    """The last line of runs.jsonl that has these values, or None."""
    for line in reversed(_read_lines(path)):
        if key.items() <= line.items():
            return line
    return None


def load_kept(folder, name, seed=None):
    """A model of results/checkpoints, such as base, of the folder's seed or another one."""
    path = Path(f"results/checkpoints/{folder.run.seed if seed is None else seed}/{name}.pt")
    if not path.exists():
        raise UserError(f"{path} is missing: this study starts from kept models; use a seed that "
                        "has one")
    return folder.place(checkpoint.load(path)[0])


# -------------------------------------------------------------------------------------------------
# For studies


def measure_once(folder, kind, measure):
    """The record of a kind in a folder's log. If there is none, measure() is called and logged."""
    for record in read_log(folder.path):
        if record["kind"] == kind:
            break
    else:
        began = time.monotonic()
        record = {"kind": kind} | measure()
        folder.log(record)
        folder.clock(kind, 0, began)
        print(f"{kind}: {time.monotonic() - began:.0f} seconds", flush=True)
    return {key: value for key, value in record.items() if key != "kind"}


def test_record(path, stage, temperature=1.0):
    """The record of a stage's test in a run folder, on the test problems at a temperature."""
    wanted = {"kind": "test", "stage": stage, "set": "test", "temperature": temperature}
    for record in read_log(path):
        if wanted.items() <= record.items():
            return record
    raise UserError(f"{path}: {stage} is not finished, there is no test of it in its log")


def _start_path(folder, arm):
    """Where start_folder() is."""
    return folder.path.with_name(folder.path.name.replace(f"-{arm}-", "-start-"))


def start_folder(folder, arm, stages):
    """The folder of the models that all arms of a seed start from. It is beside an arm's folder."""
    return Folder(_start_path(folder, arm), folder.run, folder.options, stages)


def train_in_memory(model, task, s, run):
    """RL on a copy of a model, without a folder: a stopped arm of a study begins anew. Returns
    (model, the records of train_rl, {"devSTEP": pass@1 on dev every s.dev_every rollouts})."""
    model, records, on_dev = copy_model(model), [], {}
    problems = tasks.make_problems("dev", run.eval.dev_problems, s.levels, run.corpus.products)
    for record, _ in tqdm(train_rl(model, task, s, run.seed), total=s.steps):
        records.append(record)
        if record["step"] % s.dev_every == 0:
            means, _ = evaluate(model, problems, run.eval.samples, 1.0, 1.0, s.max_new_tokens,
                                run.eval.rows)
            on_dev[f"dev{record['step']}"] = means["pass@1"]
    return model, records, on_dev


def test_numbers(model, run):
    """A model on the test problems at temperature 1: pass@1, length, measures such as reflection,
    and length@LEVEL. Lengths are in tokens."""
    s, levels = run.eval, run.zero.levels
    problems = tasks.make_problems("test", s.problems, levels, run.corpus.products)
    means, by_problem = evaluate(model, problems, s.fewer_samples, 1.0, 1.0,
                                 run.zero.max_new_tokens, s.rows, seed=1)
    numbers = {key: means[key] for key in ("pass@1", "length", "cut_off", *tasks.MEASURES)}
    for level in levels:
        numbers[f"length@{level}"] = fmean(
            r["length"] for r in by_problem if r["level"] == level)
    return {key: value for key, value in numbers.items() if value is not None}


# -------------------------------------------------------------------------------------------------
# The results


def _publish(options, study, lines, run_options=()):
    """Writes summary.json from the lines of all seeds, and prints the study's page."""
    metrics_of_seed = {}  # {seed: {key: number or text}}
    for line in lines:
        prefix = f"{line['arm']}." if line["arm"] else ""
        metrics_of_seed.setdefault(line["seed"], {}).update(
            {prefix + key: x for key, x in line["metrics"].items()})
    values, notes = {}, {}  # {key: {seed: value}} each
    for seed, of_seed in metrics_of_seed.items():
        combined = study.combine(of_seed) if hasattr(study, "combine") else {}
        for key, value in (of_seed | combined).items():
            if isinstance(value, str):
                notes.setdefault(key, {})[str(seed)] = value
            elif value is not None:
                values.setdefault(key, {})[str(seed)] = value
    metrics = {key: summarise(values[key]) for key in sorted(values)}
    for key, (first, second) in getattr(study, "DIFFERENCES", {}).items():
        if values.get(first, {}).keys() & values.get(second, {}).keys():
            metrics[key] = paired_difference(values[first], values[second])
    preset_words = [] if options.preset == "nano" else ["--preset", options.preset]
    command = " ".join(["python r1mini.py study", *preset_words, options.name, *run_options])
    summary = {"command": command, "commit": _join_names(lines, "commit", ", "),
               "machine": _join_names(lines, "machine", "; "), "seeds": list(metrics_of_seed),
               "metrics": metrics}
    path = Path(_results_folder(options)) / "summary.json"
    if not hasattr(study, "page"):
        curves = {label: curve for line in lines for label, curve in line["curves"].items()}
        first_folder, _ = _study_runs(study, summary["seeds"][0], options.preset)[0]
        print(write_results(path.parent, summary, curves, name_and_path(first_folder)[1]))
        return
    path.write_text(json.dumps(summary | {"notes": notes}, indent=1), "utf-8")
    lines = [f"# {options.name}", "", f"`{command}`", "", *study.page(metrics, notes), ""]
    if hasattr(study, "picture"):
        lines += write_picture(path.parent, options.name, study.picture(metrics))
    print("\n".join(lines))
    print(f"written: {path}\n"
          "python r1mini.py report --pages writes the numbers of results/ into the pages")


def _join_names(lines, key, separator):
    """The different commits or machines of lines. One line may have several of them."""
    names = {name for line in lines for name in line[key].split(separator)}
    return separator.join(sorted(names))
