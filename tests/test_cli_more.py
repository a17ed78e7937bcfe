"""More tests of tools/cli.py: presets, the stages of a command, finding studies."""
import inspect
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import r1mini
import tasks
from engine import jsonl
from engine.errors import UserError
from grpo import RL
from studies import hours, peers, r1
from tests.helpers import micro_run
from tools import bench, cli


def stages_of(run, kind):
    """The settings of a Run's RL stages, or of its supervised stages, by name."""
    return {name: s for name, s in vars(run).items() if isinstance(s, kind)}


def test_cli_preset_settings_reach_all_stages_of_a_kind():
    """In a preset zero.* reaches every RL stage and base.* every supervised stage. A user's setting
    reaches only the stage that it names."""
    run = cli.resolve("micro", ["zero.lr=0.5", "dev1.lr=0.25"])
    rl, supervised = (stages_of(run, kind) for kind in (RL, r1mini.Train))
    assert set(rl) == {"zero", "dev2", "r1", "student_rl", "distill_rl"}
    assert {s.steps for s in rl.values()} == {4} and {s.steps for s in supervised.values()} == {20}
    assert [name for name, s in (rl | supervised).items() if s.lr == 0.5] == ["zero"]
    assert [name for name, s in (rl | supervised).items() if s.lr == 0.25] == ["dev1"]
    assert run.r1.general == 0.5 and run.r1.language_weight == 0.5 and run.zero.general == 0


@pytest.mark.parametrize("order", [1, -1])
def test_cli_objective_brings_its_settings(order):
    """DAPO's clip range, KL penalty and sampling come with its name, for that stage only, and a
    setting of the user wins in any order."""
    run = cli.resolve("nano", ["dev2.objective=dapo", "dev2.clip_high=0.4"][::order])
    s = run.dev2
    assert (s.clip_low, s.clip_high, s.beta, s.oversample, s.overlong) == (0.2, 0.4, 0.0, 2, 40)
    assert run.zero == r1mini.Run().zero and run.r1.objective == "grpo"


@pytest.mark.parametrize("preset", list(cli.TRAINING))
def test_cli_presets_pass_their_own_check(preset):
    """Every preset for training passes its check, and its models have the tokenizer's
    vocabulary."""
    run = cli.resolve(preset, [])
    assert run.model.vocab_size == run.student.vocab_size == tasks.VOCAB_SIZE
    assert all(s.general == 0 for name, s in stages_of(run, RL).items() if name != "r1")


@pytest.mark.parametrize("argv, names", [
    ([], "base zero dev1 dev2 dev3 helpful safe r1 student distill student_rl "
         "distill_rl"),
    (["base"], "base"), (["zero"], "base zero"), (["dev3"], "base zero dev1 dev2 dev3"),
    (["r1"], "base zero dev1 dev2 dev3 helpful safe r1"),
    (["distill", "--data", "{}"], "student distill"),
    (["distill", "--only", "student_rl_no_format"], "student_rl_no_format")])
def test_cli_command_runs_its_stages_in_order(argv, names, tmp_path, monkeypatch):
    """A command runs the stages up to its own in the paper's order, with a user's dialogues only
    the student's. Ablations run only if named."""
    monkeypatch.setattr(cli, "wanted", lambda *_: {})  # no student exists
    file = tmp_path / "dialogues.jsonl"
    file.write_text(jsonl.chat_line("Compute 1+2", "<answer>3</answer>"), "utf-8")
    argv = [word.format(file) for word in argv]
    assert cli.plan(cli.parse(argv))[1] == names.split()


def test_cli_narrow_console_gets_escapes():
    """A console that cannot print Chinese gets escapes and no traceback."""
    run = subprocess.run([sys.executable, r1mini.__file__, "chat", str(micro_run() / "zero.pt"),
                          "--ask", "计算12+3"], capture_output=True,
                         env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert run.returncode == 0 and b"answer" in run.stdout


def test_cli_steps_and_rates_stay_with_their_stage():
    """laptop's long pretraining does not lengthen its cold start, but its levels hold for every RL
    stage."""
    run = cli.resolve("laptop", [])
    assert run.base.steps == 4000 and run.dev1.steps == r1mini.Run().dev1.steps
    assert run.r1.levels == run.zero.levels == (4, 5, 6, 7) and run.r1.lr == r1mini.Run().r1.lr


def test_cli_needs_equal_the_models_a_stage_takes():
    """NEEDS names exactly the models that the source of each stage takes, or that of a function to
    which it passes all models."""
    for name, stage in r1mini.STAGES.items():
        source = inspect.getsource(stage)
        for called in re.findall(r"(\w+)\(folder, models\)[^:]", source):
            source += inspect.getsource(getattr(r1mini, called))
        taken = re.findall(r'models(?:\[|, )"(\w+)"', source)
        assert set(taken) == set(cli.NEEDS.get(name, ())), name


def test_cli_longest_question_has_room():
    """No prompt of the corpus, stray spaces included, is longer than the room that check() leaves
    for it."""
    rng = random.Random(0)
    questions = [tasks.add_spaces(tasks.make_problem(rng, 7, products=p), rng).question
             for p in (0.0, 0.5) for _ in range(3000)]
    questions += [p.question for p in tasks.make_problems("test", 200, (9,))]
    questions += [tasks.make_prompt(rng).question for _ in range(3000)]
    longest = max(len(tasks.encode_prompt(question)) for question in questions)
    assert 30 < longest <= cli.PROMPT


STUDIES = sorted(path.stem for path in (Path(r1mini.__file__).parent / "studies").glob("[a-z]*.py"))


def test_cli_find_study_names_all_studies():
    """find_study imports a study by its name, and an unknown name is refused with all names."""
    assert cli.find_study("r1") is r1
    with pytest.raises(UserError) as refusal:
        cli.find_study("everything")
    assert str(refusal.value) == f"study everything: choose one of {', '.join(STUDIES)}"
    for name in ("__init__", "../tools/cli", "studies.r1", ""):
        with pytest.raises(UserError):
            cli.find_study(name)


@pytest.mark.parametrize("words, module, other", [
    ("bench --preset micro --against", peers, bench), ("bench --preset micro", bench, peers),
    ("cost --preset micro --gpus 8", hours, None), ("cost --preset micro", None, hours)])
def test_cli_options_lead_to_studies(words, module, other, monkeypatch):
    """bench --against calls studies/peers.py and cost --gpus calls studies/hours.py. Without the
    option, the tool runs alone."""
    called = []
    for each in {bench, peers, hours}:
        monkeypatch.setattr(each, "main", lambda options, each=each: called.append(each) or 7)
    assert cli.main(words.split()) == (7 if module else 0)
    assert called == ([module] if module else []) and other not in called
