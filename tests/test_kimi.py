"""Tests of the studies of Kimi k1.5's recipe: kimi, length, sampling, long2short, judges."""
import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

import grpo
import moe
import r1mini
import tasks
from studies import judges, kimi, length, long2short, sampling
from tests.helpers import MICRO, equal_states, make_judge
from tools import study
from tools.settings import resolve_settings
from tools.study import test_numbers as numbers_of
from tools.study import train_in_memory

RUN = resolve_settings("micro", ["zero.problems=2", "zero.group_size=3", "zero.steps=2",
                                 "zero.minibatches=2", "zero.max_new_tokens=9",
                                 "zero.dev_every=1", "eval.problems=8", "eval.dev_problems=4",
                                 "eval.samples=2"])


@pytest.fixture
def model():
    """A random model of the micro preset."""
    torch.manual_seed(0)
    return moe.Transformer(MICRO).eval()


# -------------------------------------------------------------------------------------------------
# kimi


def test_kimi_rest_imitates_the_better_answers_only():
    """By hand: the gradient of ReST is 1 / answers at each token of an answer that is better than
    its group, and 0 elsewhere."""
    new = torch.randn(4, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).float()
    advantage = torch.tensor([0.5, -0.5, 0.0, 2.0])
    J, _ = kimi.rest(new, new.detach(), new.detach(), advantage, mask, grpo.Batch(4, 8), RUN.zero)
    J.backward()
    expected = torch.tensor([[0.25, 0.25, 0], [0, 0, 0], [0, 0, 0], [0.25, 0.25, 0]])
    assert torch.equal(new.grad, expected)


FEW = ["zero.problems=2", "zero.group_size=2", "zero.steps=3", "zero.minibatches=1",
       "zero.max_new_tokens=9", "zero.dev_every=1", "eval.problems=4", "eval.dev_problems=4",
       "eval.samples=2", "eval.fewer_samples=1", "eval.longer=1", "data.prompts=1",
       "dev1.steps=2", "dev1.documents=4"]


def make_folder(path, module, arm):
    """The folder of a tiny run of an arm of a study."""
    settings = [*module.SETTINGS, *module.ARMS[arm].split(), *FEW]
    run, options = study._resolve_run("micro", settings, 0, "", str(path), [])
    return study.Folder(str(path), run, options, module.STAGES)


def test_kimi_arms_change_what_they_say():
    """Against its control, an arm changes the objective and what comes with it, or the optimizer,
    or the start. All else is equal."""
    zero = {arm: dataclasses.asdict(resolve_settings("nano", settings.split()).zero)
            for arm, settings in kimi.ARMS.items()}
    changed = {}
    for arm, control in kimi.CONTROL.items():
        changed[arm] = {key for key in zero[arm] if zero[arm][key] != zero[control][key]}
    assert changed == {"kimi": {"objective", "normalize_std", "beta"}, "rest": {"objective"},
                       "kimi_reset": {"reset_optimizers"}, "warm_grpo": set(),
                       "warm_kimi": {"objective", "normalize_std", "beta"}}


@pytest.mark.parametrize("arm", ["kimi_reset", "warm_kimi"])
def test_kimi_counts_all_rollouts_if_the_goal_is_never_reached(tmp_path, monkeypatch, model, arm):
    """A tiny run of all parts. A random model never reaches the goal, so it counts with all its
    rollouts. The base is tested before the first rollout, so it reaches a goal of 0 at once."""
    monkeypatch.setattr(kimi, "load_kept", lambda *_: model)
    numbers = kimi.measure_arm(arm, make_folder(tmp_path / "never", kimi, arm))
    assert numbers["rollouts_to_85"] == 3 and 0 <= numbers["clipped"] <= 1
    assert {"pass@1", "length", "dev1"} <= set(numbers)
    assert (tmp_path / "never" / "warm.pt").exists() == (arm == "warm_kimi")
    monkeypatch.setattr(kimi, "GOAL", 0.0)
    again = kimi.measure_arm(arm, make_folder(tmp_path / "never", kimi, arm))
    assert again["rollouts_to_85"] == 0


# -------------------------------------------------------------------------------------------------
# length


def test_length_arms_act_when_they_say(tmp_path, monkeypatch, model):
    """By the settings: the reward acts from the first rollout, from halfway, or never; the control
    answers twice as many problems, without it. A tiny run has numbers of every kind."""
    settings = {arm: resolve_settings("nano", [*length.SETTINGS, *words.split()]).zero
                for arm, words in length.ARMS.items()}
    assert {(arm, s.length_weight, s.length_from, s.oversample) for arm, s in settings.items()} == {
        ("none", 0.0, 0.0, 1), ("start", 0.3, 0.0, 1), ("half", 0.3, 0.5, 1),
        ("live", 0.0, 0.0, 2)}
    monkeypatch.setattr(length, "load_kept", lambda *_: model)
    numbers = length.measure_arm("live", make_folder(tmp_path / "live", length, "live"))
    assert {"pass@1", "length@3", "dev3", "equal_groups", "equal_groups_late"} <= set(numbers)
    assert numbers["generated"] <= 3 * 2 * 2 * 2 * 9


def test_length_ratio_and_numbers(model):
    """combine() is a ratio of lengths. The numbers of a test have the length of each level, and
    their mean is the length of all, since the levels have as many problems."""
    assert length.combine({"half.length": 30.0, "none.length": 60.0}) == {
        "length.tokens_ratio": 0.5}
    numbers = numbers_of(model, RUN)
    of_levels = [numbers[f"length@{level}"] for level in RUN.zero.levels]
    assert sum(of_levels) / len(of_levels) == pytest.approx(numbers["length"])


def test_studies_train_a_copy(model):
    """RL in memory leaves the kept model as it is, and gives dev scores at the rollouts asked for.
    Its rollouts are those of a run with these settings."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    s = RUN.zero
    rewards = {"length": (1.0, lambda texts, problems: [len(text) % 3 / 2 for text in texts])}
    task = r1mini.make_task(RUN, s, rewards)
    trained, records, on_dev = train_in_memory(model, task, s, RUN)
    assert equal_states(model.state_dict(), before)
    assert not equal_states(trained.state_dict(), before)
    assert list(on_dev) == ["dev1", "dev2"]
    again = [record for record, _ in grpo.train_rl(model, task, s, RUN.seed)]
    assert [r["reward"] for r in again] == [r["reward"] for r in records]


# -------------------------------------------------------------------------------------------------
# sampling


def make_pool(arm, model):
    """A small pool."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "POOL", 40)
        return sampling.Pool(arm, model, RUN)


def test_sampling_is_in_proportion_to_failure(model):
    """Of thousands of single draws, each problem gets its share of 1 - success rate, within four
    standard errors."""
    pool = make_pool("uniform", model)
    pool.arm, pool.problems = "prioritized", pool.problems[:4]
    weights = (0.2, 0.5, 1.0, sampling.FLOOR)
    pool.success = {p.question: 1 - w for p, w in zip(pool.problems, weights)}
    rng, n = random.Random(0), 4000
    drawn = [pool.draw(rng, 1, 0.0)[0] for _ in range(n)]
    for problem, weight in zip(pool.problems, weights):
        share = weight / sum(weights)
        error = (share * (1 - share) / n) ** 0.5
        assert abs(drawn.count(problem) / n - share) < 4 * error


def test_sampling_of_hard_problems_and_without_repetition(model):
    """The hard arm has all levels in the first half of its tokens and two afterwards. Nothing is
    drawn twice in a rollout."""
    pool, rng = make_pool("hard", model), random.Random(0)
    assert {p.level for p in pool.draw(rng, 40, 0.49)} == {3, 4, 5, 6}
    assert {p.level for p in pool.draw(rng, 10, 0.5)} == {5, 6}
    pool = make_pool("prioritized", model)
    assert set(pool.success.values()) <= {i / 8 for i in range(9)}
    assert 40 * 8 <= pool.tokens <= 40 * 8 * 9  # of a token at least and nine at most
    assert pool.draw(rng, 0, 0.0) == []
    assert len({id(problem) for problem in pool.draw(rng, 40, 0.0)}) == 40
    first, second = pool.problems[:2]
    pool.update([first, second], torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert (pool.success[first.question], pool.success[second.question]) == (0.5, 1.0)


def test_sampling_in_parts_keeps_each_tokens_probability(model):
    """An answer that is written in parts of 4 tokens has the log-probabilities that the trainer
    computes for the whole, and never more tokens than the limit."""
    s = dataclasses.replace(RUN.zero, max_new_tokens=10)
    problem = tasks.make_problems("train", 1, (3,))[0]
    answers = [sampling.Answer(tasks.encode_prompt(problem.question)) for _ in range(6)]
    written = []
    for seed in range(3):
        written.append(len(sampling._write_on(model, answers, 4, s, seed, seed + 5)))
    assert written[0] == 6 and all(answer.is_done(10) for answer in answers)
    assert {len(answer.ids) for answer in answers if not answer.finished} == {10}
    samples = sampling._as_samples(answers, only_last=False, device="cpu")
    new, _ = grpo.logprobs(model, samples.tokens, samples.answer)
    assert torch.allclose(new, samples.logprobs, atol=1e-4)
    assert samples.answers() == [answer.ids for answer in answers]
    last = sampling._as_samples(answers, only_last=True, device="cpu")
    assert torch.equal(last.tokens, samples.tokens)
    assert torch.equal(last.logprobs, samples.logprobs * last.answer)
    for i, answer in enumerate(answers):
        assert answer.drawn_in == [5 + t // 4 for t in range(len(answer.ids))]
        assert last.answers()[i] == answer.ids[-answer.last_part:]
        assert answer.last_part == (2 if len(answer.ids) > 8 else (len(answer.ids) - 1) % 4 + 1)


def test_sampling_in_one_part_is_the_loop_of_grpo(model, monkeypatch):
    """With room for a whole answer in a part, the rollouts of the study's loop have the rewards of
    train_rl's, if both ask the same problems."""
    s = RUN.zero
    rollouts = []
    monkeypatch.setattr(sampling, "load_kept", lambda *_: model)
    monkeypatch.setattr(sampling, "test_numbers", lambda *_: {})
    monkeypatch.setattr(sampling.Pool, "draw",
                        lambda pool, rng, n, share: [r1mini.draw_problem(rng, RUN, s.levels)
                                                     for _ in range(n)])
    improve = sampling.improve
    monkeypatch.setattr(sampling, "improve",
                        lambda *words: rollouts.append(words[3]) or improve(*words))
    monkeypatch.setattr(sampling, "TOKENS", 4)  # the budget ends within two rollouts
    sampling.measure_arm("uniform", SimpleNamespace(run=RUN))
    task = r1mini.make_task(RUN, s, r1mini.rule_rewards(s))
    expected = [record for record, _ in grpo.train_rl(model, task, s, RUN.seed)]
    assert [r.samples.answer.sum() for r in rollouts] == [
        r["tokens"] for r in expected][:len(rollouts)]
    assert [float(r.rewards.mean()) for r in rollouts] == [
        r["reward"] for r in expected][:len(rollouts)]


def test_sampling_in_parts_learns_in_full_batches(model, monkeypatch):
    """The policy is updated with as many groups as the other arms have in a rollout. Each answer
    of a batch is finished or has all the tokens that it may have, and no group is learnt from
    twice."""
    batches, s = [], RUN.zero
    monkeypatch.setattr(sampling, "load_kept", lambda *_: model)
    monkeypatch.setattr(sampling, "test_numbers", lambda *_: {})
    monkeypatch.setattr(sampling, "POOL", 40)
    monkeypatch.setattr(sampling, "PART", 3)
    monkeypatch.setattr(sampling, "improve", lambda *words: batches.append(words[3]))
    idle, write_on = [], sampling._write_on

    def spy(*words):
        rows = write_on(*words)
        lengths = [row.last_part for row in rows] + [0] * (s.problems * s.group_size - len(rows))
        idle.append(1 - sum(lengths) / len(lengths) / max(lengths))
        for row in rows:  # about half of the groups are ready after a part, the others after three
            row.finished = row.finished or sum(row.prompt) % 2 == 0
        return rows

    monkeypatch.setattr(sampling, "_write_on", spy)
    numbers = sampling.measure_arm("parts", SimpleNamespace(run=RUN))
    assert len(batches) == numbers["iterations"] >= 2
    assert numbers["rollouts"] > numbers["iterations"] and numbers["kept_back"] > 0
    assert numbers["idle"] == pytest.approx(sum(idle) / len(idle)) and 0 < numbers["old"] < 1
    for batch in batches:
        assert len(batch.problems) == s.problems
        for ids, finished in zip(batch.samples.answers(), batch.samples.finished):
            assert finished or len(ids) == s.max_new_tokens
    groups = [tuple(map(tuple, batch.samples.answers()[i:i + s.group_size]))
              for batch in batches for i in range(0, s.problems * s.group_size, s.group_size)]
    assert len(set(groups)) == len(groups)


# -------------------------------------------------------------------------------------------------
# long2short


def test_long2short_merge_is_the_mean(model):
    """By hand, for each weight."""
    torch.manual_seed(1)
    other = moe.Transformer(MICRO)
    merged = long2short._merge(model, other).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.allclose(merged[name], 0.5 * weight + 0.5 * other.state_dict()[name])


def test_long2short_pairs():
    """By hand: the shortest right answer is chosen. Wrong answers are rejected if they are longer,
    right ones if they are more than 1.5 times as long."""
    problem = tasks.make_problems("train", 1, (3,))[0]
    answers = [([1, 1], False), ([2] * 4, True), ([3] * 4, False), ([4] * 5, False),
               ([5] * 6, True), ([6] * 7, True), ([7] * 9, False)]
    pairs = long2short._pairs_of([(problem, answers), (problem, [([1], False)])])
    question = tasks.encode_prompt(problem.question)
    assert [pair.tokens for pair in pairs] == [question + [2] * 4] * 3
    assert [pair.worse[len(question):] for pair in pairs] == [[4] * 5, [6] * 7, [7] * 9]
    assert {pair.prompt_length for pair in pairs} == {len(question)}
    assert [pair.worse_is_right for pair in pairs] == [False, True, False]


def test_long2short_dpo_loss_by_hand(model):
    """One pair at a time, without padding: -log sigmoid(2 (chosen - rejected)), each side the
    difference of summed log-probabilities of the answer's tokens. At the reference it is log 2."""
    torch.manual_seed(2)
    reference = moe.Transformer(MICRO).eval()
    question = tasks.encode_prompt("Compute 1+2+3")
    pairs = [long2short.Pair(question + [5, 6, 7], question + [8], len(question), False),
             long2short.Pair(question + [9], question + [4, 3, 2, 1], len(question),
                             True)]

    def log_probability(model, ids):
        logp = model(torch.tensor([ids[:-1]])).logits.log_softmax(-1)[0]
        return sum(logp[t - 1, ids[t]] for t in range(len(question), len(ids)))

    expected = 0.0
    for pair in pairs:
        chosen = log_probability(model, pair.tokens) - log_probability(reference, pair.tokens)
        rejected = log_probability(model, pair.worse) - log_probability(reference, pair.worse)
        expected -= torch.sigmoid(2 * (chosen - rejected)).log() / 2
    loss, _ = long2short._dpo_loss(reference)(model, pairs, pairs)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    same, _ = long2short._dpo_loss(model)(model, pairs, pairs)
    assert float(same.detach()) == pytest.approx(0.693147, abs=1e-5)


def test_long2short_learns_from_the_shortest_right_answer(model, monkeypatch):
    """By hand: of the answers of a problem only the shortest right one becomes a document."""
    problem = tasks.make_problems("train", 1, (3,))[0]
    texts = ["<answer>1000</answer>", f"<answer>{problem.answer}</answer>",
             f"<think>1+1=2</think><answer>{problem.answer}</answer>"]
    ids = [tasks.encode_response(text) for text in texts]
    monkeypatch.setattr(long2short, "PROBLEMS", 1)
    monkeypatch.setattr(long2short, "SAMPLES", 3)
    monkeypatch.setattr(long2short, "draw_problem", lambda *_: problem)
    monkeypatch.setattr(long2short, "sample_answers", lambda *_, **__: ids[::-1])
    learnt = []
    monkeypatch.setattr(long2short, "_after", lambda m, s, examples, seed: learnt.extend(examples))
    _, numbers = long2short._shortest(model, RUN)
    assert learnt == [tasks.dialogue(problem, texts[1])]
    assert numbers == {"learnt_length": len(ids[1]), "learnt_checks": 0.0}


def test_long2short_every_arm_is_measured(model, monkeypatch):
    """Each arm starts from the same two models, is trained as its name says and tested. RL asks
    other problems than those of the long model's own RL."""
    drawn = []
    short = moe.Transformer(MICRO).eval()
    monkeypatch.setattr(long2short, "_start_models", lambda *_: (model, short))
    monkeypatch.setattr(long2short, "test_numbers", lambda m, run: {"model": m})
    monkeypatch.setattr(long2short, "PROBLEMS", 2)
    monkeypatch.setattr(tasks, "accuracy", lambda text, problem: float(len(text) % 2 == 0))
    monkeypatch.setattr(long2short, "train_in_memory",
                        lambda m, task, s, run: drawn.append((s, run.seed)) or (m,))
    monkeypatch.setattr(long2short, "_after", lambda m, s, examples, seed, **_: (m, examples))
    folder = SimpleNamespace(run=RUN)
    found = {arm: long2short.measure_arm(arm, folder) for arm in long2short.ARMS}
    assert found["long"]["model"] is model and found["short"]["model"] is short
    assert found["rl"]["model"] is model
    [(s, seed)] = drawn
    assert seed != RUN.seed and s.length_weight > 0 and s.max_new_tokens == 70
    for arm in ("shortest", "random"):
        assert found[arm]["model"][0] is model and found[arm]["learnt_length"] > 0
    assert found["dpo"]["pairs"] == len(found["dpo"]["model"][1])


# -------------------------------------------------------------------------------------------------
# judges


def test_judges_numbers_in_chinese():
    """By hand."""
    expected = {0: "零", 7: "七", 10: "十", 11: "十一", 19: "十九", 20: "二十", 33: "三十三",
                90: "九十", 99: "九十九"}
    assert {n: judges._in_chinese(n) for n in expected} == expected


@pytest.mark.parametrize("text, value", [
    ("33", 33), ("25+8", 33), ("66/2", 33), ("三十三", 33), ("0+0", 0), ("零", 0), ("-3", -3),
    ("25+08", None), ("65/2", None), ("5/0", None), ("", None), ("33 ", None), ("25+8=33", None),
    ("1+1+1", None), ("三三", None), ("33.0", None), ("٣", None), ("1" * 5000 + "+1", None)])
def test_judges_rule(text, value):
    """By hand: what an answer stands for. All else stands for nothing, and is never right."""
    assert judges._value_of(text) == value


def test_judges_forms_are_read_back():
    """Every number in every form has its own value, and the words of a judge are in the
    vocabulary."""
    rng = random.Random(0)
    for n in range(100):
        for form in judges.FORMS:
            assert judges._value_of(judges._write_number(n, form, rng)) == n
    case = judges._draw_case(rng, RUN)
    text = judges._question_of(*case[:2]) + judges._working_of(*case[:2]) + "right" + "三十三"
    assert tasks.ENCODING.decode(tasks.ENCODING.encode_ordinary(text)) == text
    assert len(tasks.ENCODING.encode_ordinary("reference 33\nanswer ")) == 5


def test_judges_cases_are_half_right():
    """The label says whether the answer is right; about half are; the working ends in the same
    verdict."""
    rng, labels = random.Random(0), []
    for _ in range(400):
        problem, answer, right = judges._draw_case(rng, RUN)
        assert judges._is_right(answer, problem) == right
        assert judges._working_of(problem, answer).endswith("same") == right
        labels.append(right)
    assert 160 < sum(labels) < 240


def test_judges_test_has_pairs_that_no_judge_has_seen():
    """No pair of a reference and an answer is both of the training part and of the test part, and
    both parts have wrong answers near the right one and far from it."""
    rng, pairs = random.Random(0), {}
    for part in ("train", "test"):
        cases = [judges._draw_case(rng, RUN, part=part) for _ in range(600)]
        pairs[part] = {(p.answer, answer) for p, answer, _ in cases}
        errors = {abs(judges._value_of(answer) - int(p.answer)) for p, answer, _ in cases}
        assert {0, 1, 10} < errors and max(errors) > 50
        assert 200 < sum(right for _, _, right in cases) < 400
    assert not pairs["train"] & pairs["test"]


def test_judges_accuracy_by_hand():
    """A judge that pays everything is right on half of the cases; the exact rule on all; a
    comparison of texts on those in plain form, and on the wrong ones in others."""
    run = RUN
    folder = SimpleNamespace(run=run)
    for arm, expected, plain in (("rule", 1.0, 1.0), ("text", 0.625, 1.0)):
        numbers = judges._accuracy_of(judges._make_judge(arm, folder, None), run)
        assert numbers["accuracy"] == pytest.approx(expected, abs=0.03)
        assert numbers["accuracy.plain"] == plain
    numbers = judges._accuracy_of(lambda problems, answers: [1.0] * len(answers), run)
    assert numbers["accuracy"] == pytest.approx(0.5, abs=0.05)


def test_judges_test_by_hand(monkeypatch):
    """Of four answers one is right and plain, one right and a sum, one wrong and plain, and one is
    not in the template. A judge that pays everything is fooled by the wrong one."""
    asked = judges.repeat_for_answers(
        tasks.make_problems("test", RUN.eval.problems, RUN.zero.levels), RUN.eval.fewer_samples)
    texts = []
    for i, problem in enumerate(asked):
        answer = (problem.answer, f"{problem.answer}+0", "100", "")[i % 4]
        texts.append(tasks.response("x", answer) if answer else "x")
    monkeypatch.setattr(judges, "sample_answers",
                        lambda *_, **__: [tasks.encode_response(text) for text in texts])
    found = judges._test(None, lambda problems, answers: [1.0] * len(answers), RUN)
    examples = found.pop("examples")
    assert found == {"judged": 0.75, "true": 0.5, "plain": 0.5, "fooled": 0.25, "accepted": 0.5}
    assert examples.startswith("100 for ")


def test_judges_reward_asks_about_readable_answers_only():
    """What is not in the template, or is longer than LONGEST, earns nothing and is not judged."""
    problem = tasks.make_problems("train", 1, (3,))[0]
    asked = []

    def judge(problems, answers):
        asked.extend(answers)
        return [0.75] * len(answers)

    texts = ["<answer>8</answer>", "8", f"<answer>{'1' * 25}</answer>", "<answer>a<</answer>"]
    assert judges._reward_of(judge)(texts, [problem] * 4) == [0.75, 0.0, 0.0, 0.75]
    assert asked == ["8", "a<"] and judges._reward_of(judge)(["8"], [problem]) == [0.0]


def test_judges_learn_from_the_same_cases(monkeypatch, model):
    """Both judges draw the same answers, in the same order, with the same labels."""
    drawn = {"value": [], "reasoning": []}

    def keep(name):
        def collect(*words, **_):
            draw = next(word for word in words if callable(word)
                        and getattr(word, "__name__", "") == "draw")
            rng = random.Random(3)
            drawn[name] = [draw(rng) for _ in range(20)]
            return make_judge(0) if name == "value" else []
        return collect

    monkeypatch.setattr(judges, "train_reward_model", keep("value"))
    monkeypatch.setattr(judges, "train", keep("reasoning"))
    judges._value_judge(None, model, RUN)
    judges._reasoning_judge(None, model, RUN)
    for case, document in zip(drawn["value"], drawn["reasoning"]):
        assert document.tokens[:len(case.tokens)] == case.tokens
        verdict = tasks.parse(tasks.decode(document.tokens[len(case.tokens):]))[1]
        assert verdict == ("right" if case.safe else "wrong")
