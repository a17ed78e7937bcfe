"""Runs the workshop's experiments.

    python workshop/measure.py short_pays        an experiment of experiments.py
    python workshop/measure.py try zero zero.lr=1e-3           RL with this setting
    python workshop/measure.py try --mine advantage zero       RL with your own function
    python workshop/measure.py copy              a copy of the code, for you to edit
    python workshop/measure.py try --copy base   pretraining by your copy of the code
    python workshop/measure.py plain --seed 7    another seed, for the class's pool (pool.py)

Each run prints a table beside the kept plain run (seed 0), and ends with a line for pool.py.
`base` is pretraining from random weights, `zero` is RL from the kept base. Runs go into
runs/workshop/NAME, copies into workshop/mine/. Nothing else is written.

For those who maintain the workshop:

    python workshop/measure.py --keep            all experiments: keeps their curves, then
                                                 writes the pages, pictures and the notebook
    python workshop/measure.py --keep language   this experiment: its curves, then the pages
    python workshop/measure.py pages             the pages and pictures, from the kept curves

The kept curves are curves/NAME.json. writing.py makes the pages from them.
"""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

WORKSHOP = Path(__file__).resolve().parent
ROOT = WORKSHOP.parent
sys.path.insert(0, str(ROOT))
from engine.errors import UserError
from engine.folder import read_log
from workshop import check, copies, models, pool, run_notebook, writing
from workshop.experiments import EXPERIMENTS, PLAIN, SHORT, USES, Experiment

ON_DEV = ("pass@1", "length", "reflection", "mixing", "language", "format", "cut_off")
EACH_STEP = ("accuracy", "loss", "kl", "clip", "entropy", "dead_groups", "expert_load")
RUNS = "runs/workshop"
GRACE = 30  # seconds that a run has for its last step after Ctrl-C


# ------------------------------------------------------------------------------
# Running


def _start_path(experiment):
    """The checkpoint that RL starts from, relative to the project. `zero --from` wants a file
    that is called base.pt; from another model it gets a copy of this name."""
    if experiment.model == "base":
        return models.path_of("base").relative_to(ROOT)
    return Path(RUNS) / f"start_{experiment.model}" / "base.pt"


def _place_start(experiment):
    """Makes the checkpoint of start_path. UserError if the kept model is missing."""
    if experiment.start == "zero" and experiment.model != "base":
        target = ROOT / _start_path(experiment)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(models.path_of(experiment.model), target)


def _command(experiment):
    """The words of an experiment after `python r1mini.py`."""
    settings = f"{SHORT[experiment.start]} {experiment.settings}"
    start = ["--from", _start_path(experiment).as_posix()] if experiment.start == "zero" else []
    return [experiment.start, *start, "--set", *settings.split()]


def run(name, experiment, seed="0", code=None, student_file=None):
    """Runs an experiment into runs/workshop/NAME. Returns its curves. UserError if it fails.
    code: a folder of code, instead of the project with the experiment's edits."""
    _place_start(experiment)
    words, out = _command(experiment), f"{RUNS}/{name}"
    if seed != "0":
        words += ["--seed", seed]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    edited = copies.edited(experiment.edits, student_file)
    with contextlib.nullcontext(code) if code else edited as folder:
        print(f"== {name}: python r1mini.py", *words, "--out", out, flush=True)
        began, core_seconds_before = time.monotonic(), _core_seconds_of_children()
        main_command = [sys.executable, str(folder / "r1mini.py"), *words]
        _run_to_its_end([*main_command, "--out", out, "--fresh"], name)
    record = {"command": " ".join(["python r1mini.py", *words]), "edits": experiment.edits,
              "seconds": round(time.monotonic() - began), "load_before": round(load, 2),
              "core_seconds": round(_core_seconds_of_children() - core_seconds_before)}
    return record | _curves(ROOT / out)


def _run_to_its_end(words, name):
    """Runs a command. UserError if it fails. The command gets Ctrl-C too. Then this function
    waits until the command has saved its state."""
    process = subprocess.Popen(words, cwd=ROOT)
    try:
        process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        raise
    finally:
        process.terminate()  # needed if the command got no Ctrl-C, or this process got two
        process.wait()
    if process.returncode:
        raise UserError(f"{name}: the run failed; the message above says why")


def _core_seconds_of_children():
    """Processor time of the processes that this one has started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _curves(path):
    """What is kept of a run: {"dev": {key: [[step, value]]}, "steps": {key: [value per
    step]}} and more."""
    log = read_log(path)
    machine = json.loads((path / "timing.jsonl").read_text("utf-8").splitlines()[0])
    dev = [r for r in log if r["kind"] == "dev"]
    steps = [r for r in log if r["kind"] in ("zero", "base")]
    step_keys = [key for key in EACH_STEP if key in steps[0]]
    return {"machine": f"{machine['machine']}, {machine['threads']} threads",
            "tokens": sum(r["tokens"] for r in steps),
            "dev": {key: [[r["step"], _short(r[key])] for r in dev if r[key] is not None]
                    for key in ON_DEV},  # None: no answer has words
            "steps": {key: [_short(r[key]) for r in steps] for key in step_keys}}


def _short(x):
    """A number with four significant digits."""
    return float(f"{x:.4g}")


def _keep(name, record):
    """Writes curves/NAME.json, with one line for each curve."""
    text = re.sub(r"\n\s{3,}", " ", json.dumps(record, indent=1))
    writing.CURVES.mkdir(exist_ok=True)
    (writing.CURVES / f"{name}.json").write_text(text + "\n", "utf-8")


# ------------------------------------------------------------------------------
# The command


def _take_option(words, option):
    """(the word after an option, or None; the other words). UserError if it is missing."""
    if option not in words:
        return None, words
    i = words.index(option)
    if i + 1 == len(words):
        raise UserError(f"{option}: its value is missing")
    return words[i + 1], words[:i] + words[i + 2:]


def _take_seed(words):
    """(the seed as text, the other words). UserError if it is no whole number."""
    seed, words = _take_option(words, "--seed")
    if seed is not None and not seed.isdecimal():
        raise UserError(f"--seed {seed}: wanted a whole number")
    return str(int(seed or 0)), words


def _show(name, label, record, other, shows, seed):
    """Prints the table of a run beside the kept curves of another one, and the line for
    pool.py."""
    print("\n".join(writing.compare(label, record, other, shows)))
    rows = {key: writing.row(record, key) for key in pool.KEYS}
    print(f"For the class:\n{pool.line_of(name, seed, rows)}", flush=True)


def _is_usable(exercise):
    """Prints the checker's verdict on a student's function. UserError if it is not written."""
    check.place_exercises([exercise], copies.MINE)
    [(_, is_right, sentence)] = check.verdicts([exercise], copies.MINE)
    print(f"{exercise}: {sentence}")
    if sentence.endswith("not written yet"):
        raise UserError(f"write it first: {copies.MINE / exercise}.py")
    if not is_right:
        print("The run uses it all the same: see what it does.")


def _try_settings(words):
    """Runs `try [--mine EXERCISE] [--copy] [--seed N] START SETTINGS`, and prints the plain
    run beside it."""
    seed, words = _take_seed(words)
    exercise, words = _take_option(words, "--mine")
    uses_copy = "--copy" in words
    words = [word for word in words if word != "--copy"]
    if not words or words[0] not in PLAIN:
        raise UserError(f"try: choose where to start, one of {', '.join(PLAIN)}; then come "
                        "settings")
    if unknown := [word for word in words if word.startswith("-")]:
        raise UserError(f"try: there is no option {unknown[0]}; choose from --mine, --copy, --seed")
    if exercise and uses_copy:
        raise UserError("try: give --mine or --copy, not both")
    start, *settings = words
    edits, student_file = (), None
    if exercise:
        edits, student_file = copies.edits_for(exercise), copies.MINE / f"{exercise}.py"
        _is_usable(exercise)
        settings = [*USES[exercise].settings.split(), *settings]
    if uses_copy:
        print("Your copy differs from the project:", *copies.changed_lines(), sep="\n")
    plain = PLAIN[start]
    experiment = Experiment(start, " ".join(settings), edits, shows=EXPERIMENTS[plain].shows)
    record = run("try", experiment, seed, copies.CODE if uses_copy else None, student_file)
    name = " ".join([*(["mine", exercise] if exercise else ["copy"] if uses_copy else []),
                     *settings]) or plain
    _show(name, "yours", record, plain, experiment.shows, seed)


def measure(words):
    """Runs the experiments that the words name. With --keep it keeps their curves and writes the
    pages. With --keep alone it runs all experiments and the notebook."""
    seed, words = _take_seed(words)
    keeps = "--keep" in words
    names = [word for word in words if word != "--keep"]
    if not names and not keeps:
        raise UserError(f"which experiment? Choose from {', '.join(EXPERIMENTS)}; or try, copy, "
                        "pages (workshop/experiments.md)")
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise UserError(f"there is no experiment {unknown[0]!r}; choose from "
                        f"{', '.join(EXPERIMENTS)}, or try, copy, pages")
    if keeps and seed != "0":
        raise UserError("--keep is for seed 0, which the pages are about")
    for name in names or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        record = run(name, experiment, seed)
        if keeps:
            _keep(name, record)
        _show(name, name, record, experiment.compared_with, experiment.shows, seed)
    if keeps:
        writing.write_pages()
        if not names:
            run_notebook.write_notebook()


def main(words):
    """Runs what the words ask for. Returns 0, or 2 for what the user can correct, or
    130 after Ctrl-C."""
    try:
        if words[:1] == ["try"]:
            _try_settings(words[1:])
        elif words == ["copy"]:
            print(copies.make_student_copy())
        elif words == ["pages"]:
            writing.write_pages()
        else:
            measure(words)
    except (UserError, OSError) as error:
        print(f"measure: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("measure: stopped; the same command starts afresh", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
