"""Checks the functions that you wrote in workshop/exercises/, and explains mistakes.

    python workshop/check.py               checks all of them
    python workshop/check.py advantage     checks this one

Each function is compared with r1mini's own on small cases. If yours is wrong, it is
also compared with usual mistakes, which are written down here as functions. If one of
them gives the same results as yours, its name is the advice.
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

WORKSHOP = Path(__file__).resolve().parent
sys.path.insert(0, str(WORKSHOP.parent))
import grpo
import moe
import tasks
from engine.errors import UserError


@dataclass
class Exercise:
    """A function to write, and how it is judged. Every sentence of it is printed after
    "your function"."""
    function: str    # its name in exercises/NAME.py
    right: Callable  # r1mini's own function
    cases: list      # tuples of arguments
    mistakes: dict = field(default_factory=dict)  # {sentence: function that makes this mistake}
    hints: list = field(default_factory=list)     # for each case: the sentence if it is wrong
    # A last test of a function that is right: (function, case) -> sentence, or None.
    also: Callable = lambda function, case: None


# ------------------------------------------------------------------------------
# Advantage, and the KL penalty

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.2], [1.2, 1.2, 0.2, 1.2]])
ONE_GROUP_EQUAL = torch.tensor([[0.0, 1.0], [1.0, 1.0]])


def centred(rewards):
    """Rewards minus the mean of their group."""
    return rewards - rewards.mean(1, keepdim=True)


def without_mean(rewards):
    """Advantages from which the mean is not subtracted."""
    std = rewards.std(1, keepdim=True).clamp(min=1e-6)
    return grpo.advantages(rewards) + rewards.mean(1, keepdim=True) / std


ADVANTAGE = Exercise("advantages", grpo.advantages, [(REWARDS,), (ONE_GROUP_EQUAL,)], {
    "divides by the standard deviation with G. It should be the one with G - 1, which torch's "
    "std() computes unless told otherwise":
        lambda r: centred(r) / r.std(1, unbiased=False, keepdim=True).clamp(min=1e-6),
    "does not divide by the standard deviation of the group": centred,
    "divides by the variance. The standard deviation is its square root":
        lambda r: centred(r) / r.var(1, keepdim=True).clamp(min=1e-6),
    "computes 0/0 where all rewards of a group are equal. Such a group teaches nothing, so its "
    "advantages should be 0":
        lambda r: centred(r) / r.std(1, keepdim=True),
    "does not subtract the mean of the group": without_mean,
    "has the wrong sign. A reward above the mean should give an advantage above 0":
        lambda r: -grpo.advantages(r),
    "compares the answers of all questions with each other. A group is one row (dim 1)":
        lambda r: (r - r.mean()) / r.std(),
    "compares down the columns, where the answers to different questions stand. A group is one "
    "row (dim 1)":
        lambda r: grpo.advantages(r.T).T,
})

NEW, REFERENCE = torch.tensor([[-0.5, -2.0, -1.0]]), torch.tensor([[-1.5, -0.7, -1.0]])
KL = Exercise("kl_k3", grpo.kl_k3, [(NEW, REFERENCE)], {
    "computes k1, the plain difference of the log-probabilities. k1 can be below 0 at a token, "
    "k3 cannot":
        lambda new, ref: new - ref,
    "computes k1 with the wrong sign. k3 has two terms more":
        lambda new, ref: ref - new,
    "computes k2, half the squared difference. It is close to k3 where the policies are close, "
    "but it is another estimate":
        lambda new, ref: (new - ref) ** 2 / 2,
    "has the ratio upside down. x is the reference divided by the policy, pi_ref / pi":
        lambda new, ref: grpo.kl_k3(ref, new),
    "lacks the -1. Where both agree (x = 1) the result should be 0":
        lambda new, ref: grpo.kl_k3(new, ref) + 1,
    "takes log-probabilities for probabilities. x = exp(reference - new)":
        lambda new, ref: ref / new - (ref / new).log() - 1,
    "adds log x. It should subtract it: x - log x - 1":
        lambda new, ref: (ref - new).exp() + (ref - new) - 1,
})

# ------------------------------------------------------------------------------
# The router


def route(scores, bias, groups, limited, k, scale, gate_bias=0.0, group_bias=1.0, best=2,
          divide_by="chosen"):
    """Gates (N, E), by loops. The last four arguments make the mistakes."""
    gates = torch.zeros_like(scores)
    group_size = scores.size(1) // groups
    bias = bias.tolist()
    for n, raw in enumerate(scores.tolist()):
        biased = [score + b for score, b in zip(raw, bias)]
        biased_for_groups = [score + group_bias * b for score, b in zip(raw, bias)]
        group_scores = []
        for g in range(groups):
            of_group = biased_for_groups[g * group_size:(g + 1) * group_size]
            group_scores.append(sum(sorted(of_group)[-best:]))
        best_groups = sorted(range(groups), key=lambda g: -group_scores[g])[:limited]

        allowed = [e for e in range(len(raw)) if e // group_size in best_groups]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:k]
        weights = {e: raw[e] + gate_bias * bias[e] for e in chosen}
        divisor = {"chosen": sum(weights.values()), "all": sum(raw), "nothing": 1.0}[divide_by]
        for e, weight in weights.items():
            gates[n, e] = weight / divisor * scale
    return gates


def router_of_moe(scores, bias, groups, limited, k, scale):
    """Gates (N, E) of moe.Router. Its centroids are unit vectors, so that its input
    gives the scores."""
    E = scores.size(1)
    router = moe.Router(moe.Config(
        dim=E, n_routed_experts=E, n_activated_experts=k, route_scale=scale,
        n_expert_groups=groups, n_limited_groups=limited))
    router.weight.data, router.bias = torch.eye(E), bias
    _, gates, chosen = router(scores.logit())
    return torch.zeros_like(scores).scatter(-1, chosen, gates.detach())


GENERATOR = torch.Generator().manual_seed(1)
SCORES = torch.rand(6, 9, generator=GENERATOR)
BIAS = torch.rand(9, generator=GENERATOR) / 2 - 0.25
CASES = [(SCORES, BIAS, 3, 1, 2, 2.5), (SCORES, BIAS, 3, 2, 3, 2.5)]
ROUTER = Exercise("route", router_of_moe, CASES, {
    "uses the bias in the gates. The bias is for the choice only; the gates come from the scores "
    "without bias":
        lambda *case: route(*case, gate_bias=1.0),
    "forgets the bias when it chooses":
        lambda scores, bias, *rest: route(scores, 0 * bias, *rest),
    "forgets the node limit. Only experts of the best groups may be chosen":
        lambda scores, bias, groups, limited, k, scale: route(scores, bias, groups, groups, k,
                                                              scale),
    "judges a group by its best expert. V3 takes the sum of the two best":
        lambda *case: route(*case, best=1),
    "judges a group by all its experts. V3 takes the sum of the two best":
        lambda *case: route(*case, best=99),
    "judges the groups without the bias": lambda *case: route(*case, group_bias=0.0),
    "does not divide the gates by their sum": lambda *case: route(*case, divide_by="nothing"),
    "divides by the scores of all experts. Only those of the chosen experts count":
        lambda *case: route(*case, divide_by="all"),
    "forgets the factor `scale`": lambda *case: route(*case[:-1], 1.0),
})

# ------------------------------------------------------------------------------
# Decoding from latents


def attend(q, q_rope, latent, k_rope, w_uk, w_uv, scale, rotary=1.0, softmax_over="tokens",
           content=1.0):
    """(H, V), the slow way: it makes the keys and values of every token. The last three
    arguments make the mistakes."""
    keys = torch.einsum("hdc,sc->hsd", w_uk, latent)    # (H, S, D)
    values = torch.einsum("hvc,sc->hsv", w_uv, latent)  # (H, S, V)
    scores = content * torch.einsum("hd,hsd->hs", q, keys) + rotary * (q_rope @ k_rope.T)
    weights = (scores * scale).softmax({"tokens": 1, "heads": 0}[softmax_over])
    return torch.einsum("hs,hsv->hv", weights, values)


def attend_of_moe(q, q_rope, latent, k_rope, w_uk, w_uv, scale):
    """(H, V) of moe.MLA. Instead of a layer it gets an object with the same weights."""
    (H, D, C), V, S = w_uk.shape, w_uv.size(1), len(latent)
    weight = torch.cat((w_uk, w_uv), 1).view(H * (D + V), C)
    layer = SimpleNamespace(heads=H, nope_dim=D, value_dim=V, rank=C, scale=scale,
                            wkv_b=SimpleNamespace(weight=weight))
    cache, mask = torch.cat((latent, k_rope), 1)[None], torch.zeros(1, 1, 1, S)
    return moe.MLA.attend_absorbed(layer, q[None, None], q_rope[None, None], cache, mask)[0, 0]


class Sizes(TorchDispatchMode):
    """Notes the number of elements of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.made.add(result.numel())
        return result


def makes_keys(function, case):
    """A sentence if a function makes every token's keys or values, else None."""
    _, _, latent, _, w_uk, w_uv, _ = case
    (H, D, _), V, S = w_uk.shape, w_uv.size(1), len(latent)
    with Sizes() as sizes:
        function(*case)
    for size, name in ((D, "keys"), (V, "values")):
        all_heads, one_head = S * H * size, S * size
        if all_heads in sizes.made or one_head in sizes.made:
            return (f"gives the right result, but it makes the {name} of every token, "
                    f"{S} x {H} x {size} numbers. Move the weight to the other side, so that "
                    "only the latents are read")
    return None


# No two products of these sizes that matter are equal, so Sizes can tell tensors apart.
H, D, R, C, V, S = 2, 5, 4, 11, 3, 7
TENSORS = [torch.randn(*size, generator=GENERATOR) for size in (
    (H, D), (H, R), (S, C), (S, R), (H, D, C), (H, V, C))]
ABSORBED = Exercise("attend", attend_of_moe, [(*TENSORS, (D + R) ** -0.5)], {
    "forgets the rotary part of the scores": lambda *case: attend(*case, rotary=0.0),
    "forgets the content part of the scores": lambda *case: attend(*case, content=0.0),
    "does not multiply the scores by scale": lambda *case: attend(*case[:-1], 1.0),
    "multiplies only the content by scale. It is for the sum of both parts":
        lambda *case: attend(*case, rotary=1 / case[-1]),
    "multiplies only the rotary part by scale. It is for the sum of both parts":
        lambda *case: attend(*case, content=1 / case[-1]),
    "takes the softmax over the heads. It should be over the tokens":
        lambda *case: attend(*case, softmax_over="heads"),
}, also=makes_keys)

# ------------------------------------------------------------------------------
# The reward

THOUGHT = "<think>25-7=18 check 18+7=25</think>"
TEXTS = [  # a response to 25-7, the right answer, and the sentence if the reward is wrong
    (f"{THOUGHT}<answer>18</answer>", "18", "does not pay for a plain right answer"),
    ("<answer>-5</answer>", "-5", "does not pay for a number below zero, or without thinking"),
    (f"{THOUGHT}the answer is <answer>18</answer>", "18",
     "does not pay when a short summary stands before the answer"),
    (f"{THOUGHT}<answer>17</answer>", "18", "pays for a wrong number"),
    ("<think>25-7=18</think><answer>17</answer>", "18", "reads the number from the thinking"),
    ("18", "18", "pays without an answer block"),
    ("", "18", "is wrong about an empty text"),
    (f"{THOUGHT}<answer></answer>", "18", "is wrong about an empty answer"),
    (f"{THOUGHT}<answer>17</answer><answer>18</answer>", "18",
     "pays for two answers. A policy would learn to give all possible answers"),
    (f"{THOUGHT}<answer>17 18</answer>", "18", "pays for a list that has the right number in it"),
    (f"{THOUGHT}<answer>118</answer>", "18", "pays when the right number is a part of another"),
    (f"{THOUGHT}<answer>018</answer>", "18", "pays for a leading zero. int() accepts too much"),
    (f"{THOUGHT}<answer>+18</answer>", "18", "pays for a plus sign. int() accepts too much"),
    (f"{THOUGHT}<answer> 18 </answer>", "18", "pays for spaces. int() accepts too much"),
    (f"{THOUGHT}<answer>\uff11\uff18</answer>", "18", "pays for digits that are not ASCII"),
    (f"{THOUGHT}<answer>18</answer> or 19", "18", "pays when text follows the answer"),
    (f"{THOUGHT}<answer>18", "18", "pays for an answer without </answer>"),
    ("<think>25-7=18<answer>18</answer>", "18", "pays for thinking without </think>"),
    (f"{THOUGHT}{THOUGHT}<answer>18</answer>", "18", "pays for two think blocks"),
    (f"{THOUGHT}25-7=18 once more<answer>18</answer>", "18",
     "pays when there is more working between thinking and answer. Only a summary without digits "
     "is allowed there"),
    (f"{THOUGHT}{'so ' * 14}<answer>18</answer>", "18",
     "pays for a summary of more than forty characters"),
]


def accuracy_of_tasks(text, answer):
    """tasks.accuracy of a response to a sum with this answer."""
    return tasks.accuracy(text, tasks.Problem("", answer, "en"))


REWARD = Exercise("accuracy", accuracy_of_tasks, [(text, answer) for text, answer, _ in TEXTS],
                  hints=[hint for _, _, hint in TEXTS])

# ------------------------------------------------------------------------------
# Judging

EXERCISES = {"advantage": ADVANTAGE, "kl": KL, "router": ROUTER, "absorbed": ABSORBED,
             "reward": REWARD}


def same(result, expected):
    """Whether two tensors agree to about four digits; nan agrees with nan."""
    return result.shape == expected.shape and torch.allclose(result, expected, 1e-4, 1e-4,
                                                             equal_nan=True)


def call(function, case):
    """(the result of a function on a case as a tensor, ""), or (None, a sentence that
    says why there is none)."""
    arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in case]
    result = None
    try:
        result = function(*arguments)
        return torch.as_tensor(result).detach().double(), ""
    except NotImplementedError:
        return None, "is not written yet"
    except Exception as error:  # a student's function can raise any error
        if result is not None or "infer dtype of NoneType" in str(error):
            return None, f"returns {type(result).__name__}. It should return numbers"
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        first_line = f"{error}".partition("\n")[0]
        return None, f"raises {type(error).__name__} in line {line}: {first_line}"


def judge(exercise, function):
    """A sentence that says what is wrong with a student's function; "" if it is right."""
    results = []
    for i, case in enumerate(exercise.cases):
        result, trouble = call(function, case)
        if trouble and exercise.hints and i > 0:
            return f"{trouble}, for the text {case[0]!r}"
        if trouble:
            return trouble
        results.append(result)
    expected = [call(exercise.right, case)[0] for case in exercise.cases]
    wrong = [i for i in range(len(results)) if not same(results[i], expected[i])]
    if not wrong:
        return exercise.also(function, exercise.cases[0]) or ""

    i = wrong[0]
    if results[i].shape != expected[i].shape:
        return (f"returns the shape {tuple(results[i].shape)}. It should be "
                f"{tuple(expected[i].shape)}")
    for sentence, mistaken in exercise.mistakes.items():
        with_mistake = [call(mistaken, case)[0] for case in exercise.cases]
        if all(same(a, b) for a, b in zip(results, with_mistake)):
            return sentence
    if exercise.hints:
        return f"{exercise.hints[i]}: {exercise.cases[i][0]!r}"
    return (f"is wrong, and this is none of the usual mistakes. For the arguments\n"
            f"{exercise.cases[i]}\nit returns\n{results[i]}\nIt should return\n{expected[i]}")


def load(name, folder):
    """The function that a student wrote in FOLDER/NAME.py. UserError if there is none."""
    path, function = Path(folder) / f"{name}.py", EXERCISES[name].function
    spec = importlib.util.spec_from_file_location(f"exercise_{name}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: Python cannot read this line: "
                        f"{error.msg}") from None
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    if not hasattr(module, function):
        raise UserError(f"{path}: there is no function {function} in this file")
    return getattr(module, function)


def main(words, folder=WORKSHOP / "exercises"):
    """Checks the named exercises, or all. Returns 0 if all are right, 1 if one is not,
    2 for an unknown name."""
    unknown = [name for name in words if name not in EXERCISES]
    if unknown:
        print(f"check: there is no exercise {unknown[0]!r}; choose from {', '.join(EXERCISES)}",
              file=sys.stderr)
        return 2
    all_right = True
    for name in words or EXERCISES:
        try:
            trouble = judge(EXERCISES[name], load(name, folder))
            verdict = f"your function {trouble}" if trouble else "right"
        except UserError as error:
            trouble = verdict = str(error)
        print(f"{name:10} {verdict}")
        if trouble:
            all_right = False
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
