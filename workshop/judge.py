"""The right functions of the workshop's exercises, and the usual mistakes. For check.py.

A student's function is compared with r1mini's own on small cases. If it is wrong, it is
also compared with usual mistakes, which are written down here as functions. If one of
them gives the same results, its name is the advice.
"""
import numbers
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grpo
import moe
import tasks
from engine.errors import UserError


class Fault(Exception):
    """What is wrong with a student's function. The message goes on after "your function"."""


@dataclass
class Exercise:
    """A function to write, and how it is judged. Its sentences are printed after "your
    function"."""
    function: str    # its name in exercises/NAME.py
    right: Callable  # r1mini's own function
    cases: list      # tuples of arguments
    mistakes: dict = field(default_factory=dict)  # {sentence: function that makes this mistake}
    variants: dict = field(default_factory=dict)  # {sentence: another function that is right}
    hints: list = field(default_factory=list)     # for each case: the sentence if it is wrong
    # {name of an argument: its number}: the gradient of these is checked too.
    gradient: dict = field(default_factory=dict)
    # A last test of a function that is right: (function, case) -> sentence, or None.
    also: Callable = lambda function, case: None


# ------------------------------------------------------------------------------
# Advantage, and the KL penalty

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.2], [1.2, 1.2, 0.2, 1.2]])
ONE_GROUP_EQUAL = torch.tensor([[0.0, 1.0], [1.0, 1.0]])


def _centred(rewards):
    """Rewards minus the mean of their group."""
    return rewards - rewards.mean(1, keepdim=True)


def _without_mean(rewards):
    """Advantages from which the mean is not subtracted."""
    std = rewards.std(1, keepdim=True).clamp(min=1e-6)
    return grpo.advantages(rewards) + rewards.mean(1, keepdim=True) / std


ADVANTAGE = Exercise("advantages", grpo.advantages, [(REWARDS,), (ONE_GROUP_EQUAL,)], {
    "divides by G inside the standard deviation. The paper does not say which divisor it takes. "
    "Here it is G - 1, which torch's std() uses by default":
        lambda r: _centred(r) / r.std(1, unbiased=False, keepdim=True).clamp(min=1e-6),
    "does not divide by the standard deviation of the group": _centred,
    "divides by the variance. The standard deviation is its square root":
        lambda r: _centred(r) / r.var(1, keepdim=True).clamp(min=1e-6),
    "computes 0/0 where all rewards of a group are equal. Such a group teaches nothing, so its "
    "advantages should be 0":
        lambda r: _centred(r) / r.std(1, keepdim=True),
    "does not subtract the mean of the group": _without_mean,
    "has the wrong sign. A reward above the mean should give an advantage above 0":
        lambda r: -grpo.advantages(r),
    "compares the answers of all questions with each other. A group is one row (dim 1)":
        lambda r: (r - r.mean()) / r.std(),
    "compares down the columns, where the answers to different questions stand. A group is one "
    "row (dim 1)":
        lambda r: grpo.advantages(r.T).T,
}, variants={
    "adds 1e-4 to what it divides by, as TRL does. The paper does not say how to avoid 0/0":
        lambda r: _centred(r) / (r.std(1, keepdim=True) + 1e-4),
})

NEW, REFERENCE = torch.tensor([[-0.5, -2.0, -1.0]]), torch.tensor([[-1.5, -0.7, -1.0]])
KL = Exercise("kl_k3", grpo.kl_k3, [(NEW, REFERENCE)], {
    "computes k1, the plain difference of the log-probabilities. k1 can be below 0 at a token, "
    "k3 cannot":
        lambda new, ref: new - ref,
    "computes k1 with the wrong sign. k3 has two more terms":
        lambda new, ref: ref - new,
    "computes k2, half the squared difference. It is close to k3 where the policies are close, "
    "but it is another estimate":
        lambda new, ref: (new - ref) ** 2 / 2,
    "has the ratio upside down. x is the reference divided by the policy, pi_ref / pi":
        lambda new, ref: grpo.kl_k3(ref, new),
    "lacks the -1. Where both agree (x = 1) the result should be 0":
        lambda new, ref: grpo.kl_k3(new, ref) + 1,
    "treats log-probabilities as probabilities. x = exp(reference - new)":
        lambda new, ref: ref / new - (ref / new).log() - 1,
    "adds log x. It should subtract it: x - log x - 1":
        lambda new, ref: (ref - new).exp() + (ref - new) - 1,
}, gradient={"new": 0})

# ------------------------------------------------------------------------------
# Kimi's objective


def _kimi_of_grpo(new, old, advantage, mask, tau):
    """grpo.kimi of one minibatch."""
    batch = grpo.Batch(len(new), int(mask.sum()))
    return grpo.kimi(new, old, None, advantage, mask, batch, grpo.RL(tau=tau))[0]


def _mirror_descent(new, old, advantage, mask, tau, log_ratio=None, square=None):
    """The objective, from a log-ratio (n,) and its square (n,). The last two make the
    mistakes."""
    if log_ratio is None:
        log_ratio = ((new - old) * mask).sum(1)
    square = log_ratio ** 2 if square is None else square
    return (advantage * log_ratio - tau / 2 * square).mean()


OLD = torch.tensor([[-0.5, -2.0, -1.0], [-0.3, -0.9, -1.7]])
SAMPLED = torch.tensor([[-0.4, -2.6, -0.7], [-0.8, -0.2, -1.1]])
ADVANTAGE_OF_TWO = torch.tensor([0.75, -0.4])
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
KIMI = Exercise("kimi", _kimi_of_grpo, [(SAMPLED, OLD, ADVANTAGE_OF_TWO, MASK, 0.3)], {
    "takes the mean of new - old over the tokens. The log-ratio of an answer is the sum":
        lambda n, o, a, m, tau: _mirror_descent(n, o, a, m, tau, ((n - o) * m).sum(1) / m.sum(1)),
    "forgets the mask. Tokens behind the end of an answer must not count":
        lambda n, o, a, m, tau: _mirror_descent(n, o, a, torch.ones_like(m), tau),
    "squares each token. The square is of the sum over the tokens":
        lambda n, o, a, m, tau: _mirror_descent(n, o, a, m, tau,
                                                square=((n - o) ** 2 * m).sum(1)),
    "takes the ratio. The objective has its logarithm, which is the sum of new - old":
        lambda n, o, a, m, tau: _mirror_descent(n, o, a, m, tau, ((n - o) * m).sum(1).exp()),
    "has the log-ratio upside down. It is new - old":
        lambda n, o, a, m, tau: _kimi_of_grpo(o, n, a, m, tau),
    "leaves out the square. Without it nothing holds the policy near the old one":
        lambda n, o, a, m, tau: _kimi_of_grpo(n, o, a, m, 0.0),
    "multiplies the square by tau. The formula has tau / 2":
        lambda n, o, a, m, tau: _kimi_of_grpo(n, o, a, m, 2 * tau),
    "adds the square. It should subtract it: the square is a penalty":
        lambda n, o, a, m, tau: _kimi_of_grpo(n, o, a, m, -tau),
    "sums over the answers. It should take the mean":
        lambda *case: len(case[0]) * _kimi_of_grpo(*case),
    "has the wrong sign. The objective is to be maximised":
        lambda *case: -_kimi_of_grpo(*case),
}, gradient={"new": 0})

# ------------------------------------------------------------------------------
# The router


def _route(scores, bias, groups, limited, k, scale, gate_bias=0.0, group_bias=1.0, best=2,
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


def _router_of_moe(scores, bias, groups, limited, k, scale):
    """Gates (N, E) of moe.Router. Its centroids are unit vectors, so that its input
    gives the scores."""
    E = scores.size(1)
    router = moe.Router(moe.Config(
        dim=E, n_routed_experts=E, n_activated_experts=k, route_scale=scale,
        n_expert_groups=groups, n_limited_groups=limited))
    router.weight.data, router.bias = torch.eye(E), bias
    _, gates, chosen = router(scores.logit())
    return torch.zeros_like(scores).scatter(-1, chosen, gates)


GENERATOR = torch.Generator().manual_seed(1)
SCORES = torch.rand(6, 9, generator=GENERATOR)
BIAS = torch.rand(9, generator=GENERATOR) / 2 - 0.25
CASES = [(SCORES, BIAS, 3, 1, 2, 2.5), (SCORES, BIAS, 3, 2, 3, 2.5)]
ROUTER = Exercise("route", _router_of_moe, CASES, {
    "uses the bias in the gates. The bias is for the choice only; the gates come from the scores "
    "without bias":
        lambda *case: _route(*case, gate_bias=1.0),
    "forgets the bias when it chooses":
        lambda scores, bias, *rest: _route(scores, 0 * bias, *rest),
    "forgets the node limit. Only experts of the best groups may be chosen":
        lambda scores, bias, groups, limited, k, scale: _route(scores, bias, groups, groups, k,
                                                               scale),
    "judges a group by its best expert. V3 takes the sum of the two best":
        lambda *case: _route(*case, best=1),
    "judges a group by all its experts. V3 takes the sum of the two best":
        lambda *case: _route(*case, best=99),
    "judges the groups without the bias": lambda *case: _route(*case, group_bias=0.0),
    "does not divide the gates by their sum": lambda *case: _route(*case, divide_by="nothing"),
    "divides by the scores of all experts. Only those of the chosen experts count":
        lambda *case: _route(*case, divide_by="all"),
    "forgets the factor `scale`": lambda *case: _route(*case[:-1], 1.0),
}, gradient={"scores": 0})

# ------------------------------------------------------------------------------
# The bias update


def _update_of_moe(bias, load, speed):
    """moe.update_routing_bias of one router."""
    router = moe.Router(moe.Config(n_routed_experts=len(bias), bias_speed=speed))
    router.bias, router.load = bias.clone(), load.clone()
    moe.update_routing_bias(router)
    return router.bias


BIASES, LOADS = torch.tensor([0.02, -0.01, 0.0, 0.03]), torch.tensor([5.0, 0.0, 2.0, 1.0])
STEPS_OF_BIAS = [(BIASES, LOADS, 0.1), (BIASES, 10 * LOADS, 0.01)]
UPDATE = Exercise("update_bias", _update_of_moe, STEPS_OF_BIAS, {
    "moves the biases in the wrong direction. An expert with too little load should be chosen "
    "more often":
        lambda bias, load, speed: _update_of_moe(bias, load, -speed),
    "returns the step alone. The result is the bias plus the step":
        lambda bias, load, speed: _update_of_moe(0 * bias, load, speed),
    "moves a bias in proportion to the difference from the mean. Only its sign counts":
        lambda bias, load, speed: bias + speed * (load.mean() - load),
    "moves a bias in proportion to the load over its mean. Only the sign of the difference counts":
        lambda bias, load, speed: bias + speed * (1 - load / load.mean()),
    "lowers the bias of an expert that has exactly the mean load. It should stay":
        lambda bias, load, speed: bias + torch.where(load < load.mean(), speed, -speed),
    "raises the bias of an expert that has exactly the mean load. It should stay":
        lambda bias, load, speed: bias + torch.where(load > load.mean(), -speed, speed),
    "only lowers biases. An expert with too little load gets a higher one":
        lambda bias, load, speed: bias - speed * (load > load.mean()),
    "only raises biases. An expert with too much load gets a lower one":
        lambda bias, load, speed: bias + speed * (load < load.mean()),
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


def _attend_of_moe(q, q_rope, latent, k_rope, w_uk, w_uv, scale):
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


def _makes_keys(function, case):
    """A sentence if a function makes every token's keys or values, else None."""
    _, _, latent, _, w_uk, w_uv, _ = case
    (H, D, _), V, S = w_uk.shape, w_uv.size(1), len(latent)
    with Sizes() as sizes:
        function(*_copied(case))
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
ABSORBED = Exercise("attend", _attend_of_moe, [(*TENSORS, (D + R) ** -0.5)], {
    "forgets the rotary part of the scores": lambda *case: attend(*case, rotary=0.0),
    "forgets the content part of the scores": lambda *case: attend(*case, content=0.0),
    "does not multiply the scores by scale": lambda *case: attend(*case[:-1], 1.0),
    "multiplies only the content by scale. It is for the sum of both parts":
        lambda *case: attend(*case, rotary=1 / case[-1]),
    "multiplies only the rotary part by scale. It is for the sum of both parts":
        lambda *case: attend(*case, content=1 / case[-1]),
    "takes the softmax over the heads. It should be over the tokens":
        lambda *case: attend(*case, softmax_over="heads"),
}, also=_makes_keys, gradient={"q": 0, "latent": 2})

# ------------------------------------------------------------------------------
# The reward

THOUGHT = "<think>25-7=18 check 18+7=25</think>"
TEXTS = [  # a response to 25-7, the right answer, and the sentence if the reward is wrong
    (f"{THOUGHT}<answer>18</answer>", "18", "does not pay for a plain right answer"),
    ("<answer>-5</answer>", "-5",
     "does not pay for a number below zero, or for an answer without thinking"),
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
    (f"{THOUGHT}so\nit is <answer>18</answer>", "18",
     "pays for a summary of two lines. [^<>0-9] accepts a new line too"),
    (f"{THOUGHT}\u0663<answer>18</answer>", "18",
     "pays for a digit that is not ASCII in the summary"),
    (f"{THOUGHT}<answer>18</answer>\n", "18",
     "pays for a new line after the answer. In a pattern, $ accepts it; fullmatch does not"),
    (f"{THOUGHT}{'so ' * 14}<answer>18</answer>", "18",
     "pays for a summary of more than forty characters"),
]


def _accuracy_of_tasks(text, answer):
    """tasks.accuracy of a response to a sum with this answer."""
    return tasks.accuracy(text, tasks.Problem("", answer, "en"))


REWARD = Exercise("accuracy", _accuracy_of_tasks, [(text, answer) for text, answer, _ in TEXTS],
                  hints=[hint for _, _, hint in TEXTS])

# ------------------------------------------------------------------------------
# Judging

EXERCISES = {"advantage": ADVANTAGE, "reward": REWARD, "kl": KL, "kimi": KIMI, "bias": UPDATE,
             "router": ROUTER, "absorbed": ABSORBED}


def _same(result, expected, tolerance=1e-4):
    """Whether two tensors agree up to a tolerance, relative and absolute; nan agrees with
    nan."""
    return result.shape == expected.shape and torch.allclose(
        result, expected, tolerance, tolerance, equal_nan=True)


def _copied(case):
    """The arguments of a case. A function may change its tensors; the case stays."""
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in case]


def _values(function, exercise):
    """What one of our functions returns for each case of an exercise, as float64."""
    return [torch.as_tensor(function(*_copied(case))).detach().double()
            for case in exercise.cases]


def _describe(error, file):
    """An error in a sentence: its type, the last line of the student's file that it went
    through, and its message."""
    frames = [x for x in traceback.extract_tb(error.__traceback__) if x.filename == file]
    where = f" in line {frames[-1].lineno}, `{frames[-1].line}`" if frames else ""
    message = textwrap.shorten(str(error).partition("\n")[0], 200, placeholder=" ...")
    return f"raises {type(error).__name__}{where}" + (f": {message}" if message else "")


def _call(exercise, function, case, file):
    """(the result of a student's function on a case, as a float64 tensor; whether it
    wrote into a tensor that it was given). Fault if it raises an error, or returns no
    tensor where r1mini returns one."""
    arguments = _copied(case)
    try:
        result = function(*arguments)
    except BaseException as error:  # sys.exit() and KeyboardInterrupt are errors here, too
        # torch raises this error as well, with a message.
        if isinstance(error, NotImplementedError) and not str(error):
            raise Fault("is not written yet") from None
        raise Fault(_describe(error, file)) from None
    if not isinstance(result, torch.Tensor):
        name = "None" if result is None else type(result).__name__
        if isinstance(exercise.right(*case), torch.Tensor):
            raise Fault(f"returns {name}. It should return a tensor")
        if not isinstance(result, numbers.Real):
            raise Fault(f"returns {name}. It should return a number")
        result = torch.tensor(float(result))
    changed = any(isinstance(before, torch.Tensor) and not torch.equal(before, after)
                  for before, after in zip(case, arguments))
    return result.detach().double(), changed


def _call_all(exercise, function, file):
    """What call() returns, for each case. Fault if a case has no result."""
    calls = []
    for i, case in enumerate(exercise.cases):
        try:
            calls.append(_call(exercise, function, case, file))
        except Fault as fault:
            if exercise.hints and i > 0:
                raise Fault(f"{fault}, for the text {case[0]!r}") from None
            raise
    return calls


def _gradients(exercise, function):
    """{name: gradient} of the arguments in exercise.gradient, for the first case. A gradient
    is None if nothing of the argument reaches the result."""
    arguments = _copied(exercise.cases[0])
    wanted = {name: arguments[i].requires_grad_() for name, i in exercise.gradient.items()}
    result = function(*arguments)
    if not result.requires_grad:
        return dict.fromkeys(wanted)
    # Each number of the result has another weight: a plain sum of gates would be constant.
    weight = torch.arange(1.0, 1 + result.numel()).view(result.shape)
    found = torch.autograd.grad((result * weight).sum(), wanted.values(), allow_unused=True)
    return dict(zip(wanted, found))


def _check_gradient(exercise, function, right, file):
    """Fault if a student's function that gives the right values has no gradient, or a wrong
    one."""
    if not exercise.gradient:
        return
    wanted = _gradients(exercise, right)
    try:
        found_of_argument = _gradients(exercise, function)
    except BaseException as error:  # such as .numpy() of a tensor with a gradient
        raise Fault("gives the right values, but once a gradient is wanted it "
                    f"{_describe(error, file)}") from None
    for name, found in found_of_argument.items():
        if found is None:
            raise Fault(f"gives the right values, but no gradient reaches `{name}`. Something "
                        "cuts it off: .detach(), .item(), .tolist(), torch.tensor() or "
                        "torch.no_grad(). In training nothing would be learnt")
        if not _same(found.double(), wanted[name].double()):
            raise Fault(f"gives the right values, but a wrong gradient for `{name}`. Is a part of "
                        f"it detached? For the first case the gradient is\n{found}\nIt should "
                        f"be\n{wanted[name]}")


def judge(exercise, function, file):
    """Compares a student's function, from this file, with r1mini's. Fault if it is wrong.
    Else a sentence if it is a usual variant, or ""."""
    expected = _values(exercise.right, exercise)
    results, changed = zip(*_call_all(exercise, function, file))

    def agrees(others, tolerance):
        return all(_same(a, b, tolerance) for a, b in zip(results, others))

    for sentence, variant in {"": exercise.right, **exercise.variants}.items():
        if agrees(_values(variant, exercise), 1e-4):
            if any(changed):
                raise Fault("gives the right result, but it changes its argument, which the caller "
                            "still needs. Write x = x - y instead of x -= y")
            if fault := exercise.also(function, exercise.cases[0]):
                raise Fault(fault)
            _check_gradient(exercise, function, variant, file)
            return sentence

    i = next(i for i in range(len(results)) if not _same(results[i], expected[i]))
    if results[i].shape != expected[i].shape:
        raise Fault(f"returns the shape {tuple(results[i].shape)}. It should be "
                    f"{tuple(expected[i].shape)}")
    for sentence, mistaken in exercise.mistakes.items():
        # Less exact, since a mistake and an epsilon may come together.
        if agrees(_values(mistaken, exercise), 1e-3):
            raise Fault(sentence)
    if exercise.hints:
        raise Fault(f"{exercise.hints[i]}: {exercise.cases[i][0]!r}")
    raise Fault(f"is wrong, and this is none of the usual mistakes. For the arguments\n"
                f"{exercise.cases[i]}\nit returns\n{results[i]}\nIt should return\n{expected[i]}")


# ------------------------------------------------------------------------------
# A student's file


def load(path, name):
    """The function of this name in a student's file. UserError if there is none."""
    try:
        text = path.read_text("utf-8-sig")  # some editors for Windows write a mark first
        if "\0" in text:
            raise ValueError
        code = compile(text, str(path), "exec")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: Python cannot read this line: "
                        f"{error.msg}") from None
    except ValueError:
        raise UserError(f"{path}: this is not text in UTF-8; save it with this encoding") from None
    names = {"__name__": f"exercise_{path.stem}", "__file__": str(path)}
    try:
        exec(code, names)
    except BaseException as error:  # it may call sys.exit(), too
        raise UserError(f"{path}: {_describe(error, str(path))}") from None
    if name not in names:
        raise UserError(f"{path}: there is no function {name} in this file")
    return names[name]


def verdict(name, folder):
    """(whether the function in FOLDER/NAME.py is right, a sentence about it)."""
    exercise, path = EXERCISES[name], Path(folder) / f"{name}.py"
    try:
        variant = judge(exercise, load(path, exercise.function), str(path))
    except UserError as error:
        return False, str(error)
    except Fault as fault:
        return False, f"your function {fault}"
    return True, f"right. Your function {variant}" if variant else "right"
