"""The tests of whole runs: what a run leaves, how it stops and goes on, and which model each stage
starts from and learns from. All compare with one finished run of the micro preset."""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import r1mini
import tasks
from engine import checkpoint, folder, jsonl, watch
from tests.helpers import FEW, ROOT, STAGES, equal_states, micro_run, same_weights
from tools import cli

COLLECTED = ("dev1", "dev3", "distill")  # stages that learn from another model's answers


@pytest.fixture(scope="session")
def micro():
    """The folder of one finished micro run of all stages; no test writes into it."""
    return micro_run()


def log_until(path, stage):
    """The bytes of a run's log before the first record of a stage; the whole log if it has none."""
    lines = (path / "log.jsonl").read_bytes().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    of_stage = [i for i, r in enumerate(records) if stage in (r["kind"], r.get("stage"))]
    return b"".join(lines[:of_stage[0]] if of_stage else lines)


def rewind(micro, path, stage):
    """Makes a folder what the micro run's folder was just before a stage."""
    path.mkdir(exist_ok=True)
    for name in STAGES[:STAGES.index(stage)]:
        for file in micro.glob(f"{name}.*"):
            shutil.copy(file, path)
    shutil.copy(micro / "config.json", path)
    (path / "log.jsonl").write_bytes(log_until(micro, stage))


def test_run_leaves_what_the_readme_says(micro):
    """A run leaves its mark, its settings, a log without a clock, timings, checkpoints, dialogues,
    samples and a report, and the log has every step and every test."""
    kept = {f"{stage}.pt" for stage in STAGES} | {f"{stage}.jsonl" for stage in COLLECTED}
    assert {f.name for f in micro.iterdir()} - {"figures"} == kept | {  # figures need matplotlib
        ".r1mini", "config.json", "log.jsonl", "timing.jsonl", "look.jsonl", "samples.md",
        "report.md"}
    log = folder.read_log(micro)
    assert log[0]["kind"] == "config" and log[0]["zero"]["group_size"] == 4
    assert not any("seconds" in json.dumps(r) for r in log)
    logged = {"reward", "accuracy", "length", "cut_off", "entropy", "kl", "clip", "ratio",
              "dead_groups", "reflection", "mixing", "expert_load", "gap_p999", "gap_max",
              "flips", "skipped", "tokens", "prompt_tokens", "learnt_tokens", "grad_norm"}
    for stage in STAGES:
        of_rl = stage in ("zero", "dev2", "r1") or stage.endswith(("_rl", "_rl_no_format"))
        steps = [r for r in log if r["kind"] == stage]
        count = 4 if of_rl else 20 if stage == "base" else 6
        assert [r["step"] for r in steps] == list(range(1, count + 1))
        assert (logged if of_rl else {"loss", "tokens", "grad_norm"}) <= set(steps[-1])
    assert [r["stage"] for r in log if r["kind"] == "collected"] == list(COLLECTED)
    tested = [r["stage"] for r in log if r["kind"] == "test"]
    assert set(tested) == set(STAGES) - {"helpful", "safe"} and len(tested) == len(STAGES) + 4
    general = [r["stage"] for r in log if r["kind"] == "general"]
    assert general == ["base", "zero", "dev1", "dev2", "dev3", "r1"]
    assert "Compute" in (micro / "samples.md").read_text("utf-8")


def test_run_says_which_commit_made_it(micro):
    """The first line of timing.jsonl names the machine and the commit of the clone."""
    first = json.loads((micro / "timing.jsonl").read_text("utf-8").splitlines()[0])
    head = subprocess.run(["git", "describe", "--always", "--exclude=*"], cwd=ROOT, text=True,
                          capture_output=True).stdout.strip()
    assert first["commit"].rstrip("+") == head and first["machine"]


def test_run_keeps_the_record_of_what_was_collected(micro):
    """A stage begins after the record of what was collected for it, and does not cut that record
    off the log."""
    log = folder.read_log(micro)
    assert {r["stage"] for r in log if r["kind"] == "collected"} == set(COLLECTED)


def test_run_gives_each_stage_its_rewards(micro):
    """Zero is rewarded for accuracy and format, Dev2 and R1 for language too, and the reward models
    judge in R1's last quarter alone."""
    for r in folder.read_log(micro):
        if r["kind"] in ("zero", "dev2", "r1"):
            assert ("language_reward" in r) == (r["kind"] != "zero")
            assert "language" in r and ("preference" in r) == (r["kind"] == "r1")
            s = getattr(cli.resolve_settings("micro", []), r["kind"])
            if r["kind"] == "r1" and r["step"] == 4:
                assert r["preference"] > 0
                continue
            total = sum(getattr(s, f"{name.removesuffix('_reward')}_weight") * r.get(name, 0.0)
                        for name in ("accuracy", "format", "language_reward"))
            assert r["reward"] == pytest.approx(total, abs=1e-5) and s.accuracy_weight == 1
            assert r.get("preference") is None  # no sum is judged


def test_run_that_is_finished_is_not_repeated(micro, tmp_path, capsys):
    """The same command skips every finished stage and says so, and other settings are refused."""
    path = shutil.copytree(micro, tmp_path / "copy")
    before = {f.name: f.read_bytes() for f in [*path.glob("*.pt"), path / "log.jsonl"]}
    argv = [*FEW, "--out", str(path)]
    assert cli.main(list(argv)) == 0
    assert capsys.readouterr().out.count("finished earlier") == len(STAGES)
    assert cli.main(["zero", *argv, "--set", "zero.lr=1"]) == 2
    assert "zero.lr" in capsys.readouterr().err
    assert before == {f.name: f.read_bytes() for f in [*path.glob("*.pt"), path / "log.jsonl"]}


@pytest.mark.parametrize("command, before, kills", [
    ("zero", "base", [("base", 7), ("base", 13), ("zero", 1), ("zero", 3)]),
    ("dev3", "dev1", [("collect_dev1", 0), ("dev1", 5), ("test_dev1", 0), ("dev2", 3),
                      ("dev3", 3)]),
    ("r1", "helpful", [("helpful", 3), ("safe", 6), ("r1", 1), ("r1", 3), ("test_r1", 0)]),
])
def test_run_killed_repeatedly_reaches_the_same_bits(micro, tmp_path, monkeypatch, command, before,
                                                     kills):
    """A run that is killed at several points and started again has the log and all weights of the
    run that was never stopped."""
    if before != "base":
        rewind(micro, tmp_path, before)
    argv = [command, *FEW, "--out", str(tmp_path), "--save-every", "2"]
    clock = folder.Folder.clock
    for point in kills:
        def kill(self, name, step, *rest, **named):
            if (name, step) == point:
                raise RuntimeError("killed")
            return clock(self, name, step, *rest, **named)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(folder.Folder, "clock", kill)
            cli.main(list(argv))
    assert cli.main(argv) == 0
    after = STAGES[STAGES.index(command) + 1]
    assert (tmp_path / "log.jsonl").read_bytes() == log_until(micro, after)
    for stage in STAGES[STAGES.index(before):STAGES.index(after)]:
        assert same_weights(tmp_path / f"{stage}.pt", micro / f"{stage}.pt"), stage
    assert not list(tmp_path.glob("*.partial.pt")) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number, code, processes", [
    (signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 1), (signal.SIGHUP, 129, 1),
    (signal.SIGTERM, 143, 2)])
def test_run_stopped_by_a_signal_saves_and_goes_on(micro, tmp_path, number, code, processes):
    """SIGINT, SIGTERM and SIGHUP, to all processes of a run, let the current step end, save and
    exit with 128 and their number, and the same command then reaches the log of the run that was
    never stopped."""
    rewind(micro, tmp_path, "zero")
    argv = [sys.executable, str(ROOT / "r1mini.py"), "zero", *FEW, "--out", str(tmp_path),
            "--save-every", "99", "--processes", str(processes), "--threads",
            str(processes * torch.get_num_threads())]
    if signal.getsignal(number) == signal.SIG_IGN:  # under nohup; a run would go on, rightly
        pytest.skip(f"{number.name} is ignored here")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as run:
        timing = tmp_path / "timing.jsonl"
        while run.poll() is None and not (timing.exists() and "zero" in timing.read_text()):
            time.sleep(0.01)
        os.killpg(run.pid, number)
        _, errors = run.communicate(timeout=120)
    assert run.returncode == code and "Traceback (most" not in errors, errors
    assert "the same command goes on where it stopped" in errors
    assert list(tmp_path.glob("zero*.pt"))
    assert subprocess.run(argv, capture_output=True).returncode == 0
    if processes == 1:  # two add in another order
        assert (tmp_path / "log.jsonl").read_bytes() == log_until(micro, "dev1")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGPIPE")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_run_goes_on_when_nobody_reads_what_it_prints(micro, tmp_path, unbuffered):
    """A training whose reader is gone, of both its streams, ends in the log of one that was
    read."""
    rewind(micro, tmp_path, "zero")
    argv = [sys.executable, str(ROOT / "r1mini.py"), "zero", *FEW, "--out", str(tmp_path),
            "--threads", str(torch.get_num_threads())]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        run = subprocess.run(argv, stdout=pipe, stderr=pipe,
                             env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert run.returncode in (0, cli.CLOSED_PIPE)
    assert (tmp_path / "log.jsonl").read_bytes() == log_until(micro, "dev1")


@pytest.mark.parametrize("command, start, made", [
    ("zero", "base.pt", ["zero"]), ("r1", "dev3.pt", ["helpful", "safe", "r1"]),
    ("dev1", "zero.pt", ["dev1"])])
def test_run_from_another_runs_checkpoint_reaches_its_bits(micro, tmp_path, command, start, made):
    """--from runs the later stages only, and they reach the bits of the run that the checkpoint
    belongs to."""
    assert cli.main([command, *FEW, "--out", str(tmp_path), "--from", str(micro / start)]) == 0
    assert [stage for stage in STAGES if (tmp_path / f"{stage}.pt").exists()] == made
    assert all(same_weights(tmp_path / f"{stage}.pt", micro / f"{stage}.pt") for stage in made)


def test_run_only_leaves_out_the_other_stages(micro, tmp_path):
    """--only safe, in a folder that has reached Dev3, makes no other model and reaches the same
    bits."""
    rewind(micro, tmp_path, "helpful")
    assert cli.main(["r1", *FEW, "--out", str(tmp_path), "--only", "safe"]) == 0
    assert same_weights(tmp_path / "safe.pt", micro / "safe.pt")
    assert not (tmp_path / "helpful.pt").exists() and not (tmp_path / "r1.pt").exists()


def test_run_distill_learns_from_a_file_of_dialogues(micro, tmp_path, capsys):
    """distill --data learns from the file alone, without R1, and refuses a bad file in one line."""
    argv = ["distill", *FEW, "--from", str(micro / "student.pt"), "--data"]
    file = tmp_path / "users.jsonl"
    file.write_text(jsonl.jsonl_dialogue("2+3", "5") * 3, "utf-8")
    out = tmp_path / "out"
    assert cli.main([*argv, str(file), "--out", str(out)]) == 0
    assert {f.name for f in out.glob("*.pt")} == {"distill.pt"} and not list(out.glob("d*.jsonl"))
    first = next(r for r in folder.read_log(out) if r["kind"] == "distill")
    length = len(tasks.encode_prompt("2+3") + tasks.encode_response("5"))
    assert first["tokens"] == length * cli.resolve_settings("micro", []).distill.documents
    capsys.readouterr()
    for content, named in (("", "users.jsonl"), ("{}\n", "line 1"), (jsonl.jsonl_dialogue(
            "1+" * 400, "5"), "dialogue 1")):
        file.write_text(content, "utf-8")
        assert cli.main([*argv, str(file), "--out", str(tmp_path / named[:4])]) == 2
        error = capsys.readouterr().err.strip()
        assert named in error and error.startswith("r1mini: ") and "\n" not in error


def test_run_on_a_full_disk_ends_in_one_clear_line(tmp_path, monkeypatch, capsys):
    """When a save fails with ENOSPC the exit code is 2, the message says what to do, and the run
    goes on later."""
    argv = ["base", *FEW, "--out", str(tmp_path), "--save-every", "5"]
    save = torch.save

    def full(record, file):
        if record.get("step") == 10:
            raise OSError(28, "No space left on device", str(tmp_path))
        save(record, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert cli.main(list(argv)) == 2
    assert "free some space" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.tmp"))
    assert checkpoint.load(tmp_path / "base.partial.pt")[1]["step"] == 5
    assert cli.main(list(argv)) == 0


def test_watch_evaluates_equal_weights_once(micro, tmp_path, monkeypatch):
    """Step 0 of RL repeats what the log says of the same weights; where that log is absent the
    model is evaluated, with the same result."""
    evaluate, asked = watch.evaluate, []

    def watched(model, problems, *rest, **words):
        asked.append(problems)
        return evaluate(model, problems, *rest, **words)

    monkeypatch.setattr(watch, "evaluate", watched)
    rewind(micro, tmp_path / "on", "distill_rl")
    assert cli.main([*FEW, "--out", str(tmp_path / "on")]) == 0
    dev = tasks.make_problems("dev", 2, (3, 4, 5, 6))
    assert asked.count(dev) == 2  # after the second step and after the last
    assert cli.main(["distill", *FEW, "--only", "distill_rl", "--from",
                     str(micro / "distill.pt"), "--out", str(tmp_path / "new")]) == 0
    assert asked.count(dev) == 2 + 3
    first = [[r for r in folder.read_log(path) if r.get("stage") == "distill_rl"
              and r.get("step") == 0] for path in (micro, tmp_path / "on", tmp_path / "new")]
    assert [r["kind"] for r in first[0]] == ["dev", "samples"] and first[0] == first[1] == first[2]


# -------------------------------------------------------------------------------------------------
# Which model each stage starts from, and which it learns from


@pytest.fixture
def graph(micro, tmp_path, monkeypatch):
    """(begun, asked, finished): the weights that each stage starts from, learns from and ends with,
    without running its loop."""
    begun, asked, models = {}, {}, {s: checkpoint.load(micro / f"{s}.pt")[0] for s in STAGES}
    # distill_logits runs too, as if it were no ablation.
    models["distill_logits"] = checkpoint.load(micro / "distill.pt")[0]
    monkeypatch.setattr(r1mini, "ABLATIONS", {"student_rl_no_format"})
    for i, model in enumerate(models.values()):  # so that no two stages have equal weights
        model.norm.weight.data += i / 100
    finished = {s: copy.deepcopy(model.state_dict()) for s, model in models.items()}

    def stage(self, name, model, loop, steps, watch):
        begun[name] = copy.deepcopy(model.state_dict())
        for p in model.parameters():  # a model that is not a copy is spoilt here
            p.data.zero_()
        return models[name]

    def collect(_, name, model, n, keep, change=None):
        asked[name] = (copy.deepcopy(model.state_dict()), keep, change)
        return r1mini.read_dialogues(micro / f"{name}.jsonl", 512)

    def remember(name):
        original = getattr(r1mini, name)

        def spy(*models):
            asked[name] = [model.state_dict() for model in models]
            return original(*models)
        monkeypatch.setattr(r1mini, name, spy)

    shutil.copytree(micro, tmp_path / "out")
    remember("preference_reward")
    remember("distillation_loss")
    monkeypatch.setattr(folder.Folder, "stage", stage)
    monkeypatch.setattr(r1mini, "collect", collect)
    monkeypatch.setattr(r1mini, "test_stage", lambda *_: None)
    assert cli.main([*FEW, "--out", str(tmp_path / "out")]) == 0
    return begun, asked, finished


def test_stages_start_from_the_papers_checkpoints(graph):
    """The cold start and the second SFT start from the base and each RL from the SFT before it (R1,
    Nature Fig 2)."""
    begun, asked, finished = graph
    parents = {"zero": "base", "dev1": "base", "dev2": "dev1", "dev3": "base", "r1": "dev3",
               "distill": "student", "distill_logits": "student", "student_rl": "student",
               "distill_rl": "distill"}
    for stage, parent in parents.items():
        same = [s for s in STAGES if equal_states(begun[stage], finished[s])]
        assert same == [parent], stage
    for stage in ("base", "student"):  # from random weights
        assert not equal_states(begun[stage], finished[stage])
    for stage in ("helpful", "safe"):
        body = {k: x for k, x in begun[stage].items() if k != "head.weight"}
        assert all(torch.equal(x, finished["dev3"][k]) for k, x in body.items())
        assert begun[stage]["head.weight"].shape == (1, 32) and not any("mtp" in k for k in body)


def test_stages_learn_from_the_papers_models(graph):
    """Dev1 learns from Zero's rewritten samples, Dev3 from Dev2's, the students from R1's, and R1
    from the two reward models (R1, Nature Fig 2)."""
    begun, asked, finished = graph
    assert equal_states(asked["dev1"][0], finished["zero"])
    assert asked["dev1"][2] is tasks.rewrite_answer
    assert equal_states(asked["dev3"][0], finished["dev2"]) and asked["dev3"][1] is r1mini.is_fit
    assert equal_states(asked["distill"][0], finished["r1"])
    assert asked["distill"][1] is r1mini.is_fit
    [teacher], judges = asked["distillation_loss"], asked["preference_reward"]
    assert equal_states(teacher, finished["r1"])
    assert equal_states(judges[0], finished["helpful"])
    assert equal_states(judges[1], finished["safe"])
