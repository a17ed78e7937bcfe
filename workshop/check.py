"""Checks the functions that a student has written in workshop/exercises/, and says what is wrong.

    python workshop/check.py               all of them
    python workshop/check.py advantage     this one

The oracle is r1mini's own function, on small cases. A wrong answer is compared with what the usual
mistakes would give, each written down here: where one fits all cases, its name is the advice.
"""
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import grpo
import moe
import tasks
from engine.errors import UserError


@dataclass
class Exercise:
    """A function to write, and how it is judged."""
    function: str        # its name in exercises/NAME.py
    right: Callable      # the oracle
    cases: list          # of arguments
    mistakes: dict = field(default_factory=dict)  # sentence -> function that makes this mistake
    hints: list = field(default_factory=list)     # a sentence for each case that is wrong
    also: Callable = lambda function, case: None  # (function, case) -> sentence or None


# --------------------------------------------------------------------------------------------------
# Advantage, and the leash

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.2], [1.2, 1.2, 0.2, 1.2]])
ALL_EQUAL = torch.tensor([[0.0, 1.0], [1.0, 1.0]])


def centred(r):
    """Rewards less their group's mean."""
    return r - r.mean(1, keepdim=True)


ADVANTAGE = Exercise("advantages", grpo.advantages, [(REWARDS,), (ALL_EQUAL,)], {
    "divides by the standard deviation with G, not G - 1 (torch's std has G - 1 unless told "
    "otherwise)": lambda r: centred(r) / r.std(1, unbiased=False, keepdim=True).clamp(min=1e-6),
    "does not divide by the group's standard deviation": centred,
    "divides by the variance: the standard deviation is its root":
        lambda r: centred(r) / r.var(1, keepdim=True).clamp(min=1e-6),
    "is 0/0 where all rewards of a group are equal: such a group teaches nothing, make it 0":
        lambda r: centred(r) / r.std(1, keepdim=True),
    "does not subtract the group's mean": lambda r: grpo.advantages(r) + (
        r.mean(1, keepdim=True) / r.std(1, keepdim=True).clamp(min=1e-6)),
    "has the wrong sign: what is better than the mean should come out above 0":
        lambda r: -grpo.advantages(r),
    "compares over all questions; a group is one row (dim 1)":
        lambda r: (r - r.mean()) / r.std(),
    "compares down the columns, answers to different questions; a group is one row (dim 1)":
        lambda r: grpo.advantages(r.T).T,
})

NEW, REFERENCE = torch.tensor([[-0.5, -2.0, -1.0]]), torch.tensor([[-1.5, -0.7, -1.0]])
KL = Exercise("kl_k3", grpo.kl_k3, [(NEW, REFERENCE)], {
    "is k1, the plain difference of logarithms: it can be below 0 at a token, k3 cannot":
        lambda new, ref: new - ref,
    "is k1 with the wrong sign, and k3 has two terms more": lambda new, ref: ref - new,
    "is k2, half the squared difference; close where the policies are, but another estimate":
        lambda new, ref: (new - ref) ** 2 / 2,
    "has the ratio upside down: x is the reference by the policy, pi_ref / pi":
        lambda new, ref: grpo.kl_k3(ref, new),
    "lacks the -1: where both agree (x = 1) it should be 0":
        lambda new, ref: grpo.kl_k3(new, ref) + 1,
    "takes log-probabilities for probabilities: x = exp(reference - new)":
        lambda new, ref: ref / new - (ref / new).log() - 1,
    "adds log x where it should take it away: x - log x - 1":
        lambda new, ref: (ref - new).exp() + (ref - new) - 1,
})

# --------------------------------------------------------------------------------------------------
# The router


def route(scores, bias, groups, limited, k, scale, gate_bias=0.0, group_bias=1.0, best=2,
          normal="chosen"):
    """Gates (N, E), by loops; the keywords make the mistakes."""
    gates = torch.zeros_like(scores)
    for n, row in enumerate(scores.tolist()):
        size, shift = len(row) // groups, bias.tolist()
        biased = [s + b for s, b in zip(row, shift)]
        weighed = [s + group_bias * b for s, b in zip(row, shift)]
        worth = [sum(sorted(weighed[g * size:(g + 1) * size])[-best:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: -worth[g])[:limited]
        open_to = [e for e in range(len(row)) if e // size in kept]
        chosen = sorted(open_to, key=lambda e: -biased[e])[:k]
        raw = {e: row[e] + gate_bias * shift[e] for e in chosen}
        whole = {"chosen": sum(raw.values()), "all": sum(row), "none": 1.0}[normal]
        for e, gate in raw.items():
            gates[n, e] = gate / whole * scale
    return gates


def router_of_moe(scores, bias, groups, limited, k, scale):
    """Gates (N, E) of moe.Router, whose centroids are made the unit vectors."""
    E = scores.size(1)
    router = moe.Router(moe.Config(
        dim=E, n_routed_experts=E, n_activated_experts=k, route_scale=scale,
        n_expert_groups=groups, n_limited_groups=limited))
    router.weight.data, router.bias = torch.eye(E), bias
    _, gates, chosen = router(scores.logit())
    return torch.zeros_like(scores).scatter(-1, chosen, gates.detach())


DICE = torch.Generator().manual_seed(1)
SCORES, BIAS = torch.rand(6, 9, generator=DICE), torch.rand(9, generator=DICE) / 2 - 0.25
CASES = [(SCORES, BIAS, 3, 1, 2, 2.5), (SCORES, BIAS, 3, 2, 3, 2.5)]
ROUTER = Exercise("route", router_of_moe, CASES, {
    "puts the bias into the gates: it is for the choice only, gates come from the raw scores":
        lambda *case: route(*case, gate_bias=1.0),
    "forgets the bias when it chooses":
        lambda s, b, *rest: route(s, 0 * b, *rest),
    "forgets the node limit: only the experts of the best groups may be chosen":
        lambda s, b, groups, limited, k, scale: route(s, b, groups, groups, k, scale),
    "judges a group by its best expert; V3 takes the sum of the two best":
        lambda *case: route(*case, best=1),
    "judges a group by all its experts; V3 takes the sum of the two best":
        lambda *case: route(*case, best=99),
    "judges the groups without the bias": lambda *case: route(*case, group_bias=0.0),
    "does not divide the gates by their sum": lambda *case: route(*case, normal="none"),
    "divides by the scores of all experts; only the chosen ones' count":
        lambda *case: route(*case, normal="all"),
    "forgets the factor `scale`": lambda *case: route(*case[:-1], 1.0),
})

# --------------------------------------------------------------------------------------------------
# Decoding from latents


def attend(q, q_rope, latent, k_rope, w_uk, w_uv, scale, rotary=1.0, over="tokens", content=1.0):
    """(H, V) with every token's keys and values made, the slow way; the keywords make mistakes."""
    keys = torch.einsum("hdc,sc->hsd", w_uk, latent)    # (H, S, D)
    values = torch.einsum("hvc,sc->hsv", w_uv, latent)  # (H, S, V)
    score = content * torch.einsum("hd,hsd->hs", q, keys) + rotary * (q_rope @ k_rope.T)
    weight = (score * scale).softmax({"tokens": 1, "heads": 0}[over])
    return torch.einsum("hs,hsv->hv", weight, values)


def attend_of_moe(q, q_rope, latent, k_rope, w_uk, w_uv, scale):
    """(H, V) of moe.MLA, in whose place an object stands that has the same weights."""
    (H, D, C), V, S = w_uk.shape, w_uv.size(1), len(latent)
    weight = torch.cat((w_uk, w_uv), 1).view(H * (D + V), C)
    layer = SimpleNamespace(heads=H, nope_dim=D, value_dim=V, rank=C,
                            scale=scale,
                            wkv_b=SimpleNamespace(weight=weight))
    cache, mask = torch.cat((latent, k_rope), 1)[None], torch.zeros(1, 1, 1, S)
    return moe.MLA.attend_absorbed(layer, q[None, None], q_rope[None, None], cache, mask)[0, 0]


class Sizes(TorchDispatchMode):
    """Notes how many numbers are in each tensor that is made."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.made.add(out.numel())
        return out


def makes_keys(function, case):
    """A sentence if a function makes every token's keys or values, else None."""
    (H, D, _), V, S = case[4].shape, case[5].size(1), len(case[2])
    with Sizes() as sizes:
        function(*case)
    for size, what in ((D, "keys"), (V, "values")):  # of all heads, or of one
        if {S * H * size, S * size} & sizes.made:
            return (f"is right, but makes the {what} of every token, {S} x {H} x {size} numbers: "
                    "move the weight to the other side, so that only latents are read")
    return None


H, D, R, C, V, S = 2, 5, 4, 11, 3, 7  # no two products of them that matter are the same
HEADS = [torch.randn(*size, generator=DICE) for size in (
    (H, D), (H, R), (S, C), (S, R), (H, D, C), (H, V, C))] + [(D + R) ** -0.5]
ABSORBED = Exercise("attend", attend_of_moe, [tuple(HEADS)], {
    "forgets the rotary part of the scores": lambda *case: attend(*case, rotary=0.0),
    "forgets the content part of the scores": lambda *case: attend(*case, content=0.0),
    "does not scale the scores": lambda *case: attend(*case[:-1], 1.0),
    "scales the content alone: scale is for the sum of both parts":
        lambda *case: attend(*case, rotary=1 / case[-1]),
    "scales the rotary part alone: scale is for the sum of both parts":
        lambda *case: attend(*case, content=1 / case[-1]),
    "takes the softmax over heads; it is over the tokens":
        lambda *case: attend(*case, over="heads"),
}, also=makes_keys)

# --------------------------------------------------------------------------------------------------
# The reward

THOUGHT = "<think>25-7=18 check 18+7=25</think>"
TEXTS = [  # a response to 25-7, the answer, what paying wrongly for it would mean
    (f"{THOUGHT}<answer>18</answer>", "18", "does not pay for a plain right answer"),
    ("<answer>-5</answer>", "-5", "does not pay below zero, or without thinking"),
    (f"{THOUGHT}the answer is <answer>18</answer>", "18",
     "does not pay where a short summary stands before the answer"),
    (f"{THOUGHT}<answer>17</answer>", "18", "pays for a wrong number"),
    ("<think>25-7=18</think><answer>17</answer>", "18", "reads the number from the thinking"),
    ("18", "18", "pays without an answer block"),
    ("", "18", "fails on an empty text"),
    (f"{THOUGHT}<answer></answer>", "18", "fails on an empty answer"),
    (f"{THOUGHT}<answer>17</answer><answer>18</answer>", "18",
     "pays where two answers are given: a policy would learn to give them all"),
    (f"{THOUGHT}<answer>17 18</answer>", "18", "pays for a list with the right number in it"),
    (f"{THOUGHT}<answer>118</answer>", "18", "pays where the right number is a part of another"),
    (f"{THOUGHT}<answer>018</answer>", "18", "pays for a leading zero; int() is too kind"),
    (f"{THOUGHT}<answer>+18</answer>", "18", "pays for a sign +; int() is too kind"),
    (f"{THOUGHT}<answer> 18 </answer>", "18", "pays with spaces; int() is too kind"),
    (f"{THOUGHT}<answer>\uff11\uff18</answer>", "18", "pays for digits that are not ASCII"),
    (f"{THOUGHT}<answer>18</answer> or 19", "18", "pays where text follows the answer"),
    (f"{THOUGHT}<answer>18", "18", "pays for an answer that is not closed"),
    ("<think>25-7=18<answer>18</answer>", "18", "pays where the thinking is not closed"),
    (f"{THOUGHT}{THOUGHT}<answer>18</answer>", "18", "pays for two think blocks"),
    (f"{THOUGHT}25-7=18 once more<answer>18</answer>", "18",
     "allows working between thinking and answer, where no length is meant to be"),
    (f"{THOUGHT}{'so ' * 14}<answer>18</answer>", "18",
     "allows a summary of over forty characters"),
]
REWARD = Exercise("accuracy", lambda text, answer: tasks.accuracy(
    text, tasks.Problem("", answer, "en")), [case[:2] for case in TEXTS],
    hints=[case[2] for case in TEXTS])

# --------------------------------------------------------------------------------------------------
# Judging

EXERCISES = {"advantage": ADVANTAGE, "kl": KL, "router": ROUTER, "absorbed": ABSORBED,
             "reward": REWARD}


def same(got, wanted):
    """Whether two tensors agree to about four digits; nan agrees with nan."""
    return got.shape == wanted.shape and torch.allclose(got, wanted, 1e-4, 1e-4, equal_nan=True)


def called(function, case):
    """(what a function makes of a case, a tensor; ""), or (None, why there is none)."""
    result = None
    try:
        result = function(*(x.clone() if isinstance(x, torch.Tensor) else x for x in case))
        return torch.as_tensor(result).detach().double(), ""
    except NotImplementedError:
        return None, "is not written yet"
    except Exception as error:  # a student's: it may be any
        if result is not None or "infer dtype of NoneType" in str(error):
            return None, f"returns {type(result).__name__}, wanted numbers"
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        return None, f"raises {type(error).__name__} in line {line}: {error}".splitlines()[0]


def judge(exercise, function):
    """What is wrong with a student's function, in words; "" if nothing is."""
    got = []
    for i, case in enumerate(exercise.cases):
        result, trouble = called(function, case)
        if trouble:
            return f"{trouble}, of {case[0]!r}" if exercise.hints and i else trouble
        got.append(result)
    wanted = [called(exercise.right, case)[0] for case in exercise.cases]
    wrong = [i for i, (a, b) in enumerate(zip(got, wanted)) if not same(a, b)]
    if not wrong:
        return exercise.also(function, exercise.cases[0]) or ""
    i = wrong[0]
    if got[i].shape != wanted[i].shape:
        return f"has the shape {tuple(got[i].shape)}, wanted {tuple(wanted[i].shape)}"
    for sentence, mistaken in exercise.mistakes.items():
        if all(same(a, called(mistaken, case)[0]) for a, case in zip(got, exercise.cases)):
            return sentence
    if exercise.hints:
        return f"{exercise.hints[i]}: {exercise.cases[i][0]!r}"
    return (f"is wrong, by no usual mistake: of {exercise.cases[i]}\nit makes\n{got[i]}\nwanted\n"
            f"{wanted[i]}")


def load(name, folder):
    """The function that a student wrote in FOLDER/NAME.py; UserError if there is none."""
    path, wanted = Path(folder) / f"{name}.py", EXERCISES[name].function
    spec = importlib.util.spec_from_file_location(f"exercise_{name}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, wanted)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from None
    except AttributeError:
        raise UserError(f"{path}: there is no function {wanted} in it") from None
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None


def main(words, folder=HERE / "exercises"):
    """Checks exercises by name, or all. Returns 0 if all are right, 1 if not, 2: no such name."""
    unknown = [name for name in words if name not in EXERCISES]
    if unknown:
        print(f"check: there is no exercise {unknown[0]!r}; choose of {', '.join(EXERCISES)}",
              file=sys.stderr)
        return 2
    worst = 0
    for name in words or EXERCISES:
        try:
            trouble = judge(EXERCISES[name], load(name, folder))
            print(f"{name:10} {f'yours {trouble}' if trouble else 'right'}")
        except UserError as error:
            print(trouble := error)
        worst = max(worst, int(bool(trouble)))
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
