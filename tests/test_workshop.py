"""Tests of workshop/: the shipped base, its experiments, its pages' numbers and its exercises."""
import ast
import json
import math
import random
import re

import pytest
import torch

import moe
import tasks
from engine import checkpoint, evaluate
from engine.errors import UserError
from tests.helpers import MICRO, ROOT
from tools import cli
from workshop import check, experiments, measure, own, shrink

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
    run, stages = cli.plan_run(cli.parse(measure.command(experiment)))
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
    assert "| after step | 1 | 2 |" in out and "| loss, yours | 6.2" in out
    edit = "r1mini.py", '"""r1mini: DeepSeek', 'raise SystemExit(3)\n"""r1mini: DeepSeek'
    with pytest.raises(UserError, match="odd: the run failed"):
        measure.run("odd", experiments.Experiment("base", edits=(edit,)))


@pytest.mark.parametrize("given", [["try"], ["try", "sideways"], ["nonsense"]])
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
    """fill_page() writes what an experiment changes, by hand: the edit, the
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


@pytest.mark.parametrize("name", check.EXERCISES)
def test_workshop_check_names_every_known_mistake(name):
    """The checker names every known mistake by its own sentence, and accepts r1mini's function, so
    no two of them agree on all cases."""
    exercise = check.EXERCISES[name]
    assert check.judge(exercise, exercise.right) == ""
    for sentence, mistaken in exercise.mistakes.items():
        assert check.judge(exercise, mistaken) == sentence


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
    ("advantage", by_hand_advantages), ("kl", by_hand_kl), ("router", check.route),
    ("absorbed", by_hand_attend), ("reward", by_hand_reward)])
def test_workshop_check_accepts_other_right_solutions(name, function):
    """The checker accepts right solutions that are written in another way than r1mini's."""
    assert check.judge(check.EXERCISES[name], function) == ""


@pytest.mark.parametrize("name, function, sentence", [
    ("absorbed", check.attend, "it makes the keys of every token"),
    ("advantage", lambda r: r.mean(1), r"returns the shape \(2,\)\. It should be \(2, 4\)"),
    ("advantage", lambda r: r.nothing, "raises AttributeError in line"),
    ("advantage", lambda r: None, "returns NoneType. It should return numbers"),
    ("kl", lambda a, b: a * b, "none of the usual mistakes"),
    ("reward", lambda text, answer: float(answer in text), "pays for a wrong number"),
    ("reward", lambda text, answer: float(text[0] == answer),
     "raises IndexError in .*, for the text ''")])
def test_workshop_check_describes_other_faults(name, function, sentence):
    """A fault beyond the known mistakes is described: a wrong shape, an error and its line, a wrong
    type, a wrong payment."""
    assert re.search(sentence, check.judge(check.EXERCISES[name], function))


def test_workshop_check_reads_the_students_files(tmp_path, capsys):
    """As shipped, no exercise is written yet. Right, broken, incomplete and missing files get a
    line each."""
    assert check.main([]) == 1
    assert capsys.readouterr().out.count("your function is not written yet") == len(check.EXERCISES)
    (tmp_path / "kl.py").write_text("def kl_k3(new, reference):\n"
                                    "    x = (reference - new).exp()\n"
                                    "    return x - x.log() - 1\n")
    (tmp_path / "advantage.py").write_text("def advantages(rewards)\n    return rewards\n")
    (tmp_path / "reward.py").write_text("import no_such_module\n")
    (tmp_path / "router.py").write_text("")
    assert check.main(["kl"], tmp_path) == 0
    for name, sentence in (("advantage", "line 1: Python cannot read this line: expected"),
                           ("reward", "ModuleNotFoundError"),
                           ("router", "no function route"), ("absorbed", "No such file")):
        assert check.main([name], tmp_path) == 1
        assert re.search(sentence, line := capsys.readouterr().out), line
    assert check.main(["nonsense"]) == 2


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


def test_workshop_own_task_is_what_its_page_says():
    """own.py asks to sort digits (the oracle is a count of each digit), a quarter to 45% of its
    documents are right, and it has fewer than 45 lines."""
    rng = random.Random(0)
    for problem in own.question(rng, 50):
        digits = problem.question.removeprefix("sort ")
        assert problem.answer == "".join(d * digits.count(d) for d in "0123456789")
        assert own.right([problem.answer, digits[::-1] + "0"], [problem] * 2) == [1.0, 0.0]
    texts = [tasks.decode(own.document(rng).tokens) for _ in range(400)]
    pairs = [re.fullmatch(r"<\|user\|>sort (\d+)<\|assistant\|>(\d+)", text) for text in texts]
    share = sum("".join(sorted(m[1])) == m[2] for m in pairs) / len(pairs)
    assert 0.25 < share < 0.45
    lines = [line for line in (WORKSHOP / "own.py").read_text("utf-8").splitlines() if line.strip()]
    assert len(lines) < 45


def test_workshop_own_task_trains(capsys):
    """own.py runs one step of pretraining and one of RL."""
    assert len(own.main(base_steps=1, rl_steps=1)) == 1
    assert "rollout   1: right 0.00" in capsys.readouterr().out


@pytest.mark.slow
def test_workshop_own_task_training_improves():
    """own.py as shipped rises from under 50% to over 85% right answers."""
    found = own.main()
    assert found[0] < 0.5 < 0.85 < found[-1]
