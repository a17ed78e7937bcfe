"""Can a model read texts that are longer than those it has learnt from?

The paper: V3 is pretrained on 4,096 tokens. YaRN and 2,000 more steps, first with texts of 32K
tokens and then of 128K, make it read 131,072 (V3 section 4.3). YaRN has three rules:

    fast frequencies    of the rotary part, which turn often within a text, stay as they are
    slow frequencies    are divided by s, the factor of the extension, so that angles
                        stay in the range of the training
    softmax scale       is multiplied by m^2, since more tokens share the attention

    python r1mini.py study yarn

A needle is a sum that is stated far back in a text:

    the weather is fine and nothing happened
    remember that the sum of the day is
    25-7+9
    the weather is fine and nothing happened
    what was the sum of the day

The kept base is trained further, on rows of 512 tokens with needles in them. Then four arms look
for needles of the test part in texts of up to 8,192 tokens:

    nothing      this base as it is
    continued    after a short training on rows of 2,048 tokens, with the usual positions
    before       with YaRN, but without that training
    yarn         with YaRN, and then the training of `continued`: the same documents and steps

The factor s is 8,192 / 512 = 16. It comes from the longest text of the test, and not from that of
the training. V3 also keeps one factor, s = 40, in both of its trainings.

To find a needle is not yet to compute it. So we also count the needles that are found: the first
step of the solution begins with the operands of the sum.
"""
import math
import random
from dataclasses import replace
from statistics import fmean

import torch
import torch.nn.functional as F

import moe
import tasks
from r1mini import train
from tools.compare import compare
from tools.figures import Panel, Picture
from tools.study import load_kept, start_folder
from tools.tables import cell, table

SETTINGS, STAGES = ("base.steps=200", "base.documents=32", "base.lr=4e-3", "base.muon_lr=4e-3",
                    "base.row_tokens=512"), ("needle_base",)
ARMS = dict.fromkeys(("nothing", "continued", "before", "yarn"), "")
EXTENSION = {"steps": 30, "documents": 16, "lr": 3e-3, "muon_lr": 3e-3, "warmup": 3}
ORIGINAL, EXTENDED = 512, 2048              # tokens of a row in the two trainings
LENGTHS = (512, 1024, 2048, 4096, 8192)     # tokens of the texts in the test
DEPTHS = (0, 25, 50, 75, 100)               # percent of the weather that stands before the sum
PROBLEMS = 20                               # of each length and depth
LEVEL = 2                                   # operations of a sum
EQUALS = tasks.ENCODING.encode_single_token("=")
# In brackets: V3's values.
FACTOR = LENGTHS[-1] / ORIGINAL             # s [40]
ALPHA, BETA = 1, 32                         # turns of a slow and of a fast frequency [1, 32]
DIFFERENCES = {f"yarn_minus_{arm}.needle@{length}":
               (f"yarn.needle@{length}", f"{arm}.needle@{length}")
               for arm in ("continued", "before") for length in (EXTENDED, LENGTHS[-1])}


# ------------------------------------------------------------------------------
# YaRN


def _yarn_frequencies(width, theta, original, factor):
    """YaRN's rotary frequencies (width / 2,), as in V3's code. original: the length before the
    extension, in tokens.

    A frequency that makes more than BETA turns within the original length stays. One that makes
    fewer than ALPHA is divided by the factor. Between the two is a linear ramp.
    """
    index = torch.arange(width // 2, dtype=torch.float32)
    frequency = theta ** (-2 * index / width)

    def index_of(turns):
        """The index, with a fraction, at which a frequency makes so many turns."""
        return width * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(index_of(BETA)), 0)
    high = min(math.ceil(index_of(ALPHA)), width - 1)
    ramp = ((index - low) / (high - low)).clamp(0, 1)  # 0: stays, 1: is divided by the factor
    return frequency * (1 - ramp + ramp / factor)


def _sharpening(factor):
    """m^2, by which YaRN multiplies the softmax scale. m = 0.1 ln s + 1, V3's sqrt(t)
    (section 4.3)."""
    return (0.1 * math.log(factor) + 1) ** 2


def _use_yarn(model, original=ORIGINAL, factor=FACTOR):
    """Gives a model YaRN, in place and from outside. It gets other rotations. Its queries become
    m^2 times as long, which multiplies all scores by m^2."""
    config = model.config
    frequency = _yarn_frequencies(config.qk_rope_head_dim, config.rope_theta, original, factor)
    angle = torch.outer(torch.arange(config.max_seq_len, dtype=torch.float32), frequency)
    model.rotations = torch.polar(torch.ones_like(angle), angle).to(model.device)
    for module in model.modules():
        if isinstance(module, moe.MLA):
            to_queries = module.wq_b if module.compresses_queries else module.wq
            to_queries.register_forward_hook(
                lambda _, inputs, queries: queries * _sharpening(factor))


def _lengthened(folder, model):
    """A copy of a model that can read the longest text, with the usual positions."""
    longer = folder.place(moe.Transformer(replace(model.config, max_seq_len=LENGTHS[-1])))
    longer.load_state_dict(model.state_dict())
    return longer


# ------------------------------------------------------------------------------
# Needles

# By language: a line of weather, the line before the sum, and the question for it.
LINES = {"en": ("the weather is fine and nothing happened\n",
                "remember that the sum of the day is\n", "what was the sum of the day"),
         "zh": ("天气很好没有事情\n", "记住今天算式就是\n", "哪个算式属于今天")}


def _make_needle(rng, length, depth, part="train"):
    """The document of a text with a sum in it, and of its solution. It has at most `length`
    tokens, unless it has no weather at all. depth: the share of the weather that stands before
    the sum. part: of the problems, as in tasks.py."""
    problem = tasks.make_problem(rng, LEVEL, part)
    weather, remember, question = LINES[problem.language]
    needle = f"{remember}{problem.expression}\n"
    response = tasks.response(*tasks.write_working(problem, "steps", rng))

    def document(n_before, n_after):
        text = weather * n_before + needle + weather * n_after + question
        return tasks.dialogue(replace(problem, question=text), response, "needle")

    room = length - len(document(0, 0).tokens)
    n_lines = max(0, room // len(tasks.ENCODING.encode(weather)))
    n_before = round(depth * n_lines)
    return document(n_before, n_lines - n_before)


def _draw_from(run, longest):
    """The corpus with needles, as a function (rng) -> document. Half of the documents have a
    needle, at any depth in a text of up to `longest` tokens."""
    def draw(rng):
        if rng.random() < 0.5:
            return _make_needle(rng, rng.randint(longest // 16, longest), rng.random())
        return tasks.make_document(rng, run.corpus)
    return draw


# ------------------------------------------------------------------------------
# The arms


def _needle_base(folder, arm):
    """The kept base after the training on rows of 512 tokens. All arms of a seed share it."""
    run, start = folder.run, start_folder(folder, arm, STAGES)

    def loop(model, state):
        return train(model, run.base, _draw_from(run, ORIGINAL), run.seed, state)

    return start.stage("needle_base", load_kept(folder, "base"), loop, run.base.steps,
                       watch=lambda *_: None)


@torch.no_grad()
def _read_needle(model, document):
    """(found, right): whether greedy decoding writes the document's solution up to the first "=",
    and whether it writes all of it. One forward pass tells: each token of the solution must be the
    likeliest after the tokens before it."""
    tokens = torch.tensor([document.tokens], device=model.device)            # (1, T)
    is_solution = torch.tensor([document.weight], device=model.device) > 0   # (1, T)
    predicting = F.pad(is_solution[:, 1:], (0, 1))  # the logits at t predict token t + 1
    logits = model(tokens, logits_at=predicting).logits          # (tokens of the solution, V)
    solution = tokens[is_solution]
    is_right = (logits.argmax(-1) == solution).tolist()
    first_equals = solution.tolist().index(EQUALS)
    return all(is_right[:first_equals]), all(is_right)


def _test(model, part="test"):
    """{key: share of needles}, by length, and by length and depth. needle: found and computed;
    found: the first step has the right operands. The problems are the same for all arms and seeds.
    part: test, or dev for choices."""
    model.eval()
    numbers = {}
    for length in LENGTHS:
        rng, found = random.Random(f"{part}/needle/{length}"), []
        for depth in DEPTHS:
            documents = [_make_needle(rng, length, depth / 100, part) for _ in range(PROBLEMS)]
            of_depth = [_read_needle(model, document) for document in documents]
            found += of_depth
            numbers[f"needle@{length}.{depth}"] = fmean(right for _, right in of_depth)
        numbers[f"needle@{length}"] = fmean(right for _, right in found)
        numbers[f"found@{length}"] = fmean(is_found for is_found, _ in found)
    return numbers


def measure_arm(arm, folder):
    """The share of needles that an arm finds, by length and depth."""
    run = folder.run
    model = _lengthened(folder, _needle_base(folder, arm))
    if arm in ("before", "yarn"):
        _use_yarn(model)
    if arm in ("continued", "yarn"):  # both read the same documents
        s = replace(run.base, row_tokens=EXTENDED, **EXTENSION)
        for _ in train(model, s, _draw_from(run, EXTENDED), run.seed + 1000):
            pass
    return _test(model)


# ------------------------------------------------------------------------------
# The page

NAMES = {"nothing": "nothing", "continued": "trained, positions continued",
         "before": "YaRN, not trained", "yarn": "YaRN, trained"}


def _draw_map(plot, rows, arm):
    """Draws the heat map of an arm: depth over length."""
    shares = [[rows[f"{arm}.needle@{length}.{depth}"]["mean"] for length in LENGTHS]
              for depth in DEPTHS]
    plot.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            plot.text(j, i, f"{share:.0%}", ha="center", va="center", size=7,
                      color="white" if share < 0.5 else "black")
    plot.grid(False)
    plot.set_xticks(range(len(LENGTHS)), [f"{length:,}" for length in LENGTHS], rotation=60)
    plot.set_yticks(range(len(DEPTHS)), [f"{depth}%" for depth in DEPTHS])
    plot.tick_params(labelsize=9)


def picture(rows):
    """The four heat maps. Each title says how many needles are found."""
    titles = {"nothing": "As it is", "continued": "Trained", "before": "YaRN alone",
              "yarn": "YaRN, trained"}
    panels = []
    for arm, title in titles.items():
        shares = [f"{rows[f'{arm}.needle@{length}']['mean']:.0%} at {length:,}"
                  for length in (EXTENDED, LENGTHS[-1])]
        panels.append(Panel("\n".join([title, *shares]),
                            lambda plot, arm=arm: _draw_map(plot, rows, arm)))
    return Picture(panels, "needles found, by tokens of the text and depth of the needle")


def page(rows, notes):
    """The lines of the report: the needles found by length; by length and depth for each arm; and
    what YaRN and its training add."""
    heads = [f"{length:,} tokens" for length in LENGTHS]
    body = [[name, *(cell(rows, f"{arm}.needle@{length}") for length in LENGTHS)]
            for arm, name in NAMES.items()]
    lines = [*table(["needles found and computed", *heads], body), ""]
    body = [[name, *(cell(rows, f"{arm}.found@{length}") for length in LENGTHS)]
            for arm, name in NAMES.items()]
    lines += [*table(["needles found", *heads], body), ""]
    for arm, name in NAMES.items():
        body = [[f"{depth}%", *(cell(rows, f"{arm}.needle@{length}.{depth}") for length in LENGTHS)]
                for depth in DEPTHS]
        lines += [*table([f"{name}: depth", *heads], body), ""]
    for arm in ("continued", "before"):
        for length in (EXTENDED, LENGTHS[-1]):
            comparison = compare(rows, f"{arm}.needle@{length}", f"yarn.needle@{length}")
            if comparison:
                lines.append(f"- {length:,} tokens, {NAMES['yarn']}, minus {NAMES[arm]}: "
                             f"{comparison.text(points=True)}")
    return lines
