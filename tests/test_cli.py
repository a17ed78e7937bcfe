"""The tests of tools/cli.py and tools/settings.py: wrong words, presets, stages, studies."""
import dataclasses
import errno
import inspect
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import r1mini
import tasks
from engine import jsonl
from engine.errors import UserError
from engine.folder import flatten_settings
from grpo import RL
from studies import hours, peers, r1
from tests.helpers import json_lines, micro_run
from tests.refusing import contents, refused
from tools import bench, cli, settings

BAD = {  # words of a command -> what the error line must name
    "zero --set zero.lrr=1": "zero.lr",
    "zero --set zero.kl=1": "the nearest is zero.beta",
    "zero --set base.batch_size=1": "the nearest is base.documents",
    "zero --set zero.batch_size=1": "the nearest is zero.problems",
    "zero --set model.hidden_size=1": "the nearest is model.dim",
    "zero --set seed=1": "give --seed",
    "zero --set start=base.pt": "give --from",
    "zero --set zero.lr=fast": "a number",
    "zero --set corpus.summary=2": "shares",
    "zero --set model.kv_lora_rank=17": "even",
    "zero --set zero.lr=nan": "a number",
    "zero --set zero.steps=1.5": "whole number",
    "zero --set zero.levels=3,x": "whole numbers",
    "zero --set zero.normalize_std=maybe": "true or false",
    "zero --set zero.steps": "key=value",
    "zero --set zero.objective=ppo": "dr_grpo",
    "zero --set zero.group_size=1": "group_size",
    "zero --set zero.steps=0": "at least 1",
    "zero --set zero.max_new_tokens=9999": "max_new_tokens",
    "zero --set zero.temperature=0": "temperature",
    "zero --set r1.temperature=1e-40": "r1.temperature must be at least 0.01",
    "zero --set zero.temperature=inf": "a number",
    "zero --set eval.temperature=-0.5": "eval.temperature must be at least 0",
    "zero --set eval.temperature=nan": "a number",
    "zero --set corpus.drill=70": "corpus.drill exceeds the 64 steps that fit into model.max_seq",
    "zero --set corpus.drill=65 model.max_seq_len=2048": "that fit into student.max_seq_len, 512",
    "zero --set student_rl.max_new_tokens=300 student.max_seq_len=310":
        "student_rl.max_new_tokens exceeds the 260 tokens that student.max_seq_len leaves",
    "zero --set zero.levels=9": "levels",
    "zero --set model.qk_rope_head_dim=15": "even",
    "zero --set model.n_activated_experts=99": "n_activated_experts",
    "zero --set model.n_expert_groups=3": "n_expert_groups",
    "zero --set model.vocab_size=5": "vocab_size",
    "zero --set model.n_heads=0": "at least 1",
    "zero --set corpus.direct=0.9": "shares",
    "zero --set corpus.tags=2": "shares",
    "zero --set corpus.tags=-1": "at least 0",
    "zero --set zero.beta=-1": "at least 0",
    "zero --set zero.overlong=500": "overlong",
    "zero --set eval.top_p=0": "top_p",
    "zero --preset v3": "counting",
    "zero --preset nono": "nano",
    "zero --device cuda:77": "cuda:77",
    "zero --device toaster": "toaster",
    "zero --threads -1": "threads",
    "zero --save-every 0": "save-every",
    "zero --seed x": "seed",
    "zero --seed 99999999999999999999999": "seed",
    "zero --threads 100000": "threads",
    "zero --device meta": "meta",
    "zero --set model.dim=33": "multiples of 8",
    "eval {tmp}/half.pt": "damaged",
    "zero --from {tmp}/none.pt": "none.pt",
    "base --from {tmp}/none.pt": "--from",
    "zero --out {tmp}/file/inside": "file",
    "frobnicate": "frobnicate",
    "zero --frobnicate": "frobnicate",
    "eval": "checkpoint",
    "eval {tmp}/none.pt": "none.pt",
    "eval {tmp}/file": "file",
    "eval {micro}/zero.pt --samples 0": "samples",
    "eval {micro}/zero.pt --problems {tmp}/none.jsonl": "none.jsonl",
    "eval {micro}/zero.pt --problems {tmp}/file": "line 1",
    "eval {micro}/zero.pt --problems {tmp}/long.jsonl": "too long",
    "chat {tmp}/none.pt --ask hello": "none.pt",
    "chat {micro}/zero.pt --ask {long}": "tokens",
    "zero --from {micro}/base.pt --set model.dim=40": "has other sizes",
    "zero --from {micro}/base.pt --out {micro} --fresh": "delete",
    "report {micro} {micro}": "two of these runs",
    "zero --set zero.general=2": "at most 1",
    "zero --set data.general=2": "shares",
    "zero --set corpus.general=0.5": "shares",
    "zero --set judge.steps=0": "at least 1",
    "zero --set student.n_outputs=1": "reward models",
    "zero --set student.dim=20": "multiples of 8",
    "base --data {tmp}/file": "--data",
    "r1 --from {tmp}/none.pt": "none.pt",
    "r1 --from {tmp}/dev3.pt": "damaged",
    "r1 --from {tmp}/half.pt": "name it after its stage",
    "r1 --from {tmp}/own.pt": "own.pt",
    "dev1 --from {micro}/dev3.pt": "nothing to do",
    "zero --from {micro}/zero.pt": "nothing to do",
    "dev3 --from {micro}/helpful.pt": "nothing to do",
    "r1 --from {micro}/dev3.pt --set model.dim=40": "has other sizes",
    "distill --from {micro}/student.pt --set student.dim=24": "has other sizes",
    "distill --from {micro}/r1.pt --data {tmp}/file": "line 1",
    "eval {micro}/helpful.pt": "helpful.pt",
    "chat {micro}/safe.pt --ask hello": "safe.pt",
    "report {tmp}": "no run",
    "report {tmp}/none": "no run",
    "report": "runs",
    "study nothing": "zero",
}


@pytest.fixture(scope="session")
def micro():
    """The folder of one finished micro run of all stages; no test writes into it."""
    return micro_run()


@pytest.mark.parametrize("line", list(BAD))
def test_main_refuses_bad_words_in_one_line(micro, tmp_path, capsys, line):
    """Wrong words give exit code 2 and one line that names the trouble, and write nothing."""
    (tmp_path / "file").write_text("not what is wanted\n")
    for name in ("half.pt", "dev3.pt"):
        (tmp_path / name).write_bytes((micro / "zero.pt").read_bytes()[:20_000])
    shutil.copy(micro / "dev3.pt", tmp_path / "own.pt")
    (tmp_path / "long.jsonl").write_text(json_lines({"question": "1+" * 600, "answer": 1}))
    before, run_before = sorted(tmp_path.rglob("*")), contents(micro)
    argv = [w.format(tmp=tmp_path, micro=micro, long="1+" * 600) for w in line.split()]
    if argv[0] in ("zero", "base", "dev1", "dev3", "r1", "distill") and "--out" not in argv:
        argv += ["--out", str(tmp_path / "out")]
    if "--from" in argv and "--preset" not in argv:
        argv += ["--preset", "micro"]
    try:
        code = cli.main(argv)
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and error.count("\n") == 0 and BAD[line] in error, error
    assert len(error) < 400
    assert "Traceback (most" not in error and [f for f in sorted(tmp_path.rglob("*"))
                                         if f not in before and f.suffix] == []
    assert contents(micro) == run_before


def stages_of(run, kind):
    """The settings of a Run's RL stages, or of its supervised stages, by name."""
    return {name: s for name, s in vars(run).items() if isinstance(s, kind)}


def test_cli_preset_settings_reach_all_stages_of_a_kind():
    """In a preset zero.* reaches every RL stage and base.* every supervised stage. A user's setting
    reaches only the stage that it names."""
    run = cli.resolve_settings("micro", ["zero.lr=0.5", "dev1.lr=0.25"])
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
    run = cli.resolve_settings("nano", ["dev2.objective=dapo", "dev2.clip_high=0.4"][::order])
    s = run.dev2
    assert (s.clip_low, s.clip_high, s.beta, s.oversample, s.overlong) == (0.2, 0.4, 0.0, 2, 40)
    assert run.zero == r1mini.Run().zero and run.r1.objective == "grpo"


@pytest.mark.parametrize("preset", list(settings.TRAINING))
def test_cli_presets_pass_their_own_check(preset):
    """Every preset for training passes its check, and its models have the tokenizer's
    vocabulary."""
    run = cli.resolve_settings(preset, [])
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
    monkeypatch.setattr(cli, "_needed_checkpoints", lambda *_: {})  # no student exists
    file = tmp_path / "dialogues.jsonl"
    file.write_text(jsonl.jsonl_dialogue("Compute 1+2", "<answer>3</answer>"), "utf-8")
    argv = [word.format(file) for word in argv]
    assert cli._plan_run(cli.parse_arguments(argv))[1] == names.split()


def test_cli_narrow_console_gets_escapes():
    """A console that cannot print Chinese gets escapes and no traceback."""
    run = subprocess.run([sys.executable, r1mini.__file__, "chat", str(micro_run() / "zero.pt"),
                          "--ask", "计算12+3"], capture_output=True,
                         env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert run.returncode == 0 and b"answer" in run.stdout


@pytest.mark.parametrize("words", [
    "chat {}.pt --ask 1", "eval {}.pt", "eval zero.pt --problems {}", "zero --from {}/base.pt",
    "base --preset micro --out {}", "zero --set {}=1", "distill --data {}", "report {}",
    "report x={}", "report . --to {}", "export {}.pt x", "import {} x.pt", "import x {}.pt",
    "chat a.pt --ask {}", "bench --against --from {}.pt", "annotate {}", "bench --device {}"])
def test_cli_words_that_are_no_text_are_refused(words, tmp_path, monkeypatch, capsys):
    """A word of the command line with bytes that are not UTF-8 is refused by one line, and no file
    is made."""
    monkeypatch.chdir(tmp_path)
    assert "is not valid utf-8" in refused(words.format("\udcff").split(), capsys)
    assert not list(tmp_path.iterdir())


def test_cli_other_processes_print_any_text_to_nowhere(monkeypatch):
    """Processes that print nothing print Chinese to nowhere too, in any locale."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "1"),
                        ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    for name in ("stdout", "stderr", "excepthook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # restores it after the test
    cli.parse_arguments(["cost"])
    assert sys.stdout.name == os.devnull and sys.stdout.encoding == "utf-8"


def test_cli_words_for_settings_lead_to_settings():
    """Every other word for a setting leads to a setting that exists, and every option is one."""
    names = flatten_settings(dataclasses.asdict(r1mini.Run()))
    keys = {key.partition(".")[2] for key in names if "." in key}
    for words in settings.SYNONYMS.values():
        assert {words} <= keys if isinstance(words, str) else set(words) <= keys
    assert not keys & settings.SYNONYMS.keys()
    options = {word for command in cli._make_parser()._subparsers._group_actions[0].choices.values()
               for word in command._option_string_actions}
    assert set(settings.OPTIONS.values()) <= options


def test_cli_missing_device_is_one_short_line(monkeypatch, capsys):
    """torch's 1,300 characters about a missing MPS device become one sentence. A device without
    free memory is not called missing."""
    def missing(*_, **__):
        raise RuntimeError("Could not run 'aten::empty' with arguments from the 'MPS' backend. "
                           "This could be because " + "of many reasons, " * 80)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
    monkeypatch.setattr(torch, "zeros", missing)
    line = refused(["bench", "--device", "mps"], capsys)
    assert line.startswith("r1mini: --device mps: not available here") and len(line) < 200
    monkeypatch.setattr(torch, "zeros", full)
    line = refused(["bench", "--device", "cpu"], capsys)
    assert "out of memory" in line and "not available" not in line


@pytest.mark.parametrize("device", [
    "mps", "xpu", "hpu", "cuda:77", "cuda:-1", "vulkan", "xla", "privateuseone", "nonsense", "meta",
    "0"])
def test_cli_any_missing_device_is_one_short_line(device, capsys):
    """A device that is not there is refused by one short line with its name."""
    line = refused(["bench", "--preset", "micro", "--device", device], capsys)
    assert f"--device {device}: not available here" in line and len(line) < 200


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGPIPE")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["cost --preset v3", "--help", "zero --help"])
def test_cli_closed_pipe_ends_a_command_quietly(words, unbuffered):
    """A command whose reader is gone prints nothing, when it prints and when Python ends."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        run = subprocess.run([sys.executable, r1mini.__file__, *words.split()], stdout=pipe,
                             stderr=subprocess.PIPE,
                             env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert run.stderr == b"" and run.returncode in (0, cli.CLOSED_PIPE)


def test_cli_steps_and_rates_stay_with_their_stage():
    """laptop's long pretraining does not lengthen its cold start, but its levels hold for every RL
    stage."""
    run = cli.resolve_settings("laptop", [])
    assert run.base.steps == 1200 and run.dev1.steps == r1mini.Run().dev1.steps
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
    """No prompt of the corpus, stray spaces included, is longer than the room that
    _check_settings() leaves for it."""
    rng = random.Random(0)
    questions = [tasks.add_spaces(tasks.make_problem(rng, 7, products=p), rng).question
             for p in (0.0, 0.5) for _ in range(3000)]
    questions += [p.question for p in tasks.make_problems("test", 200, (9,))]
    questions += [tasks.make_prompt(rng).question for _ in range(3000)]
    longest = max(len(tasks.encode_prompt(question)) for question in questions)
    assert 30 < longest <= settings.LONGEST_PROMPT


@pytest.mark.parametrize("changes", [
    "corpus.drill=37", "corpus.levels=7 corpus.checked=0.7", "corpus.levels=7 corpus.steps=0.7",
    "corpus.levels=6,7 corpus.checked=0.7 corpus.products=0.5", "corpus.general=0.7"])
def test_cli_documents_of_accepted_settings_fit(changes):
    """Settings that the shortest model accepts make no document that is longer than it, also where
    every step slips."""
    given = [f"corpus.{name}=1" for name in ("summary", "tags", "spaced", "direct_slips",
                                             "steps_slips", "checked_slips")]
    given += [f"corpus.{style}=0.1" for style in (*tasks.STYLES, "general")]
    given += ["model.max_seq_len=300", "student.max_seq_len=300", *changes.split()]
    run, rng = cli.resolve_settings("nano", given), random.Random(0)
    lengths = [len(tasks.make_document(rng, run.corpus).tokens) for _ in range(600)]
    assert max(lengths) <= settings.LONGEST_DOCUMENT


def test_cli_longest_drill_is_the_bound():
    """The longest drills have DRILL_STEP tokens a step, and few are far below it."""
    rng, corpus = random.Random(0), tasks.Corpus(drill=50)
    lengths = [len(tasks.drill(rng, corpus).tokens) for _ in range(50)]
    assert 0.95 * 50 * settings.DRILL_STEP < max(lengths) <= 50 * settings.DRILL_STEP


def test_cli_teacher_has_to_read_the_dialogues_too(tmp_path, monkeypatch):
    """A dialogue that only the student can read is refused where R1 reads it as well
    (distill_logits), and not elsewhere."""
    monkeypatch.setattr(cli, "_needed_checkpoints", lambda *_: {})
    file = tmp_path / "long.jsonl"
    file.write_text(jsonl.jsonl_dialogue("1+" * 300, "<answer>3</answer>"), "utf-8")
    argv = ["distill", "--data", str(file), "--set", "student.max_seq_len=700"]
    assert cli._plan_run(cli.parse_arguments([*argv]))[1] == ["student", "distill"]
    with pytest.raises(UserError, match="dialogue 1 has .* at most 512 fit"):
        cli._plan_run(cli.parse_arguments([*argv, "--only", "distill_logits"]))


STUDIES = sorted(path.stem for path in (Path(r1mini.__file__).parent / "studies").glob("[a-z]*.py"))


def test_cli_find_study_names_all_studies():
    """find_study imports a study by its name, and an unknown name is refused with all names."""
    assert cli._find_study("r1") is r1
    with pytest.raises(UserError) as refusal:
        cli._find_study("everything")
    assert str(refusal.value) == f"study everything: choose all or one of {', '.join(STUDIES)}"
    for name in ("__init__", "../tools/cli", "studies.r1", ""):
        with pytest.raises(UserError):
            cli._find_study(name)


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


def test_cli_with_fresh_the_same_command_does_not_go_on():
    """After a full disk: the same command goes on, but with --fresh it would delete the run."""
    error = OSError(errno.ENOSPC, "No space left on device", "log.jsonl")
    for words, wanted in ((["base"], "the same command goes on"),
                          (["base", "--fresh"], "the same command without --fresh goes on")):
        options = cli._make_parser().parse_args(words)
        assert cli._user_error_line(error, options).endswith(f"free some space, and {wanted}")
