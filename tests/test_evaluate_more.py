"""More tests of engine/evaluate.py: choices among several answers, and their embeddings."""
import itertools
import math

import torch

import moe
import r1mini
import tasks
from engine import evaluate


def test_evaluate_central_answer_equals_smoothie():
    """The most central answer has the smallest Smoothie delta, averaged over all pairs of the other
    answers."""
    for k in (3, 5, 8):
        e = torch.randn(k, 6, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        d = torch.cdist(e, e) ** 2
        delta = [sum((d[i, a] + d[i, b] - d[a, b]) / 2 for a, b in itertools.combinations(
            [j for j in range(k) if j != i], 2)) / math.comb(k - 1, 2) for i in range(k)]
        assert int(evaluate.central(e)) == min(range(k), key=lambda i: delta[i])


def test_evaluate_votes_are_means_over_blocks():
    """By hand, for right, wrong, wrong, right: no two answers have a majority, and a tie of four
    goes to the first."""
    p = tasks.Problem("Compute 1+2", "3", "en", 1, "1+2")
    right, wrong = (tasks.response("", n) for n in (3, 4))
    r = evaluate.selection([right, wrong, wrong, right, right, right, wrong, wrong], [p])
    assert round(r["pass@1"], 9) == r["cons@1"] == 0.5 and r["cons@4"] == 1.0 and r["pass@8"] == 1.0


def test_evaluate_embeddings_equal_unpadded_means():
    """An embedding equals the mean hidden state over the thinking in a forward pass of that answer
    alone, without padding."""
    model = moe.Transformer(r1mini.PRESETS["micro"]).eval()
    prompts = [tasks.encode_prompt("Compute 1+2"), tasks.encode_prompt("Compute 15-12+9")]
    ids = [tasks.encode_response(text)
           for text in ("<think>1+2=3</think><answer>3</answer>", "4")]
    e = evaluate.embeddings(model, prompts, ids, 8)
    for row, p, a in zip(e, prompts, (ids[0][:7], ids[1])):
        h = model(torch.tensor([p + a])).hidden[0, len(p):].mean(0)
        torch.testing.assert_close(row, h)
