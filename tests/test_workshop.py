"""The tests of the workshop: what is shipped, every command, the pages' figures, the advice."""
import ast
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

import moe
import r1mini
import tasks
from engine import checkpoint, evaluate
from engine.errors import UserError
from tools import cli
from workshop import check, experiments, measure, own, shrink

HERE = Path(__file__).resolve().parent
EXPERIMENTS = experiments.EXPERIMENTS
NOTEBOOK = json.loads((HERE / "r1mini.ipynb").read_text("utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_shipped_base_is_small_and_can_be_amplified():
    """Under 2.5 MB of bfloat16, of nano's sizes, float32 once loaded, and right now and then."""
    path = HERE / "base.pt"
    kept = torch.load(path, weights_only=True)["model"].values()
    assert path.stat().st_size < 2.5e6 and {x.dtype for x in kept} == {torch.bfloat16}
    model, record = checkpoint.load(path)
    assert {x.dtype for x in model.state_dict().values()} == {torch.float32}
    assert model.config == cli.resolve(record["preset"], []).model
    problems = tasks.make_problems("dev", 32, (3, 4, 5, 6))
    found, _ = evaluate.evaluate(model, problems, 8, 1.0, 1.0, 200)
    assert 0.1 < found["pass@1"] < 0.3 and found["cut_off"] < 0.05


def test_shrinking_rounds_every_weight_to_bfloat16(tmp_path, capsys):
    """Against torch's own rounding; a missing word is one line and exit code 2."""
    torch.manual_seed(0)
    model = moe.Transformer(r1mini.PRESETS["micro"])
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
def test_each_experiments_words_and_edits_make_sense(name, monkeypatch):
    """The settings are known, the shipped base is of the right sizes, the edited code is Python."""
    monkeypatch.chdir(HERE.parent)
    experiment = EXPERIMENTS[name]
    run, stages = cli.plan(cli.parse(measure.command(experiment)))
    assert stages == [experiment.start]
    with measure.edited(experiment.edits) as code:
        assert (code == measure.ROOT) == (not experiment.edits)
        for file, before, after in experiment.edits:
            text = (code / file).read_text("utf-8")
            ast.parse(text)
            assert text.replace(after, before) == (measure.ROOT / file).read_text("utf-8")


def test_an_edit_that_no_longer_fits_is_told():
    """Not run on unchanged code as if it were edited."""
    with pytest.raises(UserError, match="moe.py has changed"):
        with measure.edited([("moe.py", "no such line", "")]):
            pass


def test_a_try_is_run_and_shown_beside_the_plain_run(tmp_path, monkeypatch, capfd):
    """Through the real command, on micro: edited code, its settings, and the table at the end."""
    monkeypatch.setattr(measure, "RUNS", str(tmp_path))
    monkeypatch.setattr(measure, "SHORT", {"base": "base.steps=2 base.dev_every=1"})
    monkeypatch.setitem(measure.STARTS, "base", "base --preset micro")
    assert measure.main(["try", "base", "eval.samples=2"]) == 0
    out = capfd.readouterr().out
    assert "--set base.steps=2 base.dev_every=1 eval.samples=2 --out" in out
    assert "| after step | 1 | 2 |" in out and "| loss, yours | 6.2" in out
    edit = "r1mini.py", '"""r1mini: DeepSeek', 'raise SystemExit(3)\n"""r1mini: DeepSeek'
    with pytest.raises(UserError, match="odd: the run failed"):
        measure.run("odd", experiments.Experiment("base", edits=(edit,)))


@pytest.mark.parametrize("given", [["try"], ["try", "sideways"], ["nonsense"]])
def test_a_wrong_word_is_told_in_a_line(given, capsys):
    """Exit code 2, before anything runs."""
    assert measure.main(given) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_table_has_the_steps_of_dev():
    """By hand: curves on dev, those of every step, and a plain run without one of them."""
    mine = {"dev": {"pass@1": [[0, 0.1], [2, 0.5]]}, "steps": {"kl": [0.01, 20.0]}}
    plain = {"dev": {"pass@1": [[0, 0.1], [2, 0.25]]}, "steps": {}}
    assert measure.compare("x", mine, plain, ("pass@1", "kl")) == [
        "| after step | 0 | 2 |", "|---|---|---|", "| pass@1, plain | 0.100 | 0.250 |",
        "| pass@1, x | 0.100 | 0.500 |", "| kl, plain |  |  |", "| kl, x |  | 20.0 |"]


def test_figures_and_tables_of_a_page_are_filled_in_again():
    """Whatever stands there; what is not known is a question mark; twice is as once."""
    source = "results/baseline/summary.json"
    rows = json.loads((HERE.parent / source).read_text("utf-8"))["metrics"]
    text = ("from 9.9<!--baseline:base.pass@1--> to <!--baseline:sft.pass@1%-->\n"
            "<!-- study nothing -->\nold\n<!-- end -->\n")
    wanted = (f"from {rows['base.pass@1']['mean']:.3f}<!--baseline:base.pass@1--> to "
              f"{100 * rows['sft.pass@1']['mean']:.0f}%<!--baseline:sft.pass@1%-->\n"
              "<!-- study nothing -->\n\nNot measured yet: `python r1mini.py study nothing` does "
              "it.\n\n<!-- end -->\n")
    assert measure.fill(text) == wanted == measure.fill(wanted)


@pytest.mark.parametrize("page", measure.PAGES)
def test_the_pages_figures_are_those_measured(page):
    """If not: python workshop/measure.py pages."""
    text = (HERE / page).read_text("utf-8")
    assert measure.fill(text) == text
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (HERE / link).exists(), link


def test_each_experiment_is_asked_and_answered():
    """By name: its change among the questions, its curve among the answers."""
    asked, answered = ((HERE / f"{page}.md").read_text("utf-8")
                       for page in ("experiments", "answers"))
    for name in EXPERIMENTS:
        assert f"<!-- curve {name} -->" in answered, name
        assert name in measure.PLAIN.values() or f"<!-- change {name} -->" in asked, name


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_experiment_runs(name, tmp_path, monkeypatch):
    """As a class runs it; and what its answer says most loudly."""
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


@pytest.mark.parametrize("name", check.EXERCISES)
def test_each_mistake_is_called_by_its_name(name):
    """And r1mini's own function by none: no two of these agree on all cases."""
    exercise = check.EXERCISES[name]
    assert check.judge(exercise, exercise.right) == ""
    for sentence, mistaken in exercise.mistakes.items():
        assert check.judge(exercise, mistaken) == sentence


def by_hand_advantages(rewards):
    """With a small number in the denominator, as many write it."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-6)


def by_hand_kl(new, reference):
    """A loop over tokens."""
    pairs = zip(new.flatten().tolist(), reference.flatten().tolist())
    x = [math.exp(b) / math.exp(a) for a, b in pairs]
    return torch.tensor([v - math.log(v) - 1 for v in x]).view(new.shape)


def by_hand_attend(q, q_rope, latent, k_rope, w_uk, w_uv, scale):
    """Head by head."""
    out = []
    for h in range(len(q)):
        score = (latent @ (w_uk[h].T @ q[h]) + k_rope @ q_rope[h]) * scale
        out.append(w_uv[h] @ (score.softmax(0) @ latent))
    return torch.stack(out)


def by_hand_reward(text, answer):
    """By cutting the text, not by one expression."""
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
    ("advantage", by_hand_advantages), ("kl", by_hand_kl), ("router", check.route),
    ("absorbed", by_hand_attend), ("reward", by_hand_reward)])
def test_another_right_way_is_right(name, function):
    """Solutions that a student may hand in, none of them r1mini's."""
    assert check.judge(check.EXERCISES[name], function) == ""


@pytest.mark.parametrize("name, function, said", [
    ("absorbed", check.attend, "makes the keys of every token"),
    ("advantage", lambda r: r.mean(1), r"has the shape \(2,\), wanted \(2, 4\)"),
    ("advantage", lambda r: r.nothing, "raises AttributeError in line"),
    ("advantage", lambda r: None, "returns NoneType, wanted numbers"),
    ("kl", lambda a, b: a * b, "by no usual mistake"),
    ("reward", lambda text, answer: float(answer in text), "pays for a wrong number"),
    ("reward", lambda text, answer: float(text[0] == answer), "raises IndexError in .*, of ''")])
def test_what_is_wrong_is_said(name, function, said):
    """Other troubles than the listed mistakes."""
    assert re.search(said, check.judge(check.EXERCISES[name], function))


def test_check_reads_the_students_files(tmp_path, capsys):
    """As shipped nothing is written; right, broken and missing ones each have a line."""
    assert check.main([]) == 1
    assert capsys.readouterr().out.count("yours is not written yet") == len(check.EXERCISES)
    (tmp_path / "kl.py").write_text("def kl_k3(new, reference):\n"
                                    "    x = (reference - new).exp()\n"
                                    "    return x - x.log() - 1\n")
    (tmp_path / "advantage.py").write_text("def advantages(rewards)\n    return rewards\n")
    (tmp_path / "reward.py").write_text("import no_such_module\n")
    (tmp_path / "router.py").write_text("")
    assert check.main(["kl"], tmp_path) == 0
    for name, said in (("advantage", "line 1: expected"), ("reward", "ModuleNotFoundError"),
                       ("router", "no function route"), ("absorbed", "No such file")):
        assert check.main([name], tmp_path) == 1
        assert re.search(said, line := capsys.readouterr().out), line
    assert check.main(["nonsense"]) == 2


# --------------------------------------------------------------------------------------------------
# The notebook, and a task of one's own


def run_notebook(*changes):
    """Runs the notebook's code cells in order, some texts (before, after) in them changed."""
    names = {}
    for cell in CODE:
        for before, after in changes:
            cell = cell.replace(before, after)
        exec(compile(cell, "r1mini.ipynb", "exec"), names)
    return names


def test_the_notebook_runs(monkeypatch, capsys):
    """All cells, one rollout of each training; no function of its own, no output kept."""
    monkeypatch.chdir(HERE)
    assert CODE[0].count("STEPS = 12") == 1 and not any("def " in cell for cell in CODE)
    assert not any(cell.get("outputs") for cell in NOTEBOOK["cells"])
    names = run_notebook(("STEPS = 12", "STEPS = 1"), ("problems=16", "problems=2"))
    assert abs(float(names["loss"].detach())) < 1e-4 < float(names["norm"])
    assert len(names["records"]) == 1 and "rollout  1: right" in capsys.readouterr().out


@pytest.mark.slow
def test_the_notebook_climbs():
    """As it is shipped."""
    records = run_notebook()["records"]
    assert records[-1]["accuracy"] > 2 * records[0]["accuracy"]


def test_own_is_what_own_md_says():
    """Digits in order, against a count of each; a tenth of the documents or more is right."""
    rng = random.Random(0)
    for problem in own.question(rng, 50):
        asked = problem.question.removeprefix("sort ")
        assert problem.answer == "".join(d * asked.count(d) for d in "0123456789")
        assert own.right([problem.answer, asked[::-1] + "0"], [problem] * 2) == [1.0, 0.0]
    texts = [tasks.decode(own.document(rng).tokens) for _ in range(400)]
    pairs = [re.fullmatch(r"<\|user\|>sort (\d+)<\|assistant\|>(\d+)", text) for text in texts]
    share = sum("".join(sorted(m[1])) == m[2] for m in pairs) / len(pairs)
    assert 0.25 < share < 0.45
    lines = [line for line in (HERE / "own.py").read_text("utf-8").splitlines() if line.strip()]
    assert len(lines) < 45


def test_own_trains(capsys):
    """A step of each kind."""
    assert len(own.main(base_steps=1, rl_steps=1)) == 1
    assert "rollout   1: right 0.00" in capsys.readouterr().out


@pytest.mark.slow
def test_own_climbs():
    """From a quarter right to nearly all."""
    found = own.main()
    assert found[0] < 0.5 < 0.85 < found[-1]
