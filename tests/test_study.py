"""Tests of tools/study.py and of what every module of studies/ must have."""
import ast
import importlib
import json
import shutil
import subprocess
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

import r1mini
from engine import folder as run_folder
from engine import jsonl
from engine.errors import UserError
from studies import choices, r1
from tools import cli, study

ROOT = Path(r1mini.__file__).parent
NAMES = sorted(path.stem for path in (ROOT / "studies").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_study_modules_state_their_command(name):
    """Every study can be imported, its docstring has a question or a claim and a command, and the
    command is understood. It has ordinary runs, a measurement or a command of its own."""
    module = cli._find_study(name)
    first, *lines = module.__doc__.splitlines()
    assert len(first) > 20
    commands = [line.strip() for line in lines if line.strip().startswith("python r1mini.py ")]
    assert commands
    for command in commands:
        words = command.partition("   ")[0].replace("--from CKPT", "").split()[2:]
        cli._make_parser().parse_args(words)
    assert any(hasattr(module, part) for part in ("RUNS", "measure", "ARMS", "main"))
    if hasattr(module, "ARMS"):
        assert {"SETTINGS", "STAGES", "measure_arm", "page"} <= set(vars(module))
    if hasattr(module, "measure"):
        assert {"SETTINGS", "NEEDS", "STAGES", "page"} <= set(vars(module))
    if hasattr(module, "numbers"):
        assert hasattr(module, "page")


FILES = sorted(path for folder in (".", "engine", "tools", "studies")
               for path in (ROOT / folder).glob("*.py") if not path.name.startswith("test_"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_study_and_other_modules_use_names_that_exist(path):
    """Every `module.name` in the code is a name of that module. A study's last line may run only
    after hours, so a wrong name must not wait until then."""
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = getattr(module, node.value.id, None)
            if isinstance(used, types.ModuleType):
                assert hasattr(used, node.attr), f"{path.name}:{node.lineno} {node.attr}"


WITH_RUNS = [name for name in NAMES if hasattr(cli._find_study(name), "RUNS")]


@pytest.mark.parametrize("name", WITH_RUNS)
def test_study_commands_are_understood(name, tmp_path, monkeypatch):
    """The commands of every study resolve to settings and to the stages that they name. The
    checkpoints they need are taken to exist."""
    monkeypatch.setattr(cli, "_needed_checkpoints", lambda *_: {})
    monkeypatch.setattr(cli, "_load_stage", lambda *_: None)
    file = tmp_path / "distill.jsonl"
    file.write_text(jsonl.jsonl_dialogue("Compute 1+2", "<answer>3</answer>"), "utf-8")
    for folder, command in study._study_runs(cli._find_study(name), 0):
        options = cli.parse_arguments([str(file) if w.endswith(file.name) else w for w in command])
        _, stages = cli._plan_run(options)
        assert not options.only or set(stages) == set(options.only)
        assert options.seed == 0 and "{" not in folder


def test_study_presets_have_folders_of_their_own():
    """A study on micro runs in other folders than on nano, and its page goes to another place."""
    for name in WITH_RUNS:
        nano, micro = (
            study._study_runs(cli._find_study(name), 1, preset) for preset in ("nano", "micro"))
        assert micro == [(folder.replace("runs/", "runs/micro-"), [
            word.replace("runs/", "runs/micro-") for word in command]) for folder, command in nano]
    assert study._results_folder(SimpleNamespace(name="r1", preset="micro")) == "results/r1-micro"


@pytest.mark.parametrize("name", [
    name for name in NAMES if not {"RUNS", "measure", "ARMS"} & set(vars(cli._find_study(name)))])
def test_study_without_runs_says_its_command(name, capsys):
    """`study NAME` of a study without runs is refused by one line that gives its command."""
    assert cli.main(["study", name]) == 2
    error = capsys.readouterr().err
    assert f"study {name} has no runs: python r1mini.py" in error and error.count("\n") == 1


def test_study_unknown_name_is_refused_with_all_names(capsys):
    """`study NAME` of an unknown study is refused by one line that lists all of them."""
    assert cli.main(["study", "everything"]) == 2
    error = capsys.readouterr().err
    assert f"choose all or one of {', '.join(NAMES)}" in error and error.count("\n") == 1


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that a study runs, which end at once with the exit code 0. Their folders have
    numbers, but do not exist."""
    made, main = [], cli.main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "main", lambda words: made.append(words) or 0)
    monkeypatch.setattr(study, "read_timing", lambda path: (
        {"machine": "a cpu", "threads": 2}, 0, {}))
    monkeypatch.setattr(study, "seconds_of", lambda path: 30.0)
    monkeypatch.setattr(study, "numbers_of_seed", lambda folders: {
        "metrics": {"x": len(folders)}, "curves": {folders[0]: {}}})
    return made, main


def test_study_runs_every_command_of_every_seed(commands, monkeypatch):
    """A study runs its commands once for each seed, with the folder, the preset and the user's
    options. Each seed becomes a line, and the report is of all lines."""
    made, main = commands
    written = []
    monkeypatch.setattr(study, "write_results", lambda *given: written.append(given) or "")
    assert main(["study", "--preset", "micro", "r1", "--seeds", "3", "4", "--threads", "1"]) == 0
    pairs = [pair for seed in (3, 4) for pair in study._study_runs(r1, seed, "micro")]
    assert made == [[*command, "--out", folder.rpartition("=")[2], "--preset", "micro",
                     "--threads", "1"] for folder, command in pairs]
    assert len(pairs) == 2 * len(r1.RUNS)
    lines = [json.loads(x) for x in Path("results/r1-micro/runs.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [3, 4]
    assert [line["seconds"] for line in lines] == [30 * len(r1.RUNS)] * 2
    [(target, summary, curves, path)] = written
    assert str(target) == "results/r1-micro" and path == "runs/micro-r1-3"
    assert summary["seeds"] == [3, 4] and summary["metrics"]["x"]["mean"] == len(r1.RUNS)
    assert list(curves) == ["runs/micro-r1-3", "runs/micro-r1-4"]
    assert summary["command"] == "python r1mini.py study --preset micro r1 --threads 1"


def test_study_stops_at_the_first_failed_command(commands, monkeypatch):
    """The exit code of a failed command ends the study, and nothing is reported."""
    made, main = commands
    monkeypatch.setattr(cli, "main", lambda words: made.append(words) or 5 * (len(made) == 2))
    assert main(["study", "r1", "--seeds", "0"]) == 5 and len(made) == 2


def test_study_once_measures_a_kind_once(tmp_path):
    """measure_once() logs what a measurement found. The second call only
    reads the log."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"kind": "config"}\n')
    folder = SimpleNamespace(path=tmp_path, clock=lambda *_: None, log=lambda record: (
        log.write_text(log.read_text() + json.dumps(record) + "\n")))
    calls = []
    for _ in range(2):
        assert study.measure_once(folder, "spent", lambda: calls.append(1) or {"share": 0.5}) == {
            "share": 0.5}
    assert len(calls) == 1 and len(log.read_text().splitlines()) == 2


def test_study_tested_takes_the_test_at_temperature_1(tmp_path):
    """test_record() takes a stage's record on the set `test` at temperature 1, or at another one,
    and refuses a run without one."""
    records = [{"kind": "test", "stage": stage, "set": part, "temperature": t, "pass@1": x}
               for stage, part, t, x in (("zero", "test", 0.6, 0.1), ("zero", "longer", 1.0, 0.2),
                                         ("zero", "test", 1.0, 0.3), ("r1", "test", 1.0, 0.4))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [
        {"kind": "config"}, *records]))
    assert study.test_record(tmp_path, "zero")["pass@1"] == 0.3
    assert study.test_record(tmp_path, "zero", 0.6)["pass@1"] == 0.1
    with pytest.raises(UserError, match="base is not finished"):
        study.test_record(tmp_path, "base")


def _line(seed, metrics, arm="", machine="a cpu", commit="abc"):
    """A line of runs.jsonl."""
    return {"arm": arm, "seed": seed, "commit": commit, "machine": machine, "metrics": metrics}


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """A function (study, lines) -> summary.json of the study `demo` on micro."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results" / "demo-micro"
    folder.mkdir(parents=True)

    def summary(module, lines):
        study._publish(SimpleNamespace(name="demo", preset="micro"), module, lines)
        assert [path.name for path in folder.iterdir()] == ["summary.json"]
        return json.loads((folder / "summary.json").read_text("utf-8"))
    return summary


def test_study_publish_writes_mean_std_and_notes(publish, capsys):
    """summary.json has mean, standard deviation and seeds of every number, worked by hand, and
    texts as notes. A number that a seed lacks is of the other seeds. The page goes to the console,
    and no other file is written."""
    published = SimpleNamespace(page=lambda metrics, notes: [f"{sorted(metrics)} {notes}"])
    summary = publish(published, [_line(0, {"a": 1.0, "b": 5.0, "text": "note"}),
                                  _line(1, {"a": 3.0, "b": None}, machine="b cpu")])
    assert summary["metrics"] == {
        "a": {"mean": 2.0, "std": pytest.approx(2 ** 0.5), "per_seed": {"0": 1.0, "1": 3.0}},
        "b": {"mean": 5.0, "std": 0.0, "per_seed": {"0": 5.0}}}
    assert summary["notes"] == {"text": {"0": "note"}} and summary["seeds"] == [0, 1]
    assert summary["command"] == "python r1mini.py study --preset micro demo"
    assert summary["commit"] == "abc" and summary["machine"] == "a cpu; b cpu"
    assert "['a', 'b'] {'text': {'0': 'note'}}" in capsys.readouterr().out


def test_study_publish_names_each_commit_and_machine_once(publish):
    """A line may have several commits and machines, if its runs were made one after the other."""
    published = SimpleNamespace(page=lambda *_: [])
    summary = publish(published, [_line(0, {"a": 1.0}, machine="b cpu; a cpu", commit="abc, def"),
                                  _line(1, {"a": 1.0}, machine="a cpu", commit="abc")])
    assert summary["commit"] == "abc, def" and summary["machine"] == "a cpu; b cpu"


def test_study_publish_adds_the_differences_of_a_study(publish):
    """By hand: b less a is 1 and 3 on the two seeds that have both, so 2 ± 12.706. A difference
    without numbers is left out."""
    published = SimpleNamespace(page=lambda *_: [], DIFFERENCES={
        "b_less_a": ("b", "a"), "none": ("a", "c")})
    summary = publish(published, [_line(0, {"a": 1.0, "b": 2.0}), _line(1, {"a": 1.0, "b": 4.0}),
                                  _line(2, {"a": 1.0})])
    assert "none" not in summary["metrics"]
    assert summary["metrics"]["b_less_a"] == {
        "mean": 2.0, "std": pytest.approx(2 ** 0.5), "per_seed": {"0": 1.0, "1": 3.0},
        "low": pytest.approx(2 - 12.706, abs=1e-3), "high": pytest.approx(2 + 12.706, abs=1e-3),
        "n": 2}


def test_study_publish_joins_arms_and_combines_them(publish):
    """The numbers of an arm have its name before them. combine() is given those of a seed."""
    published = SimpleNamespace(page=lambda *_: [], combine=lambda n: {"c": n["y.a"] - n["x.a"]})
    summary = publish(published, [_line(0, {"a": 1.0}, "x"), _line(0, {"a": 3.0}, "y")])
    assert {key: m["mean"] for key, m in summary["metrics"].items()} == {
        "c": 2.0, "x.a": 1.0, "y.a": 3.0}


def test_study_picture_is_beside_its_summary(tmp_path, monkeypatch, capsys):
    """The picture of another preset must not overwrite nano's."""
    monkeypatch.chdir(tmp_path)
    written = []
    monkeypatch.setattr(study, "write_picture",
                        lambda *given: written.append(given) or ["![title](figures/demo.png)"])
    module = SimpleNamespace(page=lambda *_: ["page"], picture=lambda rows: rows["a"]["mean"])
    for preset, folder in (("nano", "demo"), ("micro", "demo-micro")):
        (tmp_path / "results" / folder).mkdir(parents=True)
        study._publish(SimpleNamespace(name="demo", preset=preset), module, [_line(0, {"a": 1.0})])
        assert written.pop() == (Path("results") / folder, "demo", 1.0)
        assert "page\n\n![title](figures/demo.png)\n" in capsys.readouterr().out


def test_study_measure_comes_after_its_runs(commands, monkeypatch, tmp_path):
    """A study with both runs its commands, reads their logs by numbers() and adds measure(). The
    same numbers again make no second line, also where kept models are new: the study does not
    start from them. Other numbers make one, and it counts."""
    made, main = commands
    count = len(study._study_runs(choices, 2))
    monkeypatch.setattr(study, "_check_needs", lambda *_: None)
    monkeypatch.setattr(choices, "numbers", lambda seed, at: {"a": seed, "at": at})
    monkeypatch.setattr(study, "_open_folder", lambda *_: SimpleNamespace(path=tmp_path))
    monkeypatch.setattr(choices, "measure", lambda folder: {"enough": len(made) >= count})
    published = []
    monkeypatch.setattr(study, "_publish", lambda *given: published.append(given))
    for _ in range(2):
        assert main(["study", "choices", "--seeds", "2"]) == 0
    assert published[0] == published[1]
    (_, of_study, [line], _) = published[0]
    assert of_study is choices and line["metrics"] == {"a": 2, "at": "runs/", "enough": True}
    assert line["seconds"] == 30 * (count + 1) and line["machine"].startswith("a cpu, 2 threads")
    kept = Path("results/checkpoints/2")
    kept.mkdir(parents=True)
    (kept / "base.pt").write_bytes(b"weights")
    assert main(["study", "choices", "--seeds", "2"]) == 0
    assert len(Path("results/choices/runs.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(choices, "measure", lambda folder: {"enough": "other"})
    assert main(["study", "choices", "--seeds", "2"]) == 0
    assert len(Path("results/choices/runs.jsonl").read_text().splitlines()) == 2
    assert published[-1][2][0]["metrics"]["enough"] == "other"


@pytest.fixture
def two_arms(monkeypatch, tmp_path):
    """(run the study of two arms on seed 0 with options, the arms that were measured, their
    study)."""
    monkeypatch.chdir(tmp_path)
    measured = []

    def measure_arm(arm, folder):
        measured.append((arm, folder.run.zero.lr, str(folder.path)))
        return {"x": len(measured)}

    module = SimpleNamespace(ARMS={"low": "zero.lr=1e-5", "high": "zero.lr=1e-3"}, STAGES=("zero",),
                             SETTINGS=("eval.longer=1",), measure_arm=measure_arm,
                             page=lambda metrics, notes: [str(sorted(metrics))])

    def run(*words):
        rest = ["--seeds", "0", *words]
        assert study.main(SimpleNamespace(name="demo", preset="micro", rest=rest), module) == 0
        return json.loads(Path("results/demo-micro/summary.json").read_text("utf-8"))

    return run, measured, module


def test_study_arms_are_measured_once(two_arms):
    """Each arm has its own settings, folder and line; what has a line is not measured again, also
    where the run folders are gone; other settings, other kept models and a torn line are measured
    anew."""
    run, measured, module = two_arms
    summary = run()
    assert measured == [("low", 1e-5, "runs/micro-demo-low-0"),
                        ("high", 1e-3, "runs/micro-demo-high-0")]
    assert {key: m["mean"] for key, m in summary["metrics"].items()} == {"low.x": 1, "high.x": 2}
    path = Path("results/demo-micro/runs.jsonl")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [set(line) for line in lines] == [
        {"arm", "seed", "settings", "commit", "machine", "seconds", "metrics"}] * 2
    shutil.rmtree("runs")
    assert run()["metrics"] == summary["metrics"] and len(measured) == 2
    assert summary["commit"] == lines[0]["commit"] == run_folder.describe_commit()
    module.ARMS = module.ARMS | {"low": "zero.lr=2e-5"}
    assert run()["metrics"]["low.x"]["mean"] == 3 and len(measured) == 3
    path.write_text(path.read_text("utf-8")[:-20], "utf-8")
    run()
    assert [arm for arm, *_ in measured] == ["low", "high", "low", "low"]
    run()
    assert len(measured) == 4  # the torn line did not spoil the one behind it
    kept = Path("results/checkpoints/0")
    kept.mkdir(parents=True)
    (kept / "base.pt").write_bytes(b"other weights")
    run()
    assert len(measured) == 6


def test_study_arms_name_the_commits_of_their_training(two_arms):
    """An arm whose models were trained at two commits, in its own folder and in the one that the
    arms share, names both beside the commit of the measurement."""
    run, _, _ = two_arms
    run()
    lines_file = Path("results/demo-micro/runs.jsonl")
    lines_file.unlink()
    for name, commits in (("low", ("1111111", "2222222")), ("start", ("3333333",))):
        path = Path(f"runs/micro-demo-{name}-0")
        path.mkdir(exist_ok=True)
        with open(path / "timing.jsonl", "a", encoding="utf-8") as file:
            for commit in commits:
                for record in ({"machine": "x, 2 cores", "threads": 2, "commit": commit},
                               {"stage": "zero", "step": 1, "seconds": 1.0, "peak_gib": 0.1}):
                    file.write(json.dumps(record) + "\n")
    run()
    lines = map(json.loads, lines_file.read_text("utf-8").splitlines())
    commits = {line["arm"]: set(line["commit"].split(", ")) for line in lines}
    now = run_folder.describe_commit()
    assert commits == {"low": {"1111111", "2222222", "3333333", now}, "high": {"3333333", now}}


def test_study_all_runs_what_is_missing(monkeypatch, tmp_path, capsys):
    """`study all` says which seeds have no lines and how long the others took (by hand: arms of 60
    and 120 seconds, so 6 minutes for two seeds; a line of an older format does not count), runs
    these, and names what fails."""
    monkeypatch.chdir(tmp_path)
    arms = SimpleNamespace(ARMS={"x": "", "y": ""}, SEEDS=(0, 1, 2), STAGES=())
    whole = SimpleNamespace(measure=None, SEEDS=(0,))
    options = SimpleNamespace(name="arms", preset="micro", rest=[])
    for arm, seconds in (("x", 60), ("y", 120)):
        _, _, key = study._settings_of(options, arms, arm, 1, [])
        study._write_line(options, key | {"seconds": seconds})
    study._write_line(options, {"seed": 1, "seconds": 600})  # of an older format: no arm
    asked = []
    monkeypatch.setattr(cli, "main", lambda words: asked.append(words) or 2 * ("whole" in words))
    options.name = "all"
    with pytest.raises(UserError, match="not finished: whole"):
        study.main_all(options, {"arms": arms, "whole": whole})
    assert asked == [["study", "--preset", "micro", "arms", "--seeds", "0", "2"],
                     ["study", "--preset", "micro", "whole", "--seeds", "0"]]
    text = capsys.readouterr().out
    assert "| arms | 0 2 | 6 |" in text and "| whole | 0 | not known |" in text
    assert "missing: 2 of 2 studies" in text
    options.rest = ["--seeds", "0"]
    with pytest.raises(UserError, match="no more words"):
        study.main_all(options, {})


def test_study_all_makes_the_models_that_others_start_from(monkeypatch, tmp_path):
    """In a fresh clone r1 has lines and no folders. Its seeds are run again before a study that
    starts from them, and not after they are there. r1 does not wait for itself."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def run(words):
        asked.append((words[3], words[5:]))
        if words[3] == "r1":
            for seed in words[5:]:
                Path(f"runs/micro-r1-{seed}").mkdir(parents=True)
                Path(f"runs/micro-r1-{seed}/base.pt").touch()
        return 0
    monkeypatch.setattr(cli, "main", run)
    measures = SimpleNamespace(measure=None, NEEDS=("base.pt",), SEEDS=(0, 1))
    runs = SimpleNamespace(RUNS=[("x-{seed}", "zero --from runs/r1-{seed}/base.pt")], SEEDS=(1, 2))
    options = SimpleNamespace(preset="micro", rest=[])
    assert study.main_all(options, {"measures": measures, "runs": runs}) == 0
    assert asked == [("r1", ["0", "1"]), ("measures", ["0", "1"]), ("r1", ["2"]),
                     ("runs", ["1", "2"])]
    assert not study._lacks_r1(r1, 5, "nano")


def test_study_all_has_every_study_once():
    """All studies with runs are planned, but for those that are parts of another one. r1 is the
    first: others start from its models."""
    names = list(cli.all_studies())
    assert names[0] == "r1" and len(set(names)) == len(names)
    assert set(NAMES) - set(names) == {"hours", "layouts", "peers", "race"}


def test_study_commit_does_not_mind_results(tmp_path, monkeypatch):
    """A + stands for changes of the code. Results, which a study itself appends to, are none.
    A release's tag is no commit."""
    def git(*words):
        who = ("-c", "user.name=x", "-c", "user.email=x")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    assert run_folder.describe_commit() == ""
    (tmp_path / "results").mkdir()
    for name in ("code.py", "results/runs.jsonl"):
        (tmp_path / name).write_text("1\n")
    git("init")
    git("add", "-A")
    git("commit", "-m", "x")
    name = run_folder.describe_commit()
    git("tag", "-a", "v1", "-m", "x")
    (tmp_path / "results" / "runs.jsonl").write_text("2\n")
    assert run_folder.describe_commit() == name and len(name) >= 7
    (tmp_path / "code.py").write_text("2\n")
    assert run_folder.describe_commit() == f"{name}+"
