"""Tests of workshop/: the kept models, experiments, exercises, pages, quiz and notebook."""
import ast
import builtins
import importlib
import inspect
import json
import operator
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

import grpo
import moe
import tasks
from engine import checkpoint, evaluate
from engine.errors import UserError
from engine.folder import read_log
from tests.helpers import MICRO, ROOT
from tools import cli
from tools.compare import paired_difference, summarise
from workshop import (
    check,
    copies,
    experiments,
    hints,
    judge,
    measure,
    models,
    own,
    pictures,
    pool,
    run_notebook,
    shrink,
    writing,
)

WORKSHOP = ROOT / "workshop"
EXPERIMENTS = experiments.EXPERIMENTS
NOTEBOOK = json.loads((WORKSHOP / "r1mini.ipynb").read_text("utf-8"))
CELLS = run_notebook._code_cells(NOTEBOOK)
CODE = ["".join(cell["source"]) for cell in CELLS]


# --------------------------------------------------------------------------------------------------
# The kept models


def test_workshop_base_is_small_and_sometimes_right():
    """The kept base is under 2.5 MB of bfloat16, has nano's sizes, is float32 once loaded, and
    is right in 10 to 30% of answers, so RL has something to reward."""
    path = models.path_of("base")
    kept = torch.load(path, weights_only=True)["model"].values()
    assert path.stat().st_size < 2.5e6 and {x.dtype for x in kept} == {torch.bfloat16}
    model, record = checkpoint.load(path)
    assert {x.dtype for x in model.state_dict().values()} == {torch.float32}
    assert model.config == cli.resolve_settings(record["preset"], []).model
    problems = tasks.make_problems("dev", 32, (3, 4, 5, 6))
    found, _ = evaluate.evaluate(model, problems, 8, 1.0, 1.0, 200)
    assert 0.1 < found["pass@1"] < 0.3 and found["cut_off"] < 0.05


def test_workshop_shrink_rounds_to_bfloat16(tmp_path, capsys):
    """shrink.py rounds every weight as torch rounds to bfloat16, and a missing argument is refused
    by one line and exit code 2."""
    torch.manual_seed(0)
    model = moe.Transformer(MICRO)
    checkpoint.save(tmp_path / "base.pt", model, preset="micro")
    assert shrink.main([str(tmp_path / "base.pt"), str(tmp_path / "small.pt")]) == 0
    small, record = checkpoint.load(tmp_path / "small.pt")
    assert record == {"preset": "micro"}
    for name, weight in model.state_dict().items():
        assert torch.equal(small.state_dict()[name], weight.bfloat16().float()), name
    assert shrink.main(["one.pt"]) == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of the kept models. Here they are random micro models."""
    monkeypatch.setattr(models, "KEPT", tmp_path)
    for seed, name in enumerate(models.NAMES):
        torch.manual_seed(seed)
        checkpoint.save(tmp_path / f"{name}.pt", moe.Transformer(MICRO), preset="micro")
    return tmp_path


def test_workshop_models_answer_a_question(kept, monkeypatch, capsys):
    """Each kept model answers one question, with its verdict. A sum may be written as people write
    it; its right answer is worked out. A missing model is an error that says what to do."""
    monkeypatch.setattr(models, "LIMIT", 5)
    assert models.main(["25 - 7", "+9"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Compute 25-7+9 (right: 27)\n")
    for name in models.NAMES:
        assert re.search(rf"\n{name}, \d tokens, wrong\n    ", out)
    assert models.main(["what", "is", "this"]) == 2
    assert capsys.readouterr().err == "models: 'what is this' is no sum such as 25-7+9+6\n"
    (kept / "student.pt").unlink()
    assert models.main(["25-7"]) == 2
    assert "student.pt is missing: git checkout" in capsys.readouterr().err


def test_workshop_models_are_compared(kept, monkeypatch, capsys):
    """The table has a row for each model: what evaluate() says of it."""
    monkeypatch.setattr(models, "LIMIT", 5)
    monkeypatch.setattr(models, "LEVELS", (2,))
    assert models.main(["compare"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    means, _ = evaluate.evaluate(models.load("zero"), tasks.make_problems("dev", 48, (2,)), 4,
                                 1.0, 1.0, 5)
    assert ["right", "tokens", "checks", "mixes", "format"] in rows
    assert ["zero", f"{means['pass@1']:.0%}", f"{means['length']:.0f}",
            f"{means['reflection']:.0%}", f"{means['mixing'] or 0:.0%}",
            f"{means['format']:.0%}"] in rows


# --------------------------------------------------------------------------------------------------
# Experiments


def test_workshop_frontier_starts_from_zero(kept, tmp_path, monkeypatch):
    """`zero --from` wants a file named base.pt. It gets Zero's weights under this name."""
    monkeypatch.setattr(measure, "RUNS", str(tmp_path / "runs"))
    experiment = EXPERIMENTS["frontier"]
    measure._place_start(experiment)
    path = Path(measure._command(experiment)[2])
    assert path.name == "base.pt" and path.read_bytes() == (kept / "zero.pt").read_bytes()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_workshop_experiments_are_understood(name, monkeypatch):
    """Every experiment's settings exist, the shipped base has the right sizes, and the edited code
    is Python that differs in the edit only."""
    monkeypatch.chdir(ROOT)
    # All kept models but the student have the sizes of the base.
    monkeypatch.setattr(measure, "_start_path", lambda _: models.path_of("base"))
    experiment = EXPERIMENTS[name]
    run, stages = cli._plan_run(cli.parse_arguments(measure._command(experiment)))
    assert stages == [experiment.start]
    with copies.edited(experiment.edits) as code:
        assert (code == ROOT) == (not experiment.edits)
        for file, before, after in experiment.edits:
            text = (code / file).read_text("utf-8")
            ast.parse(text)
            assert text.replace(after, before) == (ROOT / file).read_text("utf-8")


def test_workshop_edit_that_does_not_fit_is_refused():
    """An edit whose line is not in the file is refused, and the unchanged code is not run in its
    place."""
    with pytest.raises(UserError, match="moe.py has changed"):
        with copies.edited([("moe.py", "no such line", "")]):
            pass


# A random model earns nothing for right answers; words in the right language make groups live.
TINY_RUN = {"zero": "zero.steps=2 zero.dev_every=1 eval.samples=2 zero.problems=2 "
                    "zero.group_size=4 zero.max_new_tokens=8 zero.minibatches=1 "
                    "zero.language_weight=1 data.prompts=1 eval.longer=1 eval.problems=2 "
                    "eval.dev_problems=2",
            "base": "base.steps=2 base.dev_every=1 eval.samples=2 eval.problems=2 eval.longer=1 "
                    "data.prompts=1"}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Runs of measure.py are of the micro preset and take seconds. They go into the folder that
    is returned; what a student writes is in its folder mine."""
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "base.pt", moe.Transformer(MICRO), preset="micro")
    monkeypatch.setattr(measure, "RUNS", str(tmp_path))
    monkeypatch.setattr(measure, "SHORT", TINY_RUN)
    monkeypatch.setattr(measure, "_start_path", lambda _: tmp_path / "base.pt")
    command = measure._command
    monkeypatch.setattr(measure, "_command", lambda experiment: [
        *command(experiment)[:1], "--preset", "micro", *command(experiment)[1:]])
    monkeypatch.setattr(copies, "MINE", tmp_path / "mine")
    monkeypatch.setattr(copies, "CODE", tmp_path / "mine" / "code")
    return tmp_path


@pytest.mark.parametrize("name", [  # each takes seconds, so that one is enough for every day
    name if name == "kimi" else pytest.param(name, marks=pytest.mark.slow)
    for name in experiments.USES])
def test_workshop_students_function_trains(name, tiny, capfd):
    """A run with the solution in the loop gives the same log as the run without it, but for
    rounding. The solution was called there, and not only by the checker: it leaves a mark."""
    (tiny / "mine").mkdir()
    mark = tiny / "called"
    text = (WORKSHOP / f"solutions/{name}.py").read_text("utf-8")
    leave_mark = f"    if __name__ == 'mine':\n        open({str(mark)!r}, 'w').close()\n"
    text = text.replace("    return", f"{leave_mark}    return")
    (tiny / f"mine/{name}.py").write_text(text, "utf-8")
    use = experiments.USES[name]
    assert measure.main(["try", "--mine", name, use.start]) == 0
    out = capfd.readouterr().out
    assert f"{name}: right\n" in out and "For the class:\nr1mini | mine " + name in out
    # The row in which a reward with a hole shows.
    assert use.start == "base" or "| accuracy, yours | " in out
    mine = [r for r in read_log(tiny / "try") if r["kind"] == use.start]
    mark.unlink()
    assert measure.main(["try", use.start, *use.settings.split()]) == 0
    plain = [r for r in read_log(tiny / "try") if r["kind"] == use.start]
    assert not mark.exists() and len(plain) == 2
    assert use.start == "base" or plain[0]["dead_groups"] < 1
    for one, other in zip(mine, plain):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[key], rel=1e-3, abs=1e-6), key


@pytest.mark.slow
def test_workshop_students_function_may_be_wrong_but_not_missing(tiny, capfd):
    """A function that is not written is refused by one line. A wrong one runs, after a warning."""
    assert measure.main(["try", "--mine", "bias", "base"]) == 2
    out, err = capfd.readouterr()
    assert "bias: your function is not written yet" in out and err.count("\n") == 1
    path = tiny / "mine/bias.py"
    path.write_text(path.read_text("utf-8").replace("raise NotImplementedError", "return bias"))
    assert measure.main(["try", "--mine", "bias", "base"]) == 0
    assert "see what it does" in capfd.readouterr().out
    assert measure.main(["try", "--mine", "router", "base"]) == 2
    assert "--mine router: no run uses this" in capfd.readouterr().err


def test_workshop_students_copy_is_what_runs(tiny, capfd):
    """`copy` copies the code; a second one keeps the first. `try --copy` prints what was changed
    and runs it. Without a change there is nothing to try."""
    project = (ROOT / "moe.py").read_text("utf-8")
    assert measure.main(["try", "--copy", "base"]) == 2
    assert measure.main(["copy"]) == 0
    assert measure.main(["try", "--copy", "base"]) == 2
    assert "is still as the project is" in capfd.readouterr().err
    file, before, after = EXPERIMENTS["softmax_router"].edits[0]
    path = copies.CODE / file
    path.write_text(path.read_text("utf-8").replace(before, after), "utf-8")
    assert measure.main(["try", "base"]) == 0
    plain = [r["loss"] for r in read_log(tiny / "try") if r["kind"] == "base"]
    assert measure.main(["try", "--copy", "base"]) == 0
    assert f"moe.py\n  -        {before}" in capfd.readouterr().out
    assert [r["loss"] for r in read_log(tiny / "try") if r["kind"] == "base"] != plain
    assert (ROOT / "moe.py").read_text("utf-8") == project
    assert measure.main(["copy"]) == 0
    assert after in (copies.MINE / "code.old1" / file).read_text("utf-8")
    assert path.read_text("utf-8") == project


def test_workshop_try_runs_and_compares_with_the_plain_run(tiny, capfd):
    """measure.py try runs the command with its settings and seed, and prints a table beside the
    plain run and a line for the pool. An experiment whose run fails is an error."""
    assert measure.main(["try", "base", "eval.samples=1", "--seed", "3"]) == 0
    out = capfd.readouterr().out
    assert "data.prompts=1 eval.samples=1 --seed 3 --out" in out
    assert "| after step | 1 | 2 |" in out and "| loss, yours | 6." in out
    [line] = [line for line in out.splitlines() if line.startswith("r1mini | ")]
    assert line.startswith("r1mini | eval.samples=1 | seed 3 | pass@1 1=0 2=0 | length 1=")
    assert pool._read_lines(line)["eval.samples=1"]["pass@1"] == {"3": {1: 0.0, 2: 0.0}}
    edit = "r1mini.py", '"""r1mini: DeepSeek', 'raise SystemExit(3)\n"""r1mini: DeepSeek'
    with pytest.raises(UserError, match="odd: the run failed"):
        measure.run("odd", experiments.Experiment("base", edits=(edit,)))


def test_workshop_measure_writes_into_the_workshop_only_if_asked(tmp_path, monkeypatch, capsys):
    """measure.py NAME prints a table and writes nothing, and without a name it asks for one. With
    --keep it keeps the curves, then writes the pages; after all experiments the notebook too.
    `pages` writes them without a run."""
    record = {"dev": {"pass@1": [[0, 0.1], [2, 0.5]], "length": [[0, 9.0]]},
              "steps": {"loss": [2.0, 1.0]}}
    written = []
    monkeypatch.setattr(writing, "CURVES", tmp_path / "curves")
    monkeypatch.setattr(measure, "run", lambda *words: record)
    monkeypatch.setattr(writing, "write_pages", lambda: written.append("pages"))
    monkeypatch.setattr(run_notebook, "write_notebook", lambda: written.append("notebook"))
    assert measure.main(["clip_10"]) == 0
    assert "| pass@1, clip_10 | 0.100 | 0.500 |" in capsys.readouterr().out
    assert measure.main([]) == 2 and "which experiment? Choose from" in capsys.readouterr().err
    assert not written and not list(tmp_path.iterdir())
    assert measure.main(["--keep", "clip_10"]) == 0 and written == ["pages"]
    assert json.loads((tmp_path / "curves/clip_10.json").read_text("utf-8")) == record
    assert [path.name for path in (tmp_path / "curves").iterdir()] == ["clip_10.json"]
    assert measure.main(["pages"]) == 0 and written == ["pages"] * 2
    assert measure.main(["--keep"]) == 0 and written == ["pages"] * 3 + ["notebook"]
    assert {path.stem for path in (tmp_path / "curves").iterdir()} == set(EXPERIMENTS)


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_workshop_try_says_what_ctrl_c_leaves(tmp_path):
    """Ctrl-C lets the run save its state. The run says how it goes on, and measure.py says that
    the same `try` starts afresh."""
    code = ("import sys; from workshop import measure; measure.RUNS = sys.argv[1]; "
            "measure._command = lambda _: 'base --preset micro --set base.steps=5000 "
            "base.dev_every=5000'.split(); "
            "sys.exit(measure.main(['try', 'base']))")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          start_new_session=True) as run:
        timing = tmp_path / "try/timing.jsonl"
        while run.poll() is None and not (timing.exists() and timing.read_text().count("\n") > 1):
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGINT)
        out, errors = run.communicate(timeout=120)
    assert run.returncode == 130 and "Traceback (most" not in errors, errors
    assert "r1mini: stopped; the same command without --fresh goes on where it stopped" in errors
    assert errors.splitlines()[-1] == "measure: stopped; the same command starts afresh"
    assert "Ctrl-C saves; the same command without --fresh goes on." in out
    assert (tmp_path / "try/base.partial.pt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
@pytest.mark.parametrize("ends_by_itself, grace", [(True, 100), (False, 0.01)])
def test_workshop_measure_waits_for_a_stopped_run(tmp_path, monkeypatch, ends_by_itself, grace):
    """At Ctrl-C measure.py waits until the run has saved. If the run goes on, since only measure.py
    got Ctrl-C, measure.py ends it after the grace."""
    monkeypatch.setattr(measure, "GRACE", grace)
    code = ("import os, sys, time; from pathlib import Path; "
            "Path('pid').write_text(str(os.getpid())); time.sleep(0.3); "
            "os.kill(os.getppid(), 2); time.sleep(float(sys.argv[1])); Path('saved').touch()")
    monkeypatch.setattr(measure, "ROOT", tmp_path)  # where it runs
    seconds = "0.5" if ends_by_itself else "100"
    with pytest.raises(KeyboardInterrupt):
        measure._run_to_its_end([sys.executable, "-c", code, seconds], "name")
    assert (tmp_path / "saved").exists() == ends_by_itself
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("given", [["try"], ["try", "sideways"], ["nonsense"],
                                   ["--keep", "nonsense"], ["--pages"], ["plain", "pages"],
                                   ["plain", "--seed"], ["try", "zero", "--seed", "x"],
                                   ["try", "--mine", "nonsense", "zero"], ["try", "zero", "--keep"],
                                   ["try", "--mine", "kl", "--copy", "zero"],
                                   ["--keep", "plain", "--seed", "1"]])
def test_workshop_measure_refuses_wrong_words(given, capsys):
    """A wrong word is refused by one line and exit code 2 before anything runs."""
    assert measure.main(given) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_workshop_table_has_the_steps_evaluated_on_dev(monkeypatch):
    """By hand: the table has a column for each evaluation on dev, for curves on dev and for those
    of every step, and empty cells where the plain run has no value."""
    ours = {"dev": {"pass@1": [[0, 0.1], [2, 0.5]]}, "steps": {"kl": [0.01, 20.0]}}
    plain = {"dev": {"pass@1": [[0, 0.1], [2, 0.25]]}, "steps": {}}
    monkeypatch.setattr(writing, "_kept_curves", {"plain": plain}.get)
    assert writing.compare("x", ours, "plain", ("pass@1", "kl")) == [
        "| after step | 0 | 2 |", "|---|---|---|", "| pass@1, plain | 0.100 | 0.250 |",
        "| pass@1, x | 0.100 | 0.500 |", "| kl, plain |  |  |", "| kl, x |  | 20.0 |"]
    alone = ["| after step | 0 | 2 |", "|---|---|---|", "| pass@1, plain | 0.100 | 0.250 |"]
    assert writing.compare("plain", plain, "plain", ("pass@1",)) == alone
    assert len(writing.compare("x", ours, "missing", ("pass@1",))) == 3


def test_workshop_changes_are_written_from_the_experiments(monkeypatch):
    """fill() writes what an experiment changes, by hand: the edit, the settings, the command and
    the time. Filling twice equals filling once."""
    record = {"seconds": 90, "machine": "a laptop"}
    monkeypatch.setattr(writing, "_kept_curves", lambda name: record)
    text = "before\n<!-- change softmax_router -->\nold\n<!-- end -->\nafter\n"
    edit = EXPERIMENTS["softmax_router"].edits[0]
    expected = (
        "before\n<!-- change softmax_router -->\n\n```\npython workshop/measure.py copy\n```\n\n"
        f"In `workshop/mine/code/moe.py`, instead of\n\n```python\n{edit[1]}\n```\n\nput\n\n"
        f"```python\n{edit[2]}\n```\n\n```\npython workshop/measure.py try --copy base "
        "model.bias_speed=0 model.balance_alpha=0\n```\n\n**Time.** 1.5 minutes (a laptop).\n\n"
        "<!-- end -->\nafter\n")
    assert writing._fill(text) == expected == writing._fill(expected)
    assert "measure.py frontier\n" in "\n".join(writing._change("frontier"))
    assert "try zero zero.length_weight=0.3\n" in "\n".join(writing._change("length_reward")) + "\n"


def test_workshop_answer_has_picture_and_table(monkeypatch):
    """By hand: the titles of a picture have the last values of the curves, and of the run beside
    it. An experiment without kept curves says so."""
    ours = {"dev": {"pass@1": [[0, 0.1], [2, 0.25]], "length": [[0, 9.0]], "format": [[0, 0.5]]},
            "steps": {"dead_groups": [0.5, 0.75]}}
    plain = {"dev": {"pass@1": [[0, 0.1], [2, 0.5]]}, "steps": {"dead_groups": [0.5, 0.0]}}
    monkeypatch.setattr(writing, "_kept_curves", {"group_of_2": ours, "plain": plain}.get)
    lines = writing.answer("group_of_2")
    assert lines[0] == ("![25% right, plain 50%; 75% of the groups teach nothing]"
                        "(curves/figures/group_of_2.png)")
    assert "| pass@1, group_of_2 | 0.100 | 0.250 |" in lines
    assert [panel.title for panel in writing._picture_of("group_of_2").panels] == [
        "25% right,\nplain 50%", "75% of the groups\nteach nothing"]
    assert writing.answer("language") == [
        "Not measured yet: `python workshop/measure.py --keep language`."]


@pytest.mark.parametrize("page", ["experiments", "answers"])
def test_workshop_pages_are_up_to_date(page):
    """The page is as `python workshop/measure.py pages` writes it."""
    text = (WORKSHOP / f"{page}.md").read_text("utf-8")
    assert writing._fill(text) == text


def test_workshop_experiments_are_asked_and_answered():
    """Every experiment has its change among the questions and its curve among the answers, in the
    order of experiments.py. Each question says what to look at and which sentence to write."""
    questions, answers = ((WORKSHOP / f"{page}.md").read_text("utf-8")
                          for page in ("experiments", "answers"))
    asked = [name for name in EXPERIMENTS if name not in experiments.BESIDE]
    assert re.findall(r"<!-- change (\w+) -->", questions) == asked
    answered = re.findall(r"<!-- answer (\w+) -->", answers)
    assert [name for name in answered if name in asked] == asked
    assert set(answered) == set(EXPERIMENTS)
    assert questions.count("**Look at** ") == questions.count("**Write down.** ") == len(asked)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_workshop_experiments_show_their_main_result(name, tmp_path, monkeypatch):
    """Every experiment runs as a class runs it, and its curves end as its answer says."""
    monkeypatch.setattr(measure, "RUNS", str(tmp_path))
    record = measure.run(name, EXPERIMENTS[name])
    end = {key: list(writing.row(record, key).values())[-1]
           for key in (*record["dev"], *record["steps"])}
    assert {"plain": lambda: end["pass@1"] > 0.6 and end["length"] > 60,
            "short_pays": lambda: end["length"] < 20 and end["pass@1"] < 0.3,
            "format_only": lambda: end["format"] > 0.95 and end["pass@1"] < 0.3,
            "language": lambda: end["language"] > 0.8,
            "group_of_2": lambda: end["pass@1"] < 0.5 and end["dead_groups"] > 0.3,
            "length_reward": lambda: end["pass@1"] > 0.6 and end["length"] < 76,
            "from_base": lambda: end["pass@1"] > 0.2,
            "frontier": lambda: end["pass@1"] > 0.7,
            "pretraining": lambda: end["cut_off"] < 0.1,
            "pad_is_eos": lambda: end["cut_off"] > 0.7 and end["pass@1"] == 0,
            "softmax_router": lambda: end["expert_load"] > 2.5,
            }.get(name, lambda: end["pass@1"] > 0.4)()


@pytest.mark.parametrize("page", sorted(path.name for path in WORKSHOP.glob("*.md")))
def test_workshop_commands_of_the_pages_are_understood(page, monkeypatch):
    """Each command of r1mini.py on a page is one that the program accepts, and finds the kept
    models that it starts from. Each script of the workshop that a page names is there."""
    monkeypatch.chdir(ROOT)
    text = (WORKSHOP / page).read_text("utf-8")
    for words in re.findall(r"python r1mini\.py ([^`\n]+)", text):
        options = cli.parse_arguments(words.split())
        if "--from" in words:
            cli._plan_run(options)
    for script in re.findall(r"python (workshop/\S+?\.py)", text):
        assert (ROOT / script).exists(), script


# --------------------------------------------------------------------------------------------------
# Functions to write


def fault_of(name, function):
    """What the checker says is wrong with a function."""
    with pytest.raises(judge.Fault) as error:
        judge.judge(judge.EXERCISES[name], function, __file__)
    return str(error.value)


def accept(name, function):
    """What the checker adds to "right". Fault if the function is wrong."""
    return judge.judge(judge.EXERCISES[name], function, __file__)


def test_workshop_check_knows_the_exercises():
    """check.py names them without torch, in the order of judge.py. Each has a file, hints, and a
    solution, which the checker accepts."""
    assert check.NAMES == tuple(judge.EXERCISES)
    assert set(hints.HINTS) == set(check.NAMES)
    for folder in ("exercises", "solutions"):
        assert {path.stem for path in (WORKSHOP / folder).glob("*.py")} == set(check.NAMES)
    for name in check.NAMES:
        assert judge.verdict(name, WORKSHOP / "solutions") == (True, "right"), name
        assert len(hints.HINTS[name]) >= 3


@pytest.mark.parametrize("name", [name for name in judge.EXERCISES
                                  if judge.EXERCISES[name].gradient])
def test_workshop_check_wants_the_gradient(name):
    """The gradient that the checker wants is that of finite differences. A function with the right
    values and no gradient, or half of it, is refused."""
    exercise = judge.EXERCISES[name]
    case = judge._copied(exercise.cases[0])
    for argument, found in judge._gradients(exercise, exercise.right).items():
        i = exercise.gradient[argument]

        def weighted(x):
            result = exercise.right(*case[:i], x, *case[i + 1:])
            return (result * torch.arange(1.0, 1 + result.numel()).view(result.shape)).sum()

        direction = torch.rand(case[i].shape, generator=torch.Generator().manual_seed(0)) - 0.5
        h = 1e-2  # small enough that no score of the router leaves 0 to 1
        with torch.no_grad():
            difference = weighted(case[i] + h * direction) - weighted(case[i] - h * direction)
        along = float((found * direction).sum())
        assert float(difference) / (2 * h) == pytest.approx(along, rel=2e-2, abs=1e-2)

    first = next(iter(exercise.gradient))
    cut = fault_of(name, lambda *case: exercise.right(*case).detach())
    assert cut.startswith(f"gives the right values, but no gradient reaches `{first}`")

    def half(*case):
        result = exercise.right(*case)
        return result / 2 + result.detach() / 2

    assert fault_of(name, half).startswith("gives the right values, but a wrong gradient for")


@pytest.mark.parametrize("name", judge.EXERCISES)
def test_workshop_check_names_every_known_mistake(name):
    """The checker names every known mistake and variant by its own sentence, and accepts r1mini's
    function, so no two of them agree on all cases."""
    exercise = judge.EXERCISES[name]
    assert accept(name, exercise.right) == ""
    for sentence, variant in exercise.variants.items():
        assert accept(name, variant) == sentence
    for sentence, mistaken in exercise.mistakes.items():
        assert fault_of(name, mistaken) == sentence


def divided(rewards, std):
    """Centred rewards, divided."""
    return (rewards - rewards.mean(1, keepdim=True)) / std


@pytest.mark.parametrize("epsilon", [1e-4, 1e-5, 1e-6, 1e-8])
def test_workshop_check_accepts_an_epsilon(epsilon):
    """An epsilon beside the standard deviation or under its root is right: the paper names none.
    TRL's 1e-4 is named. The epsilon does not hide a mistake."""
    def beside(rewards, unbiased=True):
        return divided(rewards, rewards.std(1, keepdim=True, unbiased=unbiased) + epsilon)

    def under_the_root(rewards):
        return divided(rewards, (rewards.var(1, keepdim=True) + epsilon).sqrt())

    for function in (beside, under_the_root):
        assert ("as TRL does" in accept("advantage", function)) == (epsilon == 1e-4)
    assert "by G inside the standard deviation" in fault_of("advantage", lambda r: beside(r, False))


def by_hand_advantages(rewards):
    """Advantages with a small number in the denominator, as many write them."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-6)


def by_hand_kl(new, reference):
    """k3 by a loop over tokens."""
    ratios = [b.exp() / a.exp() for a, b in zip(new.flatten(), reference.flatten())]
    return torch.stack([x - x.log() - 1 for x in ratios]).view(new.shape)


def by_hand_kimi(new, old, advantage, mask, tau):
    """Kimi's objective by a loop over answers and tokens."""
    total = 0.0
    for n in range(len(new)):
        log_ratio = sum(new[n, t] - old[n, t] for t in range(new.size(1)) if mask[n, t])
        total = total + advantage[n] * log_ratio - tau * log_ratio * log_ratio / 2
    return total / len(new)


def by_hand_bias(bias, load, speed):
    """The bias update, expert by expert."""
    mean = sum(load.tolist()) / len(load)
    moves = [speed if x < mean else -speed if x > mean else 0.0 for x in load.tolist()]
    return torch.tensor([b + move for b, move in zip(bias.tolist(), moves)])


def by_hand_attend(q, q_rope, latent, k_rope, w_uk, w_uv, scale):
    """Absorbed attention, head by head."""
    out = []
    for h in range(len(q)):
        score = (latent @ (w_uk[h].T @ q[h]) + k_rope @ q_rope[h]) * scale
        out.append(w_uv[h] @ (score.softmax(0) @ latent))
    return torch.stack(out)


def by_hand_reward(text, answer):
    """The reward by cutting the text, without one regular expression for all."""
    head, found, tail = text.rpartition("<answer>")
    given, closed, after = tail.partition("</answer>")
    if head.startswith("<think>"):
        thought, end, between = head[len("<think>"):].partition("</think>")
        fits = end and "<" not in thought + between and len(between) <= 40 and not re.search(
            r"[\d\n>]", between)
    else:
        fits = "<" not in head
    plain = given.isascii() and re.fullmatch("0|-?[1-9][0-9]*", given)
    return float(bool(found and closed and not after and fits and plain and given == answer))


@pytest.mark.parametrize("name, function", [
    ("advantage", by_hand_advantages), ("kl", by_hand_kl), ("kimi", by_hand_kimi),
    ("bias", by_hand_bias),
    ("absorbed", by_hand_attend), ("reward", by_hand_reward),
    ("reward", lambda text, answer: by_hand_reward(text, answer) == 1.0)])
def test_workshop_check_accepts_other_right_solutions(name, function):
    """The checker accepts right solutions that are written in another way than r1mini's."""
    assert accept(name, function) == ""


def in_place(rewards):
    """Right advantages, written over the rewards."""
    rewards -= rewards.mean(1, keepdim=True)
    rewards /= rewards.std(1, keepdim=True).clamp(min=1e-6)
    return rewards


def raises(error):
    """A function of two arguments that raises this error."""
    def function(*arguments):
        raise error
    return function


def reward_by(pattern, matches=re.fullmatch):
    """A reward by one pattern, whose first group has to be the answer."""
    def reward(text, answer):
        found = matches(pattern, text, re.S)
        return float(found is not None and found[1] == answer)
    return reward


TEMPLATE = r"(?:<think>[^<]*</think>{}{{0,40}}|[^<]*)<answer>(0|-?[1-9][0-9]*)</answer>"


@pytest.mark.parametrize("name, function, sentence", [
    ("absorbed", judge.attend, "it makes the keys of every token"),
    ("router", judge._route, "right values, but no gradient reaches `scores`"),
    ("kl", lambda a, b: grpo.kl_k3(torch.tensor(a.numpy()), b), "gradient is wanted it raises Run"),
    ("advantage", lambda r: r.mean(1), r"returns the shape \(2,\)\. It should be \(2, 4\)"),
    ("advantage", lambda r: r.nothing, "raises AttributeError in line"),
    ("advantage", lambda r: None, "returns None. It should return a tensor"),
    ("advantage", lambda r: r.tolist(), "returns list. It should return a tensor"),
    ("advantage", lambda r: r.numpy(), "returns ndarray. It should return a tensor"),
    ("advantage", in_place, "right result, but it changes its argument"),
    ("advantage", lambda: 0, r"^raises TypeError: .* takes 0 positional arguments"),
    ("kl", lambda a, b: a * b, "none of the usual mistakes"),
    ("kl", raises(NotImplementedError()), "^is not written yet$"),
    ("kl", raises(NotImplementedError("on this device")), "raises NotImplementedError .* device$"),
    ("kl", raises(SystemExit(0)), "raises SystemExit in line .*, `raise error`: 0"),
    ("kl", raises(KeyboardInterrupt()), "raises KeyboardInterrupt in line .*, `raise error`$"),
    ("kl", raises(ValueError("x" * 300 + "\nmore")), r"`raise error`: \.\.\.$"),
    ("reward", lambda text, answer: "1.0", "returns str. It should return a number"),
    ("reward", lambda text, answer: float(answer in text), "pays for a wrong number"),
    ("reward", reward_by(TEMPLATE.format("[^<>0-9]")), "pays for a summary of two lines"),
    ("reward", reward_by(TEMPLATE.format(r"[^<>0-9\n]")), "a digit that is not ASCII in the summ"),
    ("reward", reward_by(TEMPLATE.format(r"[^<>\d\n]") + "$", re.match), "\\$ accepts it"),
    ("reward", lambda text, answer: float(text[0] == answer),
     "raises IndexError in .*, for the text ''")])
def test_workshop_check_describes_other_faults(name, function, sentence):
    """A fault beyond the known mistakes is described: a wrong shape or type, an error and its
    line, sys.exit(), an argument that is changed, a wrong payment."""
    assert re.search(sentence, fault_of(name, function))


@pytest.mark.parametrize("name, function", [
    ("advantage", lambda r: torch.std(r, 7)),
    ("reward", lambda text, answer: re.match("(", text))])
def test_workshop_check_names_the_students_line(name, function):
    """An error that torch or re raises is reported at the line of the student that led to it, with
    its text."""
    number = function.__code__.co_firstlineno
    text = Path(__file__).read_text("utf-8").splitlines()[number - 1].strip()
    assert f" in line {number}, `{text}`: " in fault_of(name, function)


RIGHT_KL = """def kl_k3(new, reference):
    print("x")
    x = (reference - new).exp()
    return x - x.log() - 1
"""


@pytest.mark.parametrize("text, sentence", [
    (b"def kl_k3(new, reference)\n    return new\n", "line 1: Python cannot read this line: expec"),
    (b"x = 1\n  y = 2\n", "line 2: Python cannot read this line: unexpected indent"),
    (b"import no_such_module\n", "raises ModuleNotFoundError in line 1, `import no_such_module`: "),
    (b"import sys\nsys.exit()\n", r"raises SystemExit in line 2, `sys.exit\(\)`$"),
    (b"raise KeyboardInterrupt\n", "raises KeyboardInterrupt in line 1"),
    (b"", "there is no function kl_k3 in this file"),
    ("# é".encode("latin-1"), "this is not text in UTF-8"),
    ("# e".encode("utf-16"), "this is not text in UTF-8"),
    ("# e".encode("utf-16-le"), "this is not text in UTF-8"),
    (None, "No such file")])
def test_workshop_check_describes_a_file_that_does_not_load(tmp_path, text, sentence):
    """A broken, empty, missing or wrongly encoded file gets its path and what is wrong with it."""
    if text is not None:
        (tmp_path / "kl.py").write_bytes(text)
    is_right, said = judge.verdict("kl", tmp_path)
    assert not is_right and said.startswith(str(tmp_path / "kl.py")) and re.search(sentence, said)


def test_workshop_check_reads_the_file_anew(tmp_path):
    """A change of one character within the same second is seen, also after a mark at the start of
    the file."""
    for text in (RIGHT_KL, RIGHT_KL.replace("- 1", "+ 1"), RIGHT_KL):
        (tmp_path / "kl.py").write_text(text, "utf-8-sig")
        assert judge.verdict("kl", tmp_path)[0] == ("- 1" in text)


def test_workshop_check_prints_a_verdict_for_each_exercise(tmp_path, capfd):
    """The first check puts the exercises into the student's folder; none is written yet. A wrong
    name is refused."""
    assert check.main([], tmp_path / "mine") == 1
    out = capfd.readouterr().out
    assert out.count("your function is not written yet") == len(check.NAMES)
    assert out.count("write the function there") == len(check.NAMES)
    for words in (["nonsense"], ["hint"], ["hint", "nonsense"], ["hint", "kl", "x"], ["reset"],
                  ["reset", "nonsense"]):
        assert check.main(words, tmp_path / "mine") == 2
        assert capfd.readouterr().err.count("\n") == 1


def test_workshop_check_resets_an_exercise_and_keeps_what_was_written(tmp_path, capsys):
    """Each reset keeps the student's file under a new name, so nothing is lost."""
    path, shipped = tmp_path / "kl.py", (WORKSHOP / "exercises/kl.py").read_text("utf-8")
    assert check.main(["reset", "kl"], tmp_path) == 0 and path.read_text("utf-8") == shipped
    for number in (1, 2):
        path.write_text(f"# {number}", "utf-8")
        assert check.main(["reset", "kl"], tmp_path) == 0
        assert path.read_text("utf-8") == shipped
        assert (tmp_path / f"kl.old{number}.py").read_text("utf-8") == f"# {number}"
    assert "what you wrote is in kl.old2.py" in capsys.readouterr().out


def test_workshop_check_gives_hints_in_steps(capsys):
    """`hint NAME` gives the first one, `hint NAME 2` the first two; the last says so."""
    assert check.main(["hint", "kl"]) == 0
    one = capsys.readouterr().out
    assert hints.HINTS["kl"][0] in one and hints.HINTS["kl"][1] not in one
    assert "One more: python workshop/check.py hint kl 2" in one
    assert check.main(["hint", "kl", "99"]) == 0
    everything = capsys.readouterr().out
    assert all(hint in everything for hint in hints.HINTS["kl"]) and "the last one" in everything


def test_workshop_check_survives_what_a_student_writes(tmp_path, capfd):
    """Code that never ends (a search by re, which holds the interpreter) and code that crashes
    Python get a line with the student's line, in a folder whose name is not ASCII, too. The next
    exercise is still checked. What it prints goes to stderr."""
    folder = tmp_path / "Übung"
    folder.mkdir()
    (folder / "advantage.py").write_text("import re\ndef advantages(rewards):\n"
                                         "    return re.match('(a+)+$', 'a' * 40 + 'b')\n")
    (folder / "router.py").write_text("import ctypes\nctypes.string_at(0)\n")
    (folder / "kl.py").write_text(RIGHT_KL)
    assert check.main(["advantage", "router", "kl"], folder, seconds=3) == 1
    out, err = capfd.readouterr()
    endless, crash, right = out.splitlines()
    assert endless.startswith("advantage  your code does not end. After 3 seconds it is still in "
                              "line 3, `return re.match('(a+)+$', 'a' * 40 + 'b')`.")
    assert crash == "router     your code crashes Python in line 2, `ctypes.string_at(0)`"
    assert right == "kl         right" and set(err.splitlines()) == {"x"}


def test_workshop_check_says_how_python_ended():
    """Without a line of the student: after os._exit(), or if the system killed the worker."""
    said = check._why_it_ended("", Path("kl.py"), 10, -9)
    assert said.startswith("your code ends Python, with exit code -9, before there is a result.")
    said = check._why_it_ended('Timeout (0:00:10)!\n  File "re.py", line 7\n', Path("kl.py"), 10, 1)
    assert said.startswith("your code does not end. After 10 seconds it is still running. Is")


def test_workshop_check_blames_nobody_if_torch_is_missing(tmp_path, monkeypatch, capfd):
    """If the worker cannot begin, the message says this and not that a student's code is wrong."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    (tmp_path / "kl.py").write_text(RIGHT_KL)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # the worker inherits it
    assert check.main(["kl"], tmp_path) == 2
    out, err = capfd.readouterr()
    assert out == "" and "no torch here" in err and "check: the checker does not start" in err


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_workshop_check_stops_at_ctrl_c(tmp_path):
    """Ctrl-C in the middle of a student's loop ends the checker with one line and code 130. It
    does not reach the student's code, which would get the blame."""
    (tmp_path / "kl.py").write_text("import signal\n"
                                    "print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)\n"
                                    "while True:\n    pass\n")
    code = ("import sys; from workshop import check; "
            "sys.exit(check.main(['kl'], sys.argv[1], seconds=30))")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True,
                          stderr=subprocess.PIPE, start_new_session=True) as run:
        assert run.stderr.readline() == "True\n"
        os.killpg(run.pid, signal.SIGINT)
        assert run.stderr.read() == "check: stopped\n"
    assert run.returncode == 130


# --------------------------------------------------------------------------------------------------
# The notebook


def run_cells(*changes):
    """Runs the code cells of the notebook in order, with the texts (before, after) replaced.
    Returns (its names, the outputs of each cell)."""
    names, outputs = {}, []
    for cell in CODE:
        for before, after in changes:
            cell = cell.replace(before, after)
        outputs.append(run_notebook._run_cell(cell, names))
    return names, outputs


def test_workshop_notebook_runs(monkeypatch):
    """All cells of the notebook run with one training step each. It defines no function. The cells
    that need no model print what the notebook has kept."""
    monkeypatch.chdir(WORKSHOP)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    assert CODE[0].count("STEPS = 12") == 1 and not any("def " in cell for cell in CODE)
    names, outputs = run_cells(("STEPS = 12", "STEPS = 1"), ("problems=16", "problems=2"))
    assert abs(float(names["loss"].detach())) < 1e-4 < float(names["norm"])
    assert len(names["records"]) == 1
    printed = ["".join(output.get("text", "") if isinstance(output.get("text"), str)
                       else "".join(output.get("text", [])) for output in cell)
               for cell in outputs]
    assert any("rollout  1: right" in text for text in printed)
    assert "all ratios are 1: True" in printed[5] and "both are equal: True" in printed[9]
    for number in (0, 1, 2, 9, 10):
        assert CELLS[number]["outputs"] == outputs[number], number
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert all(cell["outputs"] for cell in CELLS[1:])
    answers = "".join(CELLS[3]["outputs"][0]["text"])
    assert [line.split()[0] for line in answers.splitlines()] == list(models.NAMES)


def names_in(node, context):
    """The names that a piece of code reads (ast.Load) or binds (ast.Store)."""
    names = {x.id for x in ast.walk(node)
             if isinstance(x, ast.Name) and isinstance(x.ctx, context)}
    if context is ast.Store:
        names |= {x.arg for x in ast.walk(node) if isinstance(x, ast.arg)}
        names |= {(alias.asname or alias.name).partition(".")[0] for x in ast.walk(node)
                  if isinstance(x, ast.Import | ast.ImportFrom) for alias in x.names}
    return names


def test_workshop_notebook_defines_names_before_it_uses_them():
    """Each statement of the notebook reads only names that it binds itself or that an earlier one
    has bound, inside functions too."""
    bound = set(dir(builtins))
    for cell in CODE:
        for statement in ast.parse(cell).body:
            bound_here = names_in(statement, ast.Store)
            assert names_in(statement, ast.Load) <= bound | bound_here, ast.unparse(statement)
            bound |= bound_here


@pytest.mark.slow
def test_workshop_notebook_training_improves():
    """The notebook as shipped ends with more than twice the accuracy of its first rollout."""
    records = run_cells()[0]["records"]
    assert records[-1]["accuracy"] > 2 * records[0]["accuracy"]


# --------------------------------------------------------------------------------------------------
# The pool and the quiz

CHAT = """10:01 Ann: r1mini | plain | seed 1 | pass@1 0=0.1 3=0.5 | length 0=30 3=60
10:02 Bo: here it is: "r1mini | plain | seed 2 | pass@1 0=0.2 3=0.7 | length 0=40 3=80" ok?
10:03 Bo: r1mini | short_pays | seed 2 | pass@1 0=0.2 3=0.1 | length 0=40 3=8
10:04 Cy: r1mini | short_pays | seed 1 | pass@1 0=0.1 3=0.1 | length 0=30 3=10.5
10:05 Di: r1mini | plain | seed x
"""


def test_workshop_pool_joins_the_lines_of_a_class(tmp_path, monkeypatch, capsys):
    """By hand, from a chat's text: mean and standard deviation of each run, the paired difference
    over the seeds that ran both; a line that cannot be read is named."""
    monkeypatch.setattr(pool, "ROOT", tmp_path)
    (tmp_path / "lines.txt").write_text(CHAT, "utf-8")
    assert pool.main([str(tmp_path / "lines.txt")]) == 0
    out = capsys.readouterr().out
    assert "line 5 cannot be read, and is left out: 10:05 Di: r1mini | plain | seed x" in out
    assert "| plain | 2 | 0.150 ± 0.071 | 0.600 ± 0.141 |" in out
    assert "| short_pays | 2 | 35.0 ± 7.1 | 9.2 ± 1.8 |" in out
    difference = paired_difference({"1": 0.1, "2": 0.1}, {"1": 0.5, "2": 0.7})
    assert difference["mean"] == pytest.approx(-0.5)
    assert "pass@1 at the end, short_pays minus plain: -50.0 ± 14.1 points, 95% interval" in out
    drawn = (tmp_path / "runs/workshop/figures/pool.png").exists()
    assert drawn == ("drawn: runs/workshop" in out)


def test_workshop_pool_reads_what_runs_write():
    """line_of() and read_lines() are inverses, also beside a later line of the same seed."""
    curves = {"pass@1": {0: 0.15, 12: 0.75}, "length": {0: 37.0, 12: 79.5}}
    lines = [pool.line_of("zero.lr=1e-3 x=2", seed, curves) for seed in ("7", "8", "7")]
    assert pool._read_lines("\n".join(lines)) == {"zero.lr=1e-3 x=2": {
        key: {"7": values, "8": values} for key, values in curves.items()}}


def test_workshop_pool_names_torn_lines_and_compares_with_the_plain_run(capsys):
    """A line that was copied without its beginning is named. The plain run is the yardstick, also
    if its line comes last."""
    curves = {"pass@1": {0: 0.15, 12: 0.75}, "length": {0: 37.0, 12: 79.5}}
    short, plain = (pool.line_of(name, "7", curves) for name in ("short_pays", "plain"))
    found = pool._read_lines("\n".join([short, plain.removeprefix("r1mini | "), "talk", plain]))
    assert "line 2 cannot be read, and is left out: plain | seed 7" in capsys.readouterr().out
    assert pool._claims(found)[0].startswith("pass@1 at the end, short_pays minus plain")


def test_workshop_pool_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    """No line, two files or no file: one line and exit code 2. A seed that came twice is named."""
    (tmp_path / "empty.txt").write_text("hello", "utf-8")
    for words in (["a", "b"], [str(tmp_path / "none.txt")], [str(tmp_path / "empty.txt")]):
        assert pool.main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    pool._read_lines(CHAT.splitlines()[0] + "\n" + CHAT.splitlines()[0])
    assert capsys.readouterr().out == "line 2: plain has seed 1 twice; the later line counts\n"


def test_workshop_pool_draws_mean_and_spread():
    """The panel has the mean at each step and a band of one standard deviation. One run has no
    band."""
    plot = MagicMock()
    runs = {"plain": {"1": {0: 0.1, 3: 0.5}, "2": {0: 0.2, 3: 0.7}}, "one": {"1": {0: 0.1}}}
    panel = pictures.curves_panel("title", "pass@1", runs)
    panel.draw(plot)
    steps, means, _ = plot.plot.call_args_list[0].args
    assert steps == [0, 3] and means == pytest.approx([0.15, 0.6]) and panel.percent == "y"
    [(_, low, high)] = [call.args for call in plot.fill_between.call_args_list]
    std = summarise({"1": 0.5, "2": 0.7})["std"]
    assert (low[1], high[1]) == pytest.approx((0.6 - std, 0.6 + std))


def test_workshop_quiz_points_to_the_code():
    """The quiz has ten questions, each with a right answer, with wrong ones that are explained, and
    with a line that stands in the function that is named."""
    text = (WORKSHOP / "quiz.md").read_text("utf-8")
    questions = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(questions) == 10
    for question in questions:
        asked, _, answer = question.partition("<details>")
        letters = re.findall(r"^- ([A-D])\. ", asked, re.MULTILINE)
        right = re.search(r"\*\*([A-D])\.\*\*", answer)[1]
        assert len(letters) >= 3 and right in letters, question
        for letter in letters:
            assert letter == right or re.search(rf"^- {letter}: ", answer, re.MULTILINE), question
        [(file, name, line)] = re.findall(
            r"^Code: `([\w/]+)\.py`, `([\w.]+)`:\n\n```python\n(.+)\n```", answer, re.MULTILINE)
        module = importlib.import_module(file.replace("/", "."))
        code = inspect.getsource(operator.attrgetter(name)(module))
        assert line in [text.strip() for text in code.splitlines()], (name, line)


def test_workshop_quiz_counts_a_rare_right_answer():
    """The quiz's numbers: one right answer among sixteen has an advantage of 3.75, each wrong one
    of -0.25."""
    advantages = grpo.advantages(torch.tensor([[1.0] + [0.0] * 15]))[0].tolist()
    assert advantages == pytest.approx([3.75] + [-0.25] * 15)
    assert "3.75" in (WORKSHOP / "quiz.md").read_text("utf-8")


# --------------------------------------------------------------------------------------------------
# A task of one's own


def test_workshop_own_task_is_short():
    """own.py has fewer than 35 lines, so that it can be copied. Its task is in studies/transfer.py
    (tests/test_transfer.py)."""
    lines = [line for line in (WORKSHOP / "own.py").read_text("utf-8").splitlines() if line.strip()]
    assert len(lines) < 35


def test_workshop_own_task_trains(capsys):
    """own.py runs one step of pretraining and one of RL."""
    assert len(own.main(base_steps=1, rl_steps=1)) == 1
    assert "rollout   1: right 0.00" in capsys.readouterr().out


def test_workshop_own_functions_replace_the_task(monkeypatch, capsys):
    """Question, document and reward that are defined in own.py are those that it trains on."""
    problem = tasks.Problem("Sort 10", "01", "en")
    monkeypatch.setattr(own, "question", lambda rng, n, step: [problem] * n)
    monkeypatch.setattr(own, "document", lambda rng: tasks.dialogue(problem, "01"))
    monkeypatch.setattr(own, "right", lambda texts, problems: [
        float(asked is problem) for asked in problems])
    own.main(base_steps=1, rl_steps=1)
    assert "rollout   1: right 1.00" in capsys.readouterr().out


@pytest.mark.slow
def test_workshop_own_task_training_improves():
    """own.py as shipped rises from under 50% to over 85% right answers."""
    found = own.main()
    assert found[0] < 0.5 < 0.85 < found[-1]
