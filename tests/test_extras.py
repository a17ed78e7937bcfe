"""The tests of what is in extras/: settings, eval, chat, report, cost."""
import dataclasses
import importlib
import itertools
import json
import math
import operator
import os
import pathlib
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

import moe
import r1mini
import tasks
from engine import evaluate, jsonl
from grpo import RL
from studies import compute, program
from tools import bench, cli, report, study
from tools.cost import count_parameters

HERE = pathlib.Path(r1mini.__file__).parent


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """The folder of one whole run on the micro preset."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main(["zero", "--preset", "micro", "--out", str(folder)]) == 0
    return folder


def lines_of(*records):
    """JSONL text."""
    return "".join(json.dumps(r) + "\n" for r in records)


def test_eval_reports_a_users_problems_in_file_order(micro, tmp_path, capsys):
    """eval --problems --json: one object, each problem in order, consistent with its means."""
    file = tmp_path / "mine.jsonl"
    file.write_text(lines_of({"question": "Compute 12+3", "answer": 15},
                             {"question": "计算9-4 <think>", "answer": "5"}), "utf-8")
    assert cli.main(["eval", str(micro / "zero.pt"), "--problems", str(file), "--samples", "4",
                        "--json"]) == 0
    r = json.loads(capsys.readouterr().out)
    assert [p["question"] for p in r["by_problem"]] == ["Compute 12+3", "计算9-4 <think>"]
    assert r["pass@1"] == pytest.approx(sum(p["right"] for p in r["by_problem"]) / 8)
    assert {"pass@4", "cons@4", "length", "mixing"} <= set(r)


def stages_of(run, kind):
    """The settings of a Run's stages of RL, or of its supervised ones, by name."""
    return {name: s for name, s in vars(run).items() if isinstance(s, kind)}


def test_what_a_preset_says_of_one_stage_holds_for_all_of_its_kind():
    """zero.* reaches every stage of RL, base.* every supervised one; what the user sets, one."""
    run = cli.resolve("micro", ["zero.lr=0.5", "dev1.lr=0.25"])
    rl, supervised = (stages_of(run, kind) for kind in (RL, r1mini.Train))
    assert set(rl) == {"zero", "dev2", "r1", "student_rl", "distill_rl"}
    assert {s.steps for s in rl.values()} == {4} and {s.steps for s in supervised.values()} == {20}
    assert [name for name, s in (rl | supervised).items() if s.lr == 0.5] == ["zero"]
    assert [name for name, s in (rl | supervised).items() if s.lr == 0.25] == ["dev1"]
    assert run.r1.general == 0.5 and run.r1.language_weight == 0.5 and run.zero.general == 0


@pytest.mark.parametrize("order", [1, -1])
def test_an_objective_brings_its_settings_unless_told_otherwise(order):
    """DAPO's clip, leash and sampling come with its name, to that stage; a setting given wins."""
    run = cli.resolve("nano", ["dev2.objective=dapo", "dev2.clip_high=0.4"][::order])
    s = run.dev2
    assert (s.clip_low, s.clip_high, s.beta, s.oversample, s.overlong) == (0.2, 0.4, 0.0, 2, 40)
    assert run.zero == r1mini.Run().zero and run.r1.objective == "grpo"


@pytest.mark.parametrize("preset", list(cli.TRAINING))
def test_presets_make_sense(preset):
    """Every preset to train passes its own check, and its models hold the tokenizer."""
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
def test_a_command_names_its_stages(argv, names, tmp_path, monkeypatch):
    """Up to the stage asked for, in the paper's order; with dialogues of one's own, a student's;
    ablations only if named."""
    monkeypatch.setattr(cli, "wanted", lambda *_: {})  # an ablation's student is not there
    file = tmp_path / "mine.jsonl"
    file.write_text(jsonl.chat_line("Compute 1+2", "<answer>3</answer>"), "utf-8")
    argv = [word.format(file) for word in argv]
    assert cli.plan(cli.parse(argv))[1] == names.split()


def test_a_narrow_console_prints_on(micro):
    """A console that cannot print Chinese gets escapes, not a traceback."""
    run = subprocess.run([sys.executable, str(HERE / "r1mini.py"), "chat", str(micro / "zero.pt"),
                          "--ask", "计算12+3"], capture_output=True,
                         env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert run.returncode == 0 and b"answer" in run.stdout


def test_report_gives_mean_spread_and_seeds(micro, tmp_path, capsys):
    """summary.json: the command, and each figure's mean, deviation and value by seed."""
    other = tmp_path / "seed1"
    assert cli.main(["zero", "--preset", "micro", "--seed", "1", "--out", str(other)]) == 0
    assert cli.main(["report", str(micro), str(other), "--to", str(tmp_path / "kept")]) == 0
    summary = json.loads((tmp_path / "kept" / "summary.json").read_text("utf-8"))
    assert summary["seeds"] == [0, 1] and "report" in summary["command"]
    assert (tmp_path / "kept" / "samples.md").read_bytes() == (micro / "samples.md").read_bytes()
    length = summary["metrics"]["zero.length"]
    one, two = length["per_seed"]["0"], length["per_seed"]["1"]
    assert length["mean"] == pytest.approx((one + two) / 2, abs=1e-4)
    assert length["std"] == pytest.approx(abs(one - two) / 2 ** 0.5, abs=1e-4)
    keys = {"base.pass@1", "zero.pass@1", "zero.eval.longer.pass@1", "zero.length_ratio",
            "zero.mixing", "zero.reflection_ratio", "base.mixing", "minutes", "peak_gib",
            "objective.grpo.pass@1"}
    assert keys - {"minutes"} <= set(summary["metrics"])
    alone = torch.get_num_threads() == os.cpu_count()
    assert ("minutes" in summary["metrics"]) == alone


def test_cost_counts_v3(capsys):
    """671B parameters, 37B active, a cache of 35,136 numbers a token (PAPERS 1.1 and 1.8)."""
    assert cli.main(["cost", "--preset", "v3"]) == 0
    out = capsys.readouterr().out
    assert "671,026,404,352" in out and "37,552,282,624" in out and "35,136" in out


def test_the_readme_names_what_is_there():
    """Each `module.name` of the table from the paper to the line."""
    section = (HERE / "README.md").read_text("utf-8").split("## From the paper to the line")[1]
    named = re.findall(r"`(moe|grpo|tasks|r1mini)\.([\w.]+)`", section.split("\n## ")[0])
    assert len(named) > 30
    for module, name in named:
        operator.attrgetter(name)(importlib.import_module(module))


def test_the_readme_quotes_what_runs_printed():
    """Each table row with a spread stands in a report, each answer quoted in seed 0's samples; file
    sizes are the files' own."""
    readme = (HERE / "README.md").read_text("utf-8")
    reports = "\n".join(f.read_text("utf-8") for f in (HERE / "results").glob("*/report.md"))
    quoted = [line for line in readme.splitlines() if line.startswith("|") and "±" in line]
    assert len(quoted) > 8 and [line for line in quoted if line not in reports] == []
    samples = (HERE / "results" / "r1" / "samples.md").read_text("utf-8")
    answers = re.findall(r"^> - \*\*(.+)\*\*: (`.+`)$", readme, re.MULTILINE)
    assert len(answers) == 2 and all(re.search(
        rf"\*\*{step}\*\*, right: {re.escape(text)}", samples) for step, text in answers)
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.MULTILINE):
        assert len((HERE / name).read_text("utf-8").splitlines()) == int(lines), name


def test_central_is_smoothies_choice():
    """The most central answer has the smallest delta, averaged over all pairs of the others."""
    for k in (3, 5, 8):
        e = torch.randn(k, 6, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        d = torch.cdist(e, e) ** 2
        delta = [sum((d[i, a] + d[i, b] - d[a, b]) / 2 for a, b in itertools.combinations(
            [j for j in range(k) if j != i], 2)) / math.comb(k - 1, 2) for i in range(k)]
        assert int(evaluate.central(e)) == min(range(k), key=lambda i: delta[i])


def test_votes_are_means_over_blocks():
    """Right, wrong, wrong, right: no majority of two wins, the tie of four goes to the first."""
    p = tasks.Problem("Compute 1+2", "3", "en", 1, "1+2")
    right, wrong = (tasks.response("", n) for n in (3, 4))
    r = evaluate.selection([right, wrong, wrong, right, right, right, wrong, wrong], [p])
    assert round(r["pass@1"], 9) == r["cons@1"] == 0.5 and r["cons@4"] == 1.0 and r["pass@8"] == 1.0


def test_cut_keeps_short_thinking_and_cuts_long():
    """A hand-worked answer, in the template and out of it."""
    ids = tasks.encode_response("<think>1+2=3</think><answer>3</answer>")
    assert compute.cut(ids, 5) is None
    assert tasks.decode(compute.cut(ids, 2)) == "<think>1+</think><answer>"
    assert tasks.decode(compute.cut(tasks.encode_response("1+2=3"), 0)) == "<think></think><answer>"
    assert compute.cut(tasks.encode_response("<think></think><answer>3</answer>"), 0) is None


def test_steps_tell_caught_and_mended():
    """A hand-worked answer; and in the corpus' checked workings every slip is mended."""
    text = ("<think>25-7=17 check 17+7=24 wait 25-7=18 check 18+7=25 ok 18+9=26然后26+6=32</think>"
            "<answer>32</answer>")
    assert [(s["wrong"], s["caught"], s["mended"]) for s in compute.steps(text)] == [
        (True, True, True), (True, False, False), (False, False, False)]
    rng = random.Random(0)
    for _ in range(200):
        p = tasks.make_problem(rng, 5, products=0.3)
        found = compute.steps(tasks.response(*tasks.work(p, "checked", rng, 0.3, 0.4)))
        assert found and all(s["mended"] == s["caught"] == s["wrong"] for s in found)


def test_a_ban_holds_only_while_it_lasts():
    """Inside the context the tokens have no chance; after it all is as before."""
    model = moe.Transformer(r1mini.PRESETS["micro"]).eval()
    tokens = torch.tensor([[1, 2, 3]])
    free = model(tokens).logits
    with compute.banned(model, [5, 7]):
        held = model(tokens).logits
    assert (held[..., [5, 7]] == -math.inf).all() and torch.equal(model(tokens).logits, free)


def test_embeddings_are_means_over_the_thinking():
    """Against one unpadded forward pass an answer."""
    model = moe.Transformer(r1mini.PRESETS["micro"]).eval()
    prompts = [tasks.encode_prompt("Compute 1+2"), tasks.encode_prompt("Compute 15-12+9")]
    ids = [tasks.encode_response(text)
           for text in ("<think>1+2=3</think><answer>3</answer>", "4")]
    e = evaluate.embeddings(model, prompts, ids, 8)
    for row, p, a in zip(e, prompts, (ids[0][:7], ids[1])):
        h = model(torch.tensor([p + a])).hidden[0, len(p):].mean(0)
        torch.testing.assert_close(row, h)


expressions = st.recursive(
    st.just("x") | st.integers(0, 9).map(str),
    lambda inner: st.builds("{}{}{}".format, inner, st.sampled_from(["+", "-", "*", " + "]), inner)
    | inner.map("-{}".format) | inner.map("({})".format), max_leaves=6)  # 9 ** 6: under a million


@settings(deadline=None, derandomize=True, max_examples=300)
@given(expressions, st.integers(-9, 9))
def test_programs_agree_with_python(text, x):
    """Any expression of at most 60 characters is worth what Python says."""
    want = eval(text, {"__builtins__": {}}, {"x": x}) if len(text) <= 60 else None
    assert program.run_program(text, x) == want


@pytest.mark.parametrize("text, value", [
    ("3+2*x", 13), ("x", 5), ("-x", -5), ("--x", 5), ("(x+1)*(x-1)", 24), (" x - 7 ", -2),
    ("2*x+3*x-x", 20), ("7", 7), ("1000*1000", 10 ** 6), ("-" * 57 + "1", -1)])
def test_programs_by_hand(text, value):
    """At x = 5."""
    assert program.run_program(text, 5) == value


HOSTILE = ["", " ", "x**2", "2**99999999", "9**9**9", "x//2", "x/2", "x%2", "x()", "x(x)", "(x)(x)",
           "(x,)", "()", "x.__class__", "().__class__", "lambda: 1", "lambda x: x", "__import__",
           "print(1)", "eval('1')", "xx", "x x", "1 2", "3x", "x3", "0x10", "0b1", "1e5", "1_0",
           "1.5", "True", "x if x else 1", "[x]", "{x}", "x:=1", "x=1", "x==1", "x<1", "not x",
           "~x",
           "+", "-", "*x", "(*x)", "x+", "(x", "x)", "(" * 50, ")" * 50, "(" * 31 + "x" + ")" * 31,
           "9" * 60, "-" * 59 + "11", "9*" * 29 + "9", "1000*1001", "0*(1000*1001)", "007",
           "３+x", "٣", "²", "x\n", "\nx", "x\t", "x\0", "x #", "x;x", "\ud800", "x" * 10 ** 6,
           "-" * 10 ** 6 + "x", "<answer>x"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_a_hostile_program_is_worth_none(text):
    """Powers, calls, names, other notations, nesting, size: None, and nothing is raised."""
    assert program.run_program(text, 3) is None


@pytest.mark.parametrize("answer, share", [
    ("2*x+3", 1), ("3+2*x", 1), ("x+x+3", 1), ("(x+1)*2+1", 1), ("3", 1 / 3), ("2*x-3", 0),
    ("x+3", 1 / 3), ("5", 1 / 3), ("x*x+3", 1 / 3), ("x*x*x+x+3", 2 / 3), ("2x+3", 0), ("", 0),
    ("x**1+x+3", 0), ("x//0", 0)])
def test_the_share_of_unit_tests_by_hand(answer, share):
    """f(0)=3, f(1)=5, f(-2)=-1: any spelling of 2x+3 passes all; a part earns its part."""
    problem = tasks.Problem("", "2*x+3", "en", kind="program", expression="f(0)=3 f(1)=5 f(-2)=-1")
    text = f"<think>1+1=2</think><answer>{answer}</answer>"
    assert program.tests_passed(text, problem) == pytest.approx(share)
    assert program.tests_passed(answer, problem) == 0                    # outside the template


def test_lines_are_in_three_parts():
    """Ninety lines, each in one part; a part of a line earns its part."""
    parts = [{p.answer for p in ps} for ps in program.PROGRAMS.values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 90
    p = program.make_program(2, 3)
    assert p.question == "f(0)=3 f(1)=5 f(2)=7 f(3)=9"
    for answer, share in (("2*x+3", 1), ("3+x*2", 1), ("x+3", 0.25), ("", 0), ("9", 0.25)):
        assert program.tests_passed(tasks.response("", answer), p) == share


def test_steps_and_rates_stay_with_their_stage():
    """laptop's long pretraining is not its cold start's; its longer chains are every stage's."""
    run = cli.resolve("laptop", [])
    assert run.base.steps == 4000 and run.dev1.steps == r1mini.Run().dev1.steps
    assert run.r1.levels == run.zero.levels == (4, 5, 6, 7) and run.r1.lr == r1mini.Run().r1.lr


def test_a_tie_is_half_a_win_and_ablations_do_not_hide_the_minutes():
    """Scores 1, 0, 1 against 0, 0, 1 win 2 of 3; a folder of an ablation beside a whole run."""
    def of(stages, minutes, scores):
        return report.Account("", "", "0", {}, {}, stages, scores, {}, minutes, 1.0)
    whole = of(["zero", "r1"], 9.0, {"dev1": [0, 0, 1], "r1": [1, 0, 1]})
    rows = report.over_seeds([whole, of(["student_rl_no_format"], None, {})])
    assert rows["r1.win_rate_dev1"]["mean"] == pytest.approx(2 / 3, abs=1e-6)
    assert rows["minutes"]["mean"] == 9.0


def test_the_gap_is_between_the_two_bans(monkeypatch):
    """Each ban spoils one answer of two: both have an effect, and between them there is no gap."""
    right, wrong = (tasks.encode_response(tasks.response("", n)) for n in (3, 4))
    plans = iter([[right, right], [right, wrong], [wrong, right], [wrong, wrong], [right, right]])
    monkeypatch.setattr(compute, "sample_answers", lambda *_, **__: next(plans))
    problem = tasks.Problem("Compute 1+2", "3", "en", 1, "1+2")
    model = moe.Transformer(r1mini.PRESETS["micro"])
    r = compute.bans(model, [], [problem] * 2, 8, 8, [right], 1)
    assert (r["ban.wait.effect"], r["ban.wait's neutral.effect"]) == (-0.5, -0.5)
    assert r["ban.wait.gap"] == 0
    assert (r["ban.check.effect"], r["ban.check.gap"]) == (-1.0, -1.0)
    assert r["ban.wait.gap.error"] > 0 == r["ban.check.gap.error"]


def test_a_neutral_word_is_as_frequent():
    """Of 'then' and 'ok', in one language, the token nearest in number to both languages' word."""
    def text(name, language="en"):
        return tasks.ENCODING.encode_ordinary(tasks.WORDS[language][name])
    answers = [text("wait") * 3 + text("wait", "zh") * 2 + text("check") * 50
               + text("ok") * 40 + text("ok", "zh") * 9 + text("then", "zh") * 5]
    assert [compute.neutral(answers, "wait")] == text("then", "zh")
    assert [compute.neutral(answers, "check")] == text("ok")


def test_flops_by_hand():
    """RL writes all tokens (2 N) and learns from those of live groups (6 N, and 2 N for the
    reference); a supervised stage learns all (6 N), a teacher's its MTP too; collected samples are
    the teacher's (2 N). In N an embedding is not."""
    run = r1mini.Run()
    N, small = (count_parameters(c)[1] - c.vocab_size * c.dim for c in (run.model, run.student))
    log = [{"kind": "config"} | dataclasses.asdict(run),
           {"kind": "zero", "tokens": 700, "prompt_tokens": 300, "learnt_tokens": 400},
           {"kind": "base", "tokens": 50}, {"kind": "distill", "tokens": 50},
           {"kind": "collected", "stage": "distill", "tokens": 9},
           {"kind": "distill_logits", "tokens": 5}]
    model = moe.Transformer(run.model)
    mtp = model.head.weight.numel() + sum(  # which has a head's use, and 2 of 8 experts
        p.numel() // (4 if ".experts." in name else 1) for name, p in model.mtp.named_parameters())
    want = {"zero": (2 * 1000 + 8 * 400) * N, "base": 300 * (N + mtp), "distill": 300 * small,
            "collect_distill": 18 * N, "distill_logits": 30 * small + 10 * N}
    assert report.of_flops(log) == pytest.approx({k: x / 1e12 for k, x in want.items()})
    log[0]["zero"] = {"beta": 0}
    assert report.of_flops(log)["zero"] == pytest.approx((2 * 1000 + 6 * 400) * N / 1e12)


def test_the_threshold_is_told_by_student(tmp_path, monkeypatch):
    """Students in order of their bases; who wins, and where RL stays below one half, is counted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "POINTS", ((48, 250), (64, 800)))
    values = {"48-250": (0.02, 0.05, 0.6), "default": (0.04, 0.06, 0.9), "64-800": (0.15, 0.9, 0.8)}
    rows = {f"{name}.{fate}{cost}": {"per_seed": {"0": x}} for name, found in values.items()
            for fate, x in zip(study.FATES, found) for cost in ("", ".tflop")}
    rows |= {f"{name}.base, on dev": {"per_seed": {"0": 0.01}} for name in values}
    lines = study.threshold_page(rows, {})
    assert [re.findall(r"0\.\d+", line)[:3] for line in lines if ", seed 0" in line] == [
        ["0.020", "0.050", "0.600"], ["0.040", "0.060", "0.900"], ["0.150", "0.900", "0.800"]]
    text = "\n".join(lines)
    assert "Distilled beats RL on 2 of 3 students, the best of them with a base at 0.040" in text
    assert "RL stays below one half on 2, with bases up to 0.040" in text
    assert "fewer FLOPs than distillation on 2." in text


@pytest.mark.parametrize("name", list(study.RUNS))
def test_each_studys_commands_make_sense(name, tmp_path, monkeypatch):
    """A wrong word would be found minutes into a study; the checkpoints are thought to be there."""
    monkeypatch.setattr(cli, "wanted", lambda *_: {})
    monkeypatch.setattr(cli, "load_stage", lambda *_: None)
    file = tmp_path / "distill.jsonl"
    file.write_text(jsonl.chat_line("Compute 1+2", "<answer>3</answer>"), "utf-8")
    for folder, command in study.runs(name, 0):
        options = cli.parse([str(file) if w.endswith(file.name) else w for w in command])
        _, stages = cli.plan(options)
        assert not options.only or set(stages) == set(options.only)
        assert options.seed == 0 and "{" not in folder


def test_other_presets_keep_apart():
    """A trial on micro must not stand in nano's folders, nor its report in nano's place."""
    for name in study.RUNS:
        nano, micro = study.runs(name, 1), study.runs(name, 1, "micro")
        assert [(f.replace("runs/", "runs/micro-"), [word.replace("runs/", "runs/micro-")
                for word in cli]) for f, cli in nano] == micro
    assert study.results_at(SimpleNamespace(name="r1", preset="micro")) == "results/r1-micro"


@pytest.mark.parametrize("command, said", [
    ("study --preset micro compute --seeds 0", "first run python r1mini.py study --preset micro"),
    ("study compute --preset micro --seeds 0", "first run python r1mini.py study --preset micro"),
    ("study compute --out foo", "--out"), ("study r1 --out=foo", "--out")])
def test_a_study_says_what_it_wants(command, said, tmp_path, monkeypatch, capsys):
    """Before anything is measured; one line, exit code 2."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_study_stands_in_the_report_beside_it(tmp_path):
    """Its title and first line go, its headings move down, its figures are found from there."""
    (tmp_path / "compute").mkdir()
    (tmp_path / "compute" / "report.md").write_text(
        "# compute\n\n`the command`\n\n## More\n\n![x](figures/x.png)\n", "utf-8")
    (tmp_path / "compute" / "summary.json").write_text('{"seeds": [0, 2], "commit": "abc"}')
    assert report.studied(tmp_path / "r1") == {"Test-time compute": [
        "`the command`", "", "Seeds 0, 2, commit abc.", "", "### More", "",
        "![x](../compute/figures/x.png)"]}


def test_bench_prints_every_figure(capsys, monkeypatch):
    """One round each on micro: rates above 0, a share of the peak below 1, a step and its parts."""
    monkeypatch.setattr(bench, "ROUNDS", 1)
    assert cli.main(["bench", "--preset", "micro", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert min(x for key, x in found.items() if not isinstance(x, str)
               and key != "step.reference") > 0  # that is a difference
    assert 0 < found["train.peak_share"] < 1
    assert min(found[f"step.{part}"] for part in ("sample", "reward", "learn", "whole")) > 0
    assert (found["cache.latent"], found["cache.heads"]) == (4 * 2 * 24, 4 * 2 * 2 * 32)
    assert "times as fast" in bench.page({"step.vs_trl": 4.0, "train": 1e5})
    for fast, told in ((300.0, True), (120.0, False)):
        assert ("as fast in bfloat16" in bench.page({"gemm": 100.0, "gemm.bfloat16": fast})) == told


def test_bench_rates_by_hand(monkeypatch):
    """By a clock made by hand: what each rate divides by its own time, and the reference's part,
    round by round."""
    by_hand = {"gemm": [2, 2], "bfloat16": [0.5, 0.5], "train": [4, 4], "prefill": [8, 8],
               "learn": [5, 9], "documents": [1, 2]}
    monkeypatch.setattr(bench, "by_round", lambda works, device: {
        name: by_hand.get(name, [1, 1]) for name in works})
    monkeypatch.setattr(bench, "document_step", lambda *_: (None, [100, 10, 30]))  # 100: warm-up
    found = bench.ours(cli.resolve("micro", []), torch.device("cpu"), torch.float32)
    assert found["gemm"] == pytest.approx(2048 ** 3 / 1e9)
    assert found["gemm.bfloat16"] == 4 * found["gemm"]
    assert (found["train"], found["prefill"], found["decode"]) == (
        200 * 36 / 4, 64 * 128 / 8, 512 * 64)
    assert (found["step.learn"], found["step.reference"]) == (7, 3)
    assert found["documents"] == 12.5


def test_bench_times_a_whole_step(monkeypatch):
    """The whole is sampling, rewards and learning, once each and in this order; rewards are those
    of every process, whatever random numbers it has drawn before."""
    done, rewards = [], []
    monkeypatch.setattr(bench.grpo, "generate", lambda *_, seed: done.append(
        "sample") or SimpleNamespace(answers=lambda: []))
    monkeypatch.setattr(bench, "Rollout", lambda *parts: done.append("reward") or rewards.append(
        parts[4]))
    monkeypatch.setattr(bench, "improve", lambda model, reference, optimizers, rollout, s, *_: (
        done.append(("learn", s.beta))))
    run = cli.resolve("micro", [])
    model = bench.make(run.model, torch.device("cpu"), torch.float32)
    step = bench.grpo_step(model, run, bench.even_works(run.model)[1])
    for seed in (1, 2):
        torch.manual_seed(seed)
        step["whole"]()
    assert done == ["sample", "reward", ("learn", run.zero.beta)] * 2
    assert torch.equal(*rewards) and rewards[0].unique().numel() > 1


def test_bench_runs_in_turn(monkeypatch):
    """A B A B; the first round is thrown away, of the others the median counts."""
    order, clock = [], iter([9, 9, 1, 10, 5, 20, 2, 30])
    monkeypatch.setattr(bench, "seconds", lambda work, device: work() or next(clock))
    works = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert bench.in_turn(works, None, 3) == {"a": 2, "b": 20}
    assert order == ["a", "b"] * 4


def test_what_takes_two_stages_by_hand():
    """How far R1 is behind Zero, how much more mixes without a reward, what RL costs beside."""
    a = report.Account("", "", "0", {}, {"zero.pass@1": 0.9, "r1.pass@1": 0.88, "dev2.mixing": 0.1,
                       "no_language_reward.mixing": 0.4, "flops.student_rl": 3.0,
                       "flops.distill": 2.0, "flops.distill_logits": 4.0}, [], {}, {}, None, 1.0)
    out = report.of_seed([a], set())
    assert {key: out[key] for key in ("r1.behind_zero", "no_language_reward.ratio",
                                      "flops.rl_to_distill", "flops.rl_to_logits")} == {
        "r1.behind_zero": pytest.approx(0.02), "no_language_reward.ratio": pytest.approx(4.0),
        "flops.rl_to_distill": 1.5, "flops.rl_to_logits": 0.75}


@pytest.mark.parametrize("own, neutral, said", [
    (-0.2, -0.01, "does work: 19.0 points"), (-0.1, -0.3, "costs 20.0 points more"),
    (0.1, 0.0, "does harm: 10.0 points"), (-0.02, -0.015, "no effect of the word can be told")])
def test_a_verdict_on_a_ban(own, neutral, said):
    """By the difference from the neutral ban, beside twice its standard error (here one point)."""
    figures = {"check": own, "check's neutral": neutral}
    rows = {f"r1.ban.{plan}.{part}": {"mean": x, "per_seed": {"0": x}} for plan, effect in
            figures.items() for part, x in (("effect", effect), ("error", 0.01), ("frequency", 2))}
    rows["r1.ban.check.gap"] = {"mean": own - neutral}
    rows["r1.ban.check.gap.error"] = {"per_seed": {"0": 0.005}}
    notes = {"r1.ban.check's neutral.word": {"0": " ok "}}
    line = compute.verdict(rows, notes, "r1", "check")
    assert said in line and f"{100 * own:+.1f} ± 1.0 points" in line and "'ok'" in line


@pytest.mark.parametrize("words_of, said", [
    ("--preset nano", "its preset is micro, here nano"), ("--seed 1", "(seed)"),
    ("--set zero.lr=1 base.lr=1 dev1.lr=1 eval.top_p=1", "and 1 more")])
def test_other_settings_are_named_in_few_words(micro, words_of, said, capsys):
    """The preset alone where it differs; else three settings at most, and how many more."""
    preset = [] if "preset" in words_of else ["--preset", "micro"]
    assert cli.main(["zero", *preset, *words_of.split(), "--out", str(micro)]) == 2
    assert said in capsys.readouterr().err
