"""How can long answers be made short again?

The paper: four ways (Kimi k1.5 section 2.4). RL is best. On AIME 2024, 60.8% of its answers
are right, with 3,272 tokens on average (section 3.4). The long model has 63.3% with 4,199
tokens (Figure 7).

    python r1mini.py study long2short

The study trains its own base. Half of the checked workings in its corpus check every step.
The other half check a step with chance 0.3. So an answer can be shorter and still have
checks. Eight models are tested:

    long             the base after RL
    short            the base after SFT on 400 right workings without checks
    merge            the mean of the weights of long and short
    shortest         long after SFT on the shortest right one of its own 8 answers to each problem
    merge_shortest   the same SFT, starting from merge, as in the paper's figure
    random           long after SFT on a random right one of its own 8 answers: the control
    dpo              long after DPO. The shortest right answer is chosen. Longer wrong answers
                     are rejected, and right ones that are more than 1.5 times as long
    rl               long after more RL, with the length reward and a lower limit on tokens
"""
import dataclasses
import random
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F

import moe
import tasks
from engine.devices import copy_model
from engine.errors import UserError
from engine.evaluate import prompts_of, repeat_for_answers, sample_answers
from engine.sampling import pad_right
from grpo import logprobs
from r1mini import draw_problem, make_task, one_of, rl, rule_rewards, supervised, train
from tools.compare import compare
from tools.figures import Picture, arms_panel
from tools.study import start_folder, test_numbers, train_in_memory
from tools.tables import cell, table

SEEDS = range(3)
SETTINGS = "zero.objective=kimi", "dev1.steps=40", "eval.longer=1", "data.prompts=8"
STAGES = "full_base", "long", "short"
ARMS = dict.fromkeys(("long", "short", "merge", "shortest", "merge_shortest", "random",
                      "dpo", "rl"), "")
DIFFERENCES = {f"{arm}.minus_long.pass@1": (f"{arm}.pass@1", "long.pass@1")
               for arm in ARMS if arm != "long"}
CHECK_CHANCES = (0.3, 1.0)   # of a step, in the two lengths of checked working
PROBLEMS, SAMPLES = 400, 8   # that a model answers to learn from itself
DPO_BETA, DPO_LR = 2.0, 3e-4  # chosen on dev; Kimi publishes neither
LONGER = 1.5                 # times the chosen answer's length; right answers above are rejected
RL_PHASE = {"steps": 16, "lr": 2e-4, "length_weight": 0.3, "max_new_tokens": 70}
# Tokens and percent right in Kimi's Figure 7: MATH-500, AIME 2024. In that figure the shortest
# answers are learnt from after the merge only.
FIGURE_7 = {"long": "1,320 / 94.1, 4,199 / 63.3", "rl": "1,197 / 94.6, 3,257 / 60.8",
            "dpo": "1,102 / 91.6, 3,109 / 47.1", "merge_shortest": "901 / 90.2, 3,022 / 42.9",
            "merge": "856 / 89.2, 3,128 / 39.0", "short": "644 / 88.2, 1,440 / 25.9"}


# ------------------------------------------------------------------------------
# The long model and the short one


def _start_models(folder, arm):
    """(long, short): the models of a seed. They are trained once, in a folder that the arms
    share."""
    run, start = folder.run, start_folder(folder, arm, STAGES)

    def draw(rng):
        chance = rng.choice(CHECK_CHANCES)
        return tasks.make_document(rng, dataclasses.replace(run.corpus, check_chance=chance))

    torch.manual_seed(run.seed)
    base = supervised(start, "full_base", start.place(moe.Transformer(run.model)), run.base, draw)
    long = rl(start, "long", {"full_base": base}, "full_base", run.zero)
    rng, documents = random.Random(f"{run.seed}/short"), []
    for _ in range(PROBLEMS):
        problem = draw_problem(rng, run, run.zero.levels)
        thinking, answer = tasks.write_working(problem, "steps", rng)
        documents.append(tasks.dialogue(problem, tasks.response(thinking, answer)))
    short = supervised(start, "short", base, run.dev1, one_of(documents))
    return long, short


def _merge(model, other):
    """A model with the mean of two models' weights."""
    merged, other_weights = copy_model(model), other.state_dict()
    mean = {name: (weight + other_weights[name]) / 2
            for name, weight in model.state_dict().items()}
    merged.load_state_dict(mean)
    return merged


# ------------------------------------------------------------------------------
# Learning from one's own short answers


def _own_answers(model, run):
    """[(problem, [(token ids, whether it is right) of each answer])], shortest answers first."""
    rng = random.Random(f"{run.seed}/own")
    problems = [draw_problem(rng, run, run.zero.levels) for _ in range(PROBLEMS)]
    problem_of_answer = repeat_for_answers(problems, SAMPLES)
    ids = sample_answers(model, prompts_of(problem_of_answer), run.zero.max_new_tokens,
                         run.eval.rows, seed=run.seed)
    groups = []
    for i, problem in enumerate(problems):
        answers = sorted(ids[i * SAMPLES:(i + 1) * SAMPLES], key=len)
        groups.append((problem, [(answer, tasks.accuracy(tasks.decode(answer), problem) == 1.0)
                                 for answer in answers]))
    return groups


def _imitate(model, run, choose):
    """(a model after SFT on one of its own right answers to each problem, the mean tokens of these
    answers and the share with a check). choose: picks one of several, the shortest is first."""
    documents, chosen = [], []
    for problem, answers in _own_answers(model, run):
        right = [answer for answer, is_right in answers if is_right]
        if right:
            chosen.append(choose(right))
            documents.append(tasks.dialogue(problem, tasks.decode(chosen[-1])))
    tuned = _after(model, run.dev1, documents, run.seed)
    checks = [tasks.reflects(tasks.decode(answer)) for answer in chosen]
    return tuned, {"learnt_length": fmean(map(len, chosen)), "learnt_checks": fmean(checks)}


def _shortest(model, run):
    """The model and the numbers of _imitate, with the shortest right answers."""
    return _imitate(model, run, lambda right: right[0])


def _random(model, run):
    """The same with a random right answer to each problem."""
    return _imitate(model, run, random.Random(f"{run.seed}/random").choice)


def _after(model, s, examples, seed, **loss):
    """A copy of a model after supervised training on some examples, in memory."""
    if not examples:
        raise UserError("long2short: no answer is right, so there is nothing to learn from")
    model = copy_model(model)
    for _ in train(model, s, one_of(examples), seed, **loss):
        pass
    return model


@dataclass
class Pair:
    """Two answers to one question, as DPO learns from them."""
    tokens: list[int]        # question and chosen answer
    worse: list[int]         # question and rejected answer
    prompt_length: int       # tokens of the question
    worse_is_right: bool     # the rejected answer is right, but long


def _pairs_of(groups):
    """The Pairs of _own_answers (Kimi k1.5 section 2.4). The shortest right answer is chosen.
    Longer wrong ones are rejected, and right ones of more than LONGER times its length.

    A shorter wrong answer makes no pair. It would teach that longer answers are better."""
    pairs = []
    for problem, answers in groups:
        right = [answer for answer, is_right in answers if is_right]
        if not right:
            continue
        chosen, question = right[0], tasks.encode_prompt(problem.question)
        for answer, is_right in answers:
            limit = LONGER * len(chosen) if is_right else len(chosen)
            if len(answer) > limit:
                pairs.append(Pair(question + chosen, question + answer, len(question), is_right))
    return pairs


def _dpo_loss(reference):
    """DPO's loss (arXiv 2305.18290, eq 7): the mean over pairs of
    -log sigmoid(beta (log ratio of the chosen answer - log ratio of the rejected answer))."""
    def log_ratio(model, sequences, pairs):
        """(n,) log policy / reference of whole answers."""
        tokens = pad_right(sequences, tasks.PAD_ID, model.device)                        # (n, T)
        column = torch.arange(tokens.size(1), device=tokens.device)                      # (T,)
        begin = torch.tensor([[pair.prompt_length] for pair in pairs], device=tokens.device)
        end = torch.tensor([[len(ids)] for ids in sequences], device=tokens.device)      # (n, 1)
        real = column < end                                                              # (n, T)
        in_answer = real & (column >= begin)                                             # (n, T)
        new, _ = logprobs(model, tokens, in_answer, real)
        with torch.no_grad():
            old, _ = logprobs(reference, tokens, in_answer, real)
        return (new - old).sum(1)

    def loss(model, pairs, step_pairs):
        chosen = log_ratio(model, [pair.tokens for pair in pairs], pairs)                # (n,)
        rejected = log_ratio(model, [pair.worse for pair in pairs], pairs)               # (n,)
        summed = -F.logsigmoid(DPO_BETA * (chosen - rejected)).sum()                     # eq 7
        pass_loss = summed / len(step_pairs)
        return pass_loss, pass_loss.detach()
    return loss


def _dpo(model, run):
    """(a model after DPO on pairs of its own answers, how many pairs there are and in how many of
    them the rejected answer is right)."""
    s = dataclasses.replace(run.dev1, documents=32, lr=DPO_LR, muon_lr=0.0)
    pairs = _pairs_of(_own_answers(model, run))
    tuned = _after(model, s, pairs, run.seed, loss=_dpo_loss(copy_model(model).eval()))
    return tuned, {"pairs": len(pairs), "pairs_right": sum(pair.worse_is_right for pair in pairs)}


def _more_rl(model, run):
    """A model after RL with the length reward and a smaller limit on length, on new problems."""
    s = dataclasses.replace(run.zero, **RL_PHASE)
    other_run = dataclasses.replace(run, seed=run.seed + 1000)
    return train_in_memory(model, make_task(run, s, rule_rewards(s)), s, other_run)[0]


# ------------------------------------------------------------------------------


def measure_arm(arm, folder):
    """The numbers of an arm on test."""
    run, (long, short) = folder.run, _start_models(folder, arm)
    make_model = {
        "long": lambda: (long, {}),
        "short": lambda: (short, {}),
        "merge": lambda: (_merge(long, short), {}),
        "shortest": lambda: _shortest(long, run),
        "merge_shortest": lambda: _shortest(_merge(long, short), run),
        "random": lambda: _random(long, run),
        "dpo": lambda: _dpo(long, run),
        "rl": lambda: (_more_rl(long, run), {})}
    model, facts = make_model[arm]()
    return test_numbers(model, run) | facts


def combine(numbers):
    """pass@1 and tokens of the methods."""
    return {f"long2short.{arm}.{name}": numbers[f"{arm}.{key}"]
            for arm in ("merge", "shortest", "merge_shortest", "dpo", "rl")
            for key, name in (("pass@1", "pass@1"), ("length", "tokens"))}


NAMES = {"long": "the long model", "rl": "RL with the length reward", "dpo": "DPO",
         "shortest": "SFT on the shortest right answer", "random": "SFT on a random right answer",
         "merge_shortest": "merge, then SFT on the shortest", "merge": "merge",
         "short": "the short model"}


def picture(rows):
    """Tokens and pass@1 of all arms. The titles compare SFT after the merge with the long model."""
    names = {"long": "long model", "rl": "RL, length reward", "dpo": "DPO",
             "shortest": "SFT, shortest", "random": "SFT, random", "merge": "merge",
             "merge_shortest": "merge, then SFT", "short": "short model"}
    long, both = (rows[f"{arm}.length"]["mean"] for arm in ("long", "merge_shortest"))
    right, right_long = (rows[f"{arm}.pass@1"]["mean"] for arm in ("merge_shortest", "long"))
    return Picture([arms_panel(f"Merge, then SFT:\n{both / long - 1:+.0%} tokens", rows, names,
                               "length", "tokens in an answer", percent=False),
                    arms_panel(f"{right:.0%} right,\nthe long model {right_long:.0%}", rows,
                               names, "pass@1", "correct answers")],
                   "test problems, temperature 1; a dot is a seed, a line the mean")


def page(rows, notes):
    """The lines of the report: accuracy and tokens of the arms, beside Kimi's Figure 7, and each
    against the long model."""
    columns = {"length": "tokens", "pass@1": "pass@1", "reflection": "answers with a check",
               "learnt_length": "tokens of what it learnt from", "learnt_checks": "with a check",
               "pairs": "pairs", "pairs_right": "with a right answer rejected"}
    body = [[name, *(cell(rows, f"{arm}.{key}") for key in columns), FIGURE_7.get(arm, "")]
            for arm, name in NAMES.items()]
    lines = [*table(["arm", *columns.values(), "Kimi's tokens / accuracy: MATH-500, AIME"], body),
             ""]
    for arm, name in NAMES.items():
        comparison = compare(rows, "long.pass@1", f"{arm}.pass@1")
        if arm != "long" and comparison:
            lines.append(f"- {name}, minus the long model: {comparison.text(points=True)}")
    return lines
