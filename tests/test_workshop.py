"""Tests of workshop/: the shipped base, its experiments, its pages' numbers and its exercises."""
import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import moe
import tasks
from engine import checkpoint, evaluate
from engine.errors import UserError
from tests.helpers import MICRO, ROOT
from tools import cli
from workshop import check, experiments, judge, measure, own, shrink

WORKSHOP = ROOT / "workshop"
EXPERIMENTS = experiments.EXPERIMENTS
NOTEBOOK = json.loads((WORKSHOP / "r1mini.ipynb").read_text("utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_workshop_base_is_small_and_sometimes_right():
    """The shipped base is under 2.5 MB of bfloat16, has nano's sizes, is float32 once loaded, and
    is right in 10 to 30% of answers, so RL has something to reward."""
    path = WORKSHOP / "base.pt"
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


# --------------------------------------------------------------------------------------------------
# Experiments


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_workshop_experiments_are_understood(name, monkeypatch):
    """Every experiment's settings exist, the shipped base has the right sizes, and the edited code
    is Python that differs in the edit only."""
    monkeypatch.chdir(ROOT)
    experiment = EXPERIMENTS[name]
    run, stages = cli._plan_run(cli.parse_arguments(measure.command(experiment)))
    assert stages == [experiment.start]
    with measure.edited(experiment.edits) as code:
        assert (code == measure.ROOT) == (not experiment.edits)
        for file, before, after in experiment.edits:
            text = (code / file).read_text("utf-8")
            ast.parse(text)
            assert text.replace(after, before) == (measure.ROOT / file).read_text("utf-8")


def test_workshop_edit_that_does_not_fit_is_refused():
    """An edit whose line is not in the file is refused, and the unchanged code is not run in its
    place."""
    with pytest.raises(UserError, match="moe.py has changed"):
        with measure.edited([("moe.py", "no such line", "")]):
            pass


def test_workshop_try_runs_and_compares_with_the_plain_run(tmp_path, monkeypatch, capfd):
    """measure.py try runs the command with its settings and prints a table beside the plain run. An
    experiment whose run fails is an error."""
    monkeypatch.setattr(measure, "RUNS", str(tmp_path))
    monkeypatch.setattr(measure, "SHORT", {"base": "base.steps=2 base.dev_every=1"})
    monkeypatch.setitem(measure.STARTS, "base", "base --preset micro")
    assert measure.main(["try", "base", "eval.samples=2"]) == 0
    out = capfd.readouterr().out
    assert "--set base.steps=2 base.dev_every=1 eval.samples=2 --out" in out
    assert "| after step | 1 | 2 |" in out and "| loss, yours | 6." in out
    edit = "r1mini.py", '"""r1mini: DeepSeek', 'raise SystemExit(3)\n"""r1mini: DeepSeek'
    with pytest.raises(UserError, match="odd: the run failed"):
        measure.run("odd", experiments.Experiment("base", edits=(edit,)))


def test_workshop_measure_writes_into_the_workshop_only_if_asked(tmp_path, monkeypatch, capsys):
    """measure.py NAME prints a table and writes nothing. With --keep it keeps the curves, then
    writes the pages. `pages` writes them without a run."""
    record = {"dev": {"pass@1": [[0, 0.1], [2, 0.5]]}, "steps": {"loss": [2.0, 1.0]}}
    written = []
    monkeypatch.setattr(measure, "WORKSHOP", tmp_path)
    monkeypatch.setattr(measure, "run", lambda name, experiment: record)
    monkeypatch.setattr(measure, "write_pages", lambda: written.append("pages"))
    for words in (["no_std"], []):
        assert measure.main(words) == 0
        assert "| pass@1, no_std | 0.100 | 0.500 |" in capsys.readouterr().out
        assert not written and not list(tmp_path.iterdir())
    assert measure.main(["--keep", "no_std"]) == 0 and written == ["pages"]
    assert json.loads((tmp_path / "curves/no_std.json").read_text("utf-8")) == record
    assert [path.name for path in (tmp_path / "curves").iterdir()] == ["no_std.json"]
    assert measure.main(["pages"]) == 0 and written == ["pages"] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_workshop_try_says_what_ctrl_c_leaves(tmp_path):
    """Ctrl-C lets the run save its state. The run says how it goes on, and measure.py says that
    the same `try` starts afresh."""
    code = ("import sys; from workshop import measure; measure.RUNS = sys.argv[1]; "
            "measure.STARTS['base'] = 'base --preset micro'; "
            "measure.SHORT = {'base': 'base.steps=5000 base.dev_every=5000'}; "
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
        measure.run_to_its_end([sys.executable, "-c", code, seconds], "name")
    assert (tmp_path / "saved").exists() == ends_by_itself
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("given", [["try"], ["try", "sideways"], ["nonsense"],
                                   ["--keep", "nonsense"], ["--pages"], ["plain", "pages"]])
def test_workshop_measure_refuses_wrong_words(given, capsys):
    """A wrong word is refused by one line and exit code 2 before anything runs."""
    assert measure.main(given) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_workshop_table_has_the_steps_evaluated_on_dev():
    """By hand: the table has a column for each evaluation on dev, for curves on dev and for those
    of every step, and empty cells where the plain run has no value."""
    ours = {"dev": {"pass@1": [[0, 0.1], [2, 0.5]]}, "steps": {"kl": [0.01, 20.0]}}
    plain = {"dev": {"pass@1": [[0, 0.1], [2, 0.25]]}, "steps": {}}
    assert measure.compare("x", ours, plain, ("pass@1", "kl")) == [
        "| after step | 0 | 2 |", "|---|---|---|", "| pass@1, plain | 0.100 | 0.250 |",
        "| pass@1, x | 0.100 | 0.500 |", "| kl, plain |  |  |", "| kl, x |  | 20.0 |"]


def test_workshop_changes_are_written_from_the_experiments():
    """fill() writes what an experiment changes, by hand: the edit, the
    settings and the command.
    Filling twice equals filling once."""
    text = "before\n<!-- change softmax_router -->\nold\n<!-- end -->\nafter\n"
    edit = EXPERIMENTS["softmax_router"].edits[0]
    expected = (
        "before\n<!-- change softmax_router -->\n\nIn `moe.py`, instead of\n\n```python\n"
        f"{edit[1]}\n```\n\nput\n\n```python\n{edit[2]}\n```\n\n```\npython workshop/measure.py "
        "try base model.bias_speed=0 model.balance_alpha=0\n```\n\n<!-- end -->\nafter\n")
    assert measure.fill(text) == expected == measure.fill(expected)


def test_workshop_experiments_page_is_up_to_date():
    """experiments.md is as `python workshop/measure.py pages` writes it."""
    text = (WORKSHOP / "experiments.md").read_text("utf-8")
    assert measure.fill(text) == text


def test_workshop_experiments_are_asked_and_answered():
    """Every experiment has its change among the questions and its curve among the answers."""
    questions, answers = ((WORKSHOP / f"{page}.md").read_text("utf-8")
                       for page in ("experiments", "answers"))
    for name in EXPERIMENTS:
        assert re.search(f"<!-- curve {name}[ :]", answers), name
        assert name in measure.PLAIN.values() or f"<!-- change {name} -->" in questions, name


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_workshop_experiments_show_their_main_result(name, tmp_path, monkeypatch):
    """Every experiment runs as a class runs it, and its curves end as its answer says."""
    monkeypatch.setattr(measure, "RUNS", str(tmp_path))
    record = measure.run(name, EXPERIMENTS[name])
    end = {key: list(measure.row(record, key).values())[-1]
           for key in (*record["dev"], *record["steps"])}
    assert {"plain": lambda: end["pass@1"] > 0.6 and end["length"] > 60,
            "short_pays": lambda: end["length"] < 20 and end["pass@1"] < 0.3,
            "format_only": lambda: end["format"] > 0.95 and end["pass@1"] < 0.3,
            "language": lambda: end["language"] > 0.8,
            "group_of_2": lambda: end["pass@1"] < 0.5 and end["dead_groups"] > 0.3,
            "pretraining": lambda: end["cut_off"] < 0.1,
            "pad_is_eos": lambda: end["cut_off"] > 0.7 and end["pass@1"] == 0,
            "softmax_router": lambda: end["expert_load"] > 2.5,
            }.get(name, lambda: end["pass@1"] > 0.4)()


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
    """check.py names them without torch, in the order of judge.py. Each has a file."""
    assert check.NAMES == tuple(judge.EXERCISES)
    assert {path.stem for path in (WORKSHOP / "exercises").glob("*.py")} == set(check.NAMES)


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
    pairs = zip(new.flatten().tolist(), reference.flatten().tolist())
    x = [math.exp(b) / math.exp(a) for a, b in pairs]
    return torch.tensor([v - math.log(v) - 1 for v in x]).view(new.shape)


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
    ("advantage", by_hand_advantages), ("kl", by_hand_kl), ("router", judge.route),
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


@pytest.mark.parametrize("name, function, sentence", [
    ("absorbed", judge.attend, "it makes the keys of every token"),
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


def test_workshop_check_prints_a_verdict_for_each_exercise(capfd):
    """As shipped, no exercise is written yet. A wrong name is refused."""
    assert check.main([]) == 1
    assert capfd.readouterr().out.count("your function is not written yet") == len(check.NAMES)
    assert check.main(["nonsense"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


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
    assert right == "kl         right" and err == "x\n"


def test_workshop_check_says_how_python_ended():
    """Without a line of the student: after os._exit(), or if the system killed the worker."""
    said = check.why_it_ended("", Path("kl.py"), 10, -9)
    assert said.startswith("your code ends Python, with exit code -9, before there is a result.")
    said = check.why_it_ended('Timeout (0:00:10)!\n  File "re.py", line 7\n', Path("kl.py"), 10, 1)
    assert said.startswith("your code does not end. After 10 seconds it is still running. Is")


def test_workshop_check_blames_nobody_if_torch_is_missing(tmp_path, monkeypatch, capfd):
    """If the worker cannot begin, the message says this and not that a student's code is wrong."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # the worker inherits it
    assert check.main(["kl"]) == 2
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
# The notebook, and a task of one's own


def run_notebook(*changes):
    """Runs the code cells of the notebook in order, with the texts (before, after) replaced."""
    names = {}
    for cell in CODE:
        for before, after in changes:
            cell = cell.replace(before, after)
        exec(compile(cell, "r1mini.ipynb", "exec"), names)
    return names


def test_workshop_notebook_runs(monkeypatch, capsys):
    """All cells of the notebook run with one training step each. It defines no function and keeps
    no output."""
    monkeypatch.chdir(WORKSHOP)
    assert CODE[0].count("STEPS = 12") == 1 and not any("def " in cell for cell in CODE)
    assert not any(cell.get("outputs") for cell in NOTEBOOK["cells"])
    names = run_notebook(("STEPS = 12", "STEPS = 1"), ("problems=16", "problems=2"))
    assert abs(float(names["loss"].detach())) < 1e-4 < float(names["norm"])
    assert len(names["records"]) == 1 and "rollout  1: right" in capsys.readouterr().out


@pytest.mark.slow
def test_workshop_notebook_training_improves():
    """The notebook as shipped ends with more than twice the accuracy of its first rollout."""
    records = run_notebook()["records"]
    assert records[-1]["accuracy"] > 2 * records[0]["accuracy"]


def test_workshop_own_task_is_short():
    """own.py has fewer than 35 lines, so that it can be copied. Its task is in studies/transfer.py
    (tests/test_restart.py)."""
    lines = [line for line in (WORKSHOP / "own.py").read_text("utf-8").splitlines() if line.strip()]
    assert len(lines) < 35


def test_workshop_own_task_trains(capsys):
    """own.py runs one step of pretraining and one of RL."""
    assert len(own.main(base_steps=1, rl_steps=1)) == 1
    assert "rollout   1: right 0.00" in capsys.readouterr().out


@pytest.mark.slow
def test_workshop_own_task_training_improves():
    """own.py as shipped rises from under 50% to over 85% right answers."""
    found = own.main()
    assert found[0] < 0.5 < 0.85 < found[-1]
