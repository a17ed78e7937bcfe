"""Does RL need a value network?

The paper: GRPO has none. PPO, which has one, equals GRPO only if lambda of its generalised
advantage estimate (GAE) is 1.0, and is clearly worse with 0.95 (R1 v2 section A.3, Figure 4).
Kimi k1.5 leaves values out, since they would punish a wrong step that is corrected later
(section 2.3.2).

    python r1mini.py study critic

All arms start from the same kept base and generate equally many tokens:

    grpo      Zero's default: the advantage of an answer is its reward relative to its group
    gae1      PPO with lambda 1: the reward that follows a token, minus the value before it
    gae095    PPO with lambda 0.95: later values take part too. The further away the reward is,
              the less it counts

PPO adds to GRPO's loop:

    values    before each token, the value network predicts the reward that will follow
    reward    the answer's reward at its last token, and minus beta KL at each token
    compare   the advantage of each token by GAE, normalised over the rollout
    improve   clipped ratios for the policy, squared errors for the value network

What else differs between the arms:
- In PPO's first rollouts only the value network learns. These tokens count towards the budget.
- GRPO does not train on groups of equal rewards. PPO trains on all answers.
- GRPO's loss is a mean over the answers, PPO's over the tokens of a minibatch.
- GRPO's KL is in the loss, PPO's in the reward.
- PPO takes over Zero's settings, which were chosen for GRPO. This favours GRPO.
- The seconds of a rollout depend on the groups that GRPO skips. The optimizer of the value network
  is Muon, which keeps one number for a weight; Adam would keep two.

With lambda 1 the advantage at a wrong step is the reward that follows minus the value before the
step. The fall of the value at the step itself does not count. So Kimi's argument is about smaller
lambdas.
"""
import random
import re
import time
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grpo
import moe
import tasks
from engine.devices import copy_model
from engine.evaluate import evaluate
from engine.optim import learning_rate_at, make_optimizers, micro_batches, optimizer_update
from grpo import Batch, RolloutPart, clipped_surrogate, logprobs, make_rollout
from r1mini import make_task, rule_rewards
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import load_kept, test_numbers
from tools.tables import cell, table

SEEDS = range(6)
SETTINGS, STAGES = ("eval.samples=8", "zero.dev_every=2"), ()
LAMBDAS = {"gae1": 1.0, "gae095": 0.95}
ARMS = dict.fromkeys(("grpo", *LAMBDAS), "")
DIFFERENCES = {f"critic.{arm}.minus_grpo.pass@1": (f"{arm}.pass@1", "grpo.pass@1")
               for arm in LAMBDAS}
# What the first result of a wrong step, corrected later, gets beside that of a right step.
DIFFERENCES |= {f"critic.{arm}.wrong_minus_right.{key}": (f"{arm}.credit.wrong.{key}",
                                                          f"{arm}.credit.right.{key}")
                for arm in LAMBDAS for key in (arm, "value_change")}
BUDGET = 650_000   # tokens that an arm generates: about as many as Zero's 24 rollouts
WARM_UP = 4        # rollouts in which only the value network learns; from a trial, one seed
VALUE_LR = 5e-3    # learning rate of the value network: that of the reward models
LIMIT = 0.85       # pass@1 on dev


# ------------------------------------------------------------------------------
# Values and advantages


def _value_network(folder, base):
    """A network that starts as the base, with a head of one output that starts at 0."""
    config = replace(base.config, n_outputs=1, n_mtp_layers=0)
    network = folder.place(moe.Transformer(config))
    weights = {key: weight for key, weight in base.state_dict().items()
               if not key.startswith(("head.", "mtp."))}
    network.load_state_dict(weights, strict=False)
    nn.init.zeros_(network.head.weight)
    return network


def _values(network, tokens, answer, real):
    """The value before each answer token (N, T), and 0 elsewhere: the reward that the network
    expects, given all tokens before this one."""
    before = F.pad(answer[:, 1:], (0, 1))  # True at t if token t + 1 is of the answer
    values = network(tokens, real, logits_at=before).logits.squeeze(-1)    # (answer tokens,)
    return torch.zeros(tokens.shape, device=tokens.device).masked_scatter(answer, values)


def _token_rewards(rewards, old, reference, answer, beta):
    """The reward of each token (N, T). Each answer token costs beta times an estimate of
    KL(policy || reference). The last one also gets the answer's reward, of rewards (N,)."""
    token_rewards = -beta * (old - reference) * answer                     # k1 = log(old / ref)
    last = answer.cumsum(1).argmax(1, keepdim=True)                        # (N, 1)
    return token_rewards.scatter_add(1, last, rewards.unsqueeze(1))


def _gae(rewards, values, answer, lam):
    """Generalised advantage estimates (arXiv 1506.02438, eq 16) with gamma 1, all (N, T):

        delta_t = r_t + V_(t+1) - V_t
        A_t = delta_t + lambda delta_(t+1) + lambda^2 delta_(t+2) + ...

    V is 0 after the last token. With lambda 1 the sum is the reward from t on, minus V_t.
    """
    advantages = torch.zeros_like(values)
    A = next_value = torch.zeros_like(values[:, 0])                        # (N,)
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + next_value - values[:, t]
        A = (delta + lam * A) * answer[:, t]  # 0 outside the answer
        advantages[:, t] = A
        next_value = values[:, t]             # 0 outside the answer
    return advantages


def _normalised(advantages, answer):
    """Advantages (N, T) with mean 0 and standard deviation 1 over all answer tokens."""
    std, mean = torch.std_mean(advantages[answer])
    return (advantages - mean) / std.clamp(min=1e-6) * answer


@dataclass
class Judged:
    """What PPO learns from, each (N, T)."""
    values: Tensor       # V_t before each answer token
    targets: dict        # name in LAMBDAS -> the target of V_t: A_t + V_t
    advantages: dict     # name in LAMBDAS -> A_t, normalised


@torch.no_grad()
def _judge(rollout, network, reference, s):
    """The values and advantages of a rollout. Both lambdas are computed, for the comparison of
    corrected steps; each arm learns from its own."""
    samples, lengths = rollout.samples, _lengths(rollout.samples)
    values, reference_logp = (torch.zeros_like(samples.logprobs) for _ in range(2))
    for rows in micro_batches(lengths, range(len(lengths)), 4 * s.micro_tokens):
        part = RolloutPart(rollout, rows, lengths)
        T = part.tokens.size(1)
        values[rows, :T] = _values(network, part.tokens, part.mask, part.real)
        reference_logp[rows, :T], _ = logprobs(reference, part.tokens, part.mask, part.real,
                                               s.temperature)
    answer_rewards = rollout.rewards.flatten().to(values.device)                    # (N,)
    rewards = _token_rewards(answer_rewards, samples.logprobs, reference_logp, samples.answer,
                             s.beta)                                                # (N, T)
    advantages = {name: _gae(rewards, values, samples.answer, lam)
                  for name, lam in LAMBDAS.items()}
    return Judged(values, {name: A + values for name, A in advantages.items()},
                  {name: _normalised(A, samples.answer) for name, A in advantages.items()})


def _lengths(samples):
    """The number of tokens of each prompt and its answer: N numbers."""
    # The number of answer tokens so far is largest, for the first time, at the last of them.
    return (samples.answer.cumsum(1).argmax(1) + 1).tolist()


# ------------------------------------------------------------------------------
# PPO's updates


def _improve(arm, policy, network, optimizers, rollout, judged, s, rng, progress, learnt):
    """The updates of PPO on one rollout. optimizers: (the policy's, the value network's). learnt:
    the number of rollouts from which the policy has learnt. It is below 0 in the warm-up.

    In the warm-up the policy stays, and the targets of the values are the rewards that really
    followed. With lambda 0.95 the targets contain the values themselves, which still are
    meaningless.
    """
    samples, lengths, warm = rollout.samples, _lengths(rollout.samples), learnt < 0
    advantages, targets = judged.advantages[arm], judged.targets["gae1" if warm else arm]
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    for m in range(s.minibatches):
        minibatch = rows[m::s.minibatches]
        batch = Batch(len(minibatch), int(samples.answer[minibatch].sum()))
        for pass_rows in micro_batches(lengths, minibatch, s.micro_tokens):
            part = RolloutPart(rollout, pass_rows, lengths)
            T = part.tokens.size(1)
            values = _values(network, part.tokens, part.mask, part.real)         # (n, T)
            error = values - targets[pass_rows, :T]
            (0.5 * error.square() * part.mask).sum().div(batch.tokens).backward()
            if not warm:
                new, _ = logprobs(policy, part.tokens, part.mask, part.real, s.temperature)
                ratio = (new - part.old).exp()                                   # (n, T)
                surrogate, _ = clipped_surrogate(ratio, advantages[pass_rows, :T], s)
                (-(surrogate * part.mask).sum() / batch.tokens).backward()
        optimizer_update(network, optimizers[1])
        if not warm:
            # The rate rises with the policy's own updates, and falls with the tokens.
            rising = learning_rate_at(learnt * s.minibatches + m, 1, s.warmup, 0)
            falling = learning_rate_at(progress * s.minibatches + m, s.steps * s.minibatches, 0,
                                       s.decay)
            optimizer_update(policy, optimizers[0], min(rising, falling))


# ------------------------------------------------------------------------------
# Kimi's argument: which advantage does a wrong step get that is corrected later?

CHECK, WAIT = (f" ?(?:{'|'.join(words[name].strip() for words in tasks.WORDS.values())}) ?"
               for name in ("check", "wait"))
STEP = re.compile(r"(?<!\d)(\d+)([-+])(\d+)=(-?\d+)")
# 25-7=17 check 17+7=24 wait 25-7=18
CORRECTED = re.compile(rf"(?<!\d)(\d+[-+]\d+)=(-?\d+){CHECK}[-+=\d]*{WAIT}\1=(-?\d+)")


def _result_spans(text):
    """(wrong, right): where in a text the results of steps stand. wrong are those of wrong steps
    that are corrected later, right are those of right steps. Checks and corrections are neither:
    what they result in is nearly certain, so their values hardly change."""
    wrong, right = [], []
    for match in STEP.finditer(text):
        a, sign, b, result = match.groups()
        right_result = tasks.apply_operation(int(a), sign, int(b))
        corrected = CORRECTED.match(text, match.start())
        is_first_try = not re.search(f"({CHECK}|{WAIT})$", text[:match.start()])
        if int(result) == right_result:
            if is_first_try:
                right.append(match.span(4))
        elif corrected and int(corrected[3]) == right_result:
            wrong.append(match.span(4))
    return wrong, right


@dataclass
class Credit:
    """Sums over right answers with a corrected step: the advantages at the results of their wrong
    and right steps, and how much a result changes the value."""
    sums: dict = field(default_factory=dict)   # name -> (sum, number of results)

    def add(self, rollout, judged):
        """Adds the answers of a rollout."""
        group_advantages = rollout.advantages.flatten()
        for row, ids in enumerate(rollout.samples.answers()):
            wrong, right = _result_spans(tasks.decode(ids))
            if not wrong or rollout.reward_parts["accuracy"][row] != 1.0:
                continue
            begin = int(rollout.samples.answer[row].int().argmax())
            column_of_letter = []  # the column of the token that each letter of the text is in
            for i, token in enumerate(ids):
                column_of_letter += [begin + i] * len(tasks.ENCODING.decode([token]))
            for name, spans in (("wrong", wrong), ("right", right)):
                for low, high in spans:
                    columns = column_of_letter[low:high]
                    self.count(f"{name}.grpo", float(group_advantages[row]))
                    for lam, advantages in judged.advantages.items():
                        self.count(f"{name}.{lam}", float(advantages[row, columns].mean()))
                    values = judged.values[row]
                    change = float(values[columns[-1] + 1] - values[columns[0]])
                    self.count(f"{name}.value_change", change)

    def count(self, name, value):
        """Adds a value to a sum."""
        total, n = self.sums.get(name, (0.0, 0))
        self.sums[name] = total + value, n + 1

    def means(self):
        """{name: mean}, and how many wrong steps there were."""
        means = {f"credit.{name}": total / n for name, (total, n) in self.sums.items()}
        return means | {"credit.steps": self.sums.get("wrong.grpo", (0, 0))[1]}


# ------------------------------------------------------------------------------
# The arms


def _train(arm, policy, network, task, s, run):
    """Trains the policy, and for PPO the value network, until BUDGET tokens are generated. The
    policy's learning rate follows the share of tokens that are generated. Returns (log, {step:
    pass@1 on dev}, Credit, the last rollout, the optimizers)."""
    optimizers = make_optimizers(policy, s.lr), make_optimizers(network, VALUE_LR, VALUE_LR)
    reference = copy_model(policy).eval()
    problems = tasks.make_problems("dev", run.eval.dev_problems, s.levels, run.corpus.products)
    log, on_dev, credit, spent = [], {}, Credit(), 0
    while spent < BUDGET:
        step, progress = len(log), s.steps * spent / BUDGET
        rng, began = random.Random(f"{run.seed}/rl/{step}"), time.monotonic()
        rollout = make_rollout(policy, task, s, rng, step)
        policy.train()
        record = {"tokens": int(rollout.samples.answer.sum())}
        if arm == "grpo":
            grpo.improve(policy, reference, optimizers[0], rollout, s, rng, progress)
        else:
            judged = _judge(rollout, network.eval(), reference, s)
            network.train()
            _improve(arm, policy, network, optimizers, rollout, judged, s, rng, progress,
                     learnt=step - WARM_UP)
            record["explained"] = _explained(judged, rollout.samples.answer)
        record["seconds"] = time.monotonic() - began
        if (step + 1) % s.reference_every == 0:
            reference.load_state_dict(policy.state_dict())
        if arm != "grpo" and step >= WARM_UP:
            credit.add(rollout, judged)
        log.append(record)
        spent += record["tokens"]
        if (step + 1) % s.dev_every == 0:
            means, _ = evaluate(policy, problems, run.eval.samples, 1.0, 1.0, s.max_new_tokens,
                                run.eval.rows)
            on_dev[step + 1] = means["pass@1"]
            print(f"{arm}, rollout {step + 1}: {means['pass@1']:.3f} on dev, "
                  f"{spent:,} of {BUDGET:,} tokens", flush=True)
    return log, on_dev, credit, rollout, optimizers


def _explained(judged, answer):
    """1 - Var(reward that follows - value) / Var(reward that follows). It is 1 if the values
    predict all, and at most 0 if they predict nothing."""
    targets, values = judged.targets["gae1"][answer], judged.values[answer]
    return 1 - float((targets - values).var() / targets.var().clamp(min=1e-9))


def _megabytes(rollout, networks, optimizers, s):
    """{name: megabytes}: of the weights of all networks, of the optimizers' states, and of the
    activations. networks: the policy, its reference, and in PPO the value network."""
    policy, _, *critic = networks
    weights = [p for network in networks for p in network.parameters()]
    states = [x for pair in optimizers for optimizer in pair
              for state in optimizer.state.values() for x in state.values()]
    lengths = _lengths(rollout.samples)
    passes = micro_batches(lengths, range(len(lengths)), s.micro_tokens)
    largest = max(passes, key=lambda rows: len(rows) * lengths[rows[-1]])
    part = RolloutPart(rollout, largest, lengths)
    activations = [_kept_bytes(logprobs, policy, part)]
    activations += [_kept_bytes(_values, network, part) for network in critic]
    return {"mb.weights": sum(p.numel() * p.element_size() for p in weights) / 1e6,
            "mb.optimizer": sum(x.numel() * x.element_size() for x in states) / 1e6,
            # _improve() ends one network's backward pass before the other's forward pass.
            "mb.activations": max(activations) / 1e6}


def _kept_bytes(forward, network, part):
    """The bytes that a forward pass on a part of a rollout keeps for its backward pass. forward:
    logprobs or _values."""
    storages = {}  # by address, since several operations may keep the same tensor

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    network.eval()  # in training it also computes the balance loss, which RL does not use
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        forward(network, part.tokens, part.mask, part.real)
    for p in network.parameters():
        storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


def measure_arm(arm, folder):
    """The numbers of an arm: on test, on dev and when it reaches LIMIT there, its costs, and the
    advantages of corrected steps."""
    run, s = folder.run, folder.run.zero
    policy = load_kept(folder, "base")
    network = _value_network(folder, policy)
    task = make_task(run, s, rule_rewards(s))
    log, on_dev, credit, rollout, optimizers = _train(arm, policy, network, task, s, run)
    numbers = test_numbers(policy, run) | {f"dev{step}": x for step, x in on_dev.items()}
    steps_above = [step for step, share in on_dev.items() if share >= LIMIT]
    # The mean over seeds of rollouts_to_85 leaves out the seeds that never reach it.
    numbers["reaches_85"] = float(bool(steps_above))
    if steps_above:
        numbers["rollouts_to_85"] = min(steps_above)
        numbers["tokens_to_85"] = sum(record["tokens"] for record in log[:min(steps_above)])
    after_warm_up = log[WARM_UP:] or log  # PPO's others have no update of the policy
    numbers |= {"rollouts": len(log), "generated": sum(record["tokens"] for record in log),
                "seconds": fmean(record["seconds"] for record in after_warm_up)}
    networks = [policy, policy]  # the reference policy is as large
    if arm != "grpo":
        networks.append(network)
        numbers["explained"] = fmean(r["explained"] for r in log[len(log) // 2:])
        numbers |= credit.means()
    return numbers | _megabytes(rollout, networks, optimizers[:len(networks) - 1], s)


NAMES = {"grpo": "GRPO", "gae1": "PPO, lambda 1", "gae095": "PPO, lambda 0.95"}


def picture(rows):
    """pass@1 of the arms on test, and how well the values predict."""
    points = [100 * (rows[f"{arm}.pass@1"]["mean"] - rows["grpo.pass@1"]["mean"])
              for arm in LAMBDAS]
    return Picture([arms_panel(f"PPO minus GRPO:\n{points[0]:+.1f} points,", rows, NAMES, "pass@1",
                               "correct answers"),
                    arms_panel(f"with lambda 0.95\n{points[1]:+.1f}", rows, NAMES, "explained",
                               "variance explained by the values")],
                   "test problems, temperature 1, equal tokens; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: the arms, their curves on dev, the advantages of corrected steps,
    and each arm against GRPO."""
    columns = {"pass@1": "pass@1", "reaches_85": "share of seeds that reach 85% on dev",
               "rollouts_to_85": "rollouts until then", "tokens_to_85": "tokens until then",
               "rollouts": "rollouts in all", "length": "tokens an answer",
               "seconds": "seconds a rollout",
               "mb.weights": "weights, MB", "mb.optimizer": "optimizer, MB",
               "mb.activations": "activations, MB",
               "explained": "variance explained by the values"}
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm, name in NAMES.items()]
    lines = [*table(["arm", *columns.values()], body), ""]
    steps = sorted(int(key.removeprefix("grpo.dev")) for key in rows if key.startswith("grpo.dev"))
    body = [[name, *(cell(rows, f"{arm}.dev{step}") for step in steps)]
            for arm, name in NAMES.items()]
    lines += [*table(["on dev after rollout", *map(str, steps)], body), ""]
    for arm in LAMBDAS:
        columns = NAMES | {"value_change": "change of the value"}
        body = [[f"{kind} step", *(cell(rows, f"{arm}.credit.{kind}.{key}") for key in columns)]
                for kind in ("wrong", "right")]
        lines += ["Advantages in right answers with a corrected step, values of "
                  f"{NAMES[arm]}:", "",
                  *table(["result of a", *columns.values()], body), ""]
    for arm in LAMBDAS:
        comparison = compare(rows, "grpo.pass@1", f"{arm}.pass@1")
        if comparison:
            lines.append(f"- {NAMES[arm]}, minus GRPO: {comparison.text(points=True)}")
        for key, name in ((arm, "advantage"), ("value_change", "change of the value")):
            credit = compare(rows, f"{arm}.credit.right.{key}", f"{arm}.credit.wrong.{key}")
            if credit:
                lines.append(f"- {NAMES[arm]}, {name}, wrong step minus right step: "
                             f"{credit.text()}")
    return lines
