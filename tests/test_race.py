"""Tests of studies/race.py: the stop rule, and that both sides of the race get the same work."""
import dataclasses
import math
import random
from types import SimpleNamespace

import pytest
import torch

import moe
import r1mini
import tasks
from engine import optim
from engine.errors import UserError
from studies import race
from tests.helpers import MICRO, equal_states
from tools import bench
from tools.settings import resolve_settings

CPU = torch.device("cpu")
SMALL = ["zero.problems=2", "zero.group_size=2", "zero.minibatches=2", "zero.steps=3",
         "zero.max_new_tokens=12", "eval.dev_problems=4", "eval.samples=2"]


def training_of(scores, limit, seconds_of_rollout, steps):
    """A TimedTraining by a clock made by hand, after all its rollouts. A test takes 1,000
    seconds."""
    now, scores = [5.0], iter(scores)

    def test():
        now[0] += 1000
        return next(scores)

    training = race.TimedTraining(test, limit, clock=lambda: now[0])
    training.start()
    for step in range(steps):
        now[0] += seconds_of_rollout
        if training.after_rollout(is_last=step + 1 == steps):
            return training
    raise AssertionError("a training ends at its last rollout")


def test_race_stops_at_85_percent():
    """By hand: tests come after every second rollout, and their time does not count. The first
    score of 85% ends the training."""
    training = training_of([0.3, 0.84, 0.85], limit=600, seconds_of_rollout=10, steps=24)
    assert training.reached and (training.seconds, training.rollouts) == (60, 6)
    assert training.result() == "85% reached after 60 seconds and 6 rollouts (85% then)"


def test_race_stops_when_the_time_is_over():
    """By hand: the rollout in which the time ends is the last, and it is tested."""
    training = training_of([0.3, 0.6], limit=600, seconds_of_rollout=201, steps=24)
    assert not training.reached and (training.seconds, training.rollouts) == (603, 3)
    assert training.result() == "not reached within ten minutes (60% then)"
    training = training_of([0.86], limit=2, seconds_of_rollout=3, steps=24)
    assert training.reached and training.rollouts == 1


def test_race_stops_after_the_last_rollout():
    """By hand: an odd last rollout is tested too."""
    training = training_of([0.3, 0.5], limit=600, seconds_of_rollout=10, steps=3)
    assert not training.reached and training.rollouts == 3
    assert training.result() == "not reached in all 3 rollouts, 30 seconds (50% then)"


def test_race_ratio_needs_both_times(monkeypatch):
    """By hand: a ratio where both reach 85%. Where ours alone does, a lower bound. Otherwise
    neither."""
    run = resolve_settings("micro", [])

    def found(ours, theirs):
        """The numbers of two (seconds, score)."""
        trainings = [race.TimedTraining(None, 600.0, seconds=seconds, rollouts=4, score=score)
                     for seconds, score in (ours, theirs)]
        monkeypatch.setattr(race, "_train_ours", lambda *_: trainings[0])
        monkeypatch.setattr(race, "_train_theirs", lambda *_: (trainings[1], 2))
        return race.rl_to_85(None, run, CPU)

    numbers = found((40.0, 0.9), (200.0, 0.86))
    assert numbers["rl_to_85.vs_trl"] == 5 and numbers["rl_to_85.trl"] == 200
    assert numbers["rl_to_85.trl.setting"] == "float32, processes x threads 1 x 2"
    numbers = found((40.0, 0.9), (610.0, 0.6))
    assert numbers["rl_to_85.vs_trl.at_least"] == 15.25 and numbers["rl_to_85.trl.dev"] == 0.6
    assert "rl_to_85.vs_trl" not in numbers and "rl_to_85.trl" not in numbers
    numbers = found((600.0, 0.8), (200.0, 0.86))
    assert not any("vs_trl" in key for key in numbers) and "rl_to_85.ours" not in numbers
    assert numbers["rl_to_85.ours.result"] == "not reached within ten minutes (80% then)"


def test_race_of_a_tiny_model_ends_in_time():
    """Two seconds of training on both sides, by TRL's GRPOTrainer itself: a random model reaches
    nothing, and every number is there."""
    for name in ("transformers", "trl", "datasets"):
        pytest.importorskip(name)
    run = resolve_settings("micro", SMALL)
    torch.manual_seed(0)
    base = moe.Transformer(MICRO)
    before = {name: x.clone() for name, x in base.state_dict().items()}
    numbers = race.rl_to_85(base, run, CPU, limit=2.0, thread_choices=[1])
    assert equal_states(before, base.state_dict())
    for side in ("ours", "trl"):
        assert 1 <= numbers[f"rl_to_85.{side}.rollouts"] <= 3
        assert numbers[f"rl_to_85.{side}.dev"] == 0
        assert numbers[f"rl_to_85.{side}.result"].startswith("not reached")
        assert f"rl_to_85.{side}" not in numbers


def test_race_trl_learns_by_our_schedule_from_our_questions(monkeypatch):
    """TRL asks the questions of train_rl, each group_size times, pays our rewards, updates with our
    learning rates, and copies the policy into the reference as often. Its weights are tested as
    they are after a rollout."""
    for name in ("transformers", "trl", "datasets"):
        pytest.importorskip(name)
    import trl
    run = resolve_settings("micro", [*SMALL, "zero.reference_every=2", "zero.format_weight=0.5"])
    s, asked, rates, rollouts, paid = run.zero, [], [], [], []
    trainers = []
    original = trl.GRPOTrainer.__init__

    def init(self, *words, **named):
        original(self, *words, **named)
        trainers.append(self)
    monkeypatch.setattr(trl.GRPOTrainer, "__init__", init)
    score = trl.GRPOTrainer._calculate_rewards

    def scored(self, inputs, prompts, completions, ids):
        asked.extend(row["number"] for row in inputs)
        paid.append((score(self, inputs, prompts, completions, ids), inputs, ids))
        return paid[-1][0]
    monkeypatch.setattr(trl.GRPOTrainer, "_calculate_rewards", scored)
    step = torch.optim.AdamW.step

    def counted(self, *words, **named):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *words, **named)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)

    ours = bench.bench_model(dataclasses.replace(MICRO, n_mtp_layers=0), CPU, torch.float32)
    theirs = race.their_model(ours.config, CPU)
    tested = moe.Transformer(ours.config)

    def after_rollout(model, is_last):
        rollouts.append(is_last)
        race._copy_weights(model, tested)
        with torch.no_grad():
            tokens = torch.arange(20).unsqueeze(0)
            torch.testing.assert_close(tested.eval()(tokens).logits, model(tokens).logits,
                                       atol=1e-4, rtol=1e-4)
        return False

    race._train_with_trl(theirs, run, CPU, lambda: None, after_rollout)
    assert rollouts == [False, False, True]
    updates = s.steps * s.minibatches
    expected = [s.lr * optim.learning_rate_at(i, updates, s.warmup, s.decay)
                for i in range(updates)]
    assert rates == pytest.approx(expected)

    task = r1mini.make_task(run, run.zero, r1mini.rule_rewards(run.zero))
    problems = []
    for i in range(s.steps):  # as train_rl draws them
        problems += task.draw(random.Random(f"{run.seed}/rl/{i}"), s.problems, i)
    assert problems == race._questions_of_rollouts(run)
    assert asked == [i for i in range(len(problems)) for _ in range(s.group_size)]
    for values, inputs, ids in paid:
        texts = [tasks.decode(x) for x in ids]
        for column, rule in enumerate((tasks.accuracy, tasks.format_reward)):
            by_hand = [float(rule(text, problems[row["number"]]))
                       for text, row in zip(texts, inputs)]
            assert values[:, column].tolist() == by_hand
    trainer = trainers[0]
    assert trainer.reward_weights.tolist() == [1.0, 0.5] and trainer.beta == s.beta
    assert (trainer.args.ref_model_sync_steps, trainer.args.ref_model_mixup_alpha) == (4, 1.0)
    group = trainer.optimizer.param_groups[0]
    assert tuple(group["betas"]) == (0.9, 0.95) and group["weight_decay"] == 0


def test_race_rewards_are_ours():
    """A reward that TRL calls with token ids and numbers of problems is our rule on their texts."""
    rng = random.Random(0)
    problems = [tasks.make_problem(rng, 3) for _ in range(2)]
    run = resolve_settings("micro", [])
    rewards = race._their_rewards(problems, race.rule_rewards(run.zero))
    text = tasks.response("", problems[1].answer)
    ids = tasks.encode_response(text)
    assert [r.__name__ for r in rewards] == ["accuracy", "format"]
    assert rewards[0](completion_ids=[ids, ids], number=[0, 1], prompts=[]) == [
        float(problems[0].answer == problems[1].answer), 1.0]
    assert rewards[1](completion_ids=[ids[:-3]], number=[0]) == [
        tasks.format_reward(tasks.decode(ids[:-3]), problems[0])]


def test_race_takes_the_faster_number_of_threads(monkeypatch):
    """By a clock made by hand: the time from the end of the first rollout to the end of the
    second. With one choice there is no trial."""
    now, tried = [0.0], []

    def train(model, run, device, at_start, after_rollout):
        threads = torch.get_num_threads()
        tried.append(threads)
        now[0] += 100
        for _ in range(2):
            now[0] += {1: 5, 2: 3}[threads]
            if after_rollout(None, False):
                return
        raise AssertionError("the trial ends after two rollouts")
    monkeypatch.setattr(race, "_train_with_trl", train)
    monkeypatch.setattr(race, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    before = torch.get_num_threads()
    assert race._faster_threads(lambda: None, None, CPU, [1, 2]) == 2 and tried == [1, 2]
    assert race._faster_threads(lambda: None, None, CPU, [7]) == 7 and tried == [1, 2]
    assert torch.get_num_threads() == before


def test_race_refuses_what_trl_cannot_do():
    """TRL wants minibatches of equal size. Only GRPO has the same loss on both sides here."""
    for setting, words in (("zero.minibatches=3", "must divide"),
                           ("zero.objective=gspo", "must be grpo"),
                           ("zero.oversample=2", "without zero.oversample")):
        with pytest.raises(UserError, match=words):
            race.check_race(resolve_settings("micro", [*SMALL, setting]))
    race.check_race(resolve_settings("nano", []))


def test_race_page_says_what_came_of_each_side():
    """The page has each side's result as a sentence, and a row for every number."""
    rows = {"rl_to_85.ours": {"mean": 41.0}}
    notes = {"rl_to_85.trl.result": {"0": "not reached within ten minutes (60% then)"}}
    lines = race.page(rows, notes)
    assert lines[0] == "- rl_to_85.trl.result: not reached within ten minutes (60% then)."
    assert lines[-1] == "| rl_to_85.ours | 41 |"
    untrained = race.TimedTraining(None, 1.0)
    assert math.isnan(untrained.score) and not untrained.reached
