"""Does FP8 cost anything?

The paper: all three products of a linear layer in FP8 (E4M3). Activations have a scale for
each 1x128 tile, weights for each 128x128 block. The loss differs from bfloat16's by less
than 0.25% (V3 section 3.3 and Appendix B.1, 16B and 230B parameters).

    python r1mini.py study fp8

Numbers are rounded to E4M3 and multiplied in float32. So this shows what rounding does, not
what it saves. Sums are in float32; V3 adds up there what a tensor core adds up in 14 bits.

    products    errors of single products at the sizes of `laptop` and `node`
    float32     a base of nano
    passes      the same in passes of half the size. Only the order of sums differs, so this
                control shows how far rounding errors of float32 drive two bases apart
    bfloat16    the same, products and attention in bfloat16
    fp8         the same, linear layers in FP8, with tiles of 1x16 and blocks of 16x16, since
                nano is 64 wide
    four_bits   Zero, tested with weights in FP8 and in 4 bits

Loss is the mean of the last 100 steps, whose documents were never read before. All arms of a
seed start from the same weights and read the same documents. All are tested with float32
products.
"""
import dataclasses
import random
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import moe
import tasks
from engine.devices import copy_model
from r1mini import PRESETS, Train, next_token_loss, pack, train
from tools.compare import compare
from tools.study import load_kept, test_numbers
from tools.tables import cell, table

# 500 steps and not 1,000: a seed has to end within 15 minutes.
SETTINGS, STAGES = ("base.steps=500",), ()
ARMS = {"products": "", "float32": "", "passes": "base.micro_tokens=1024", "bfloat16": "",
        "fp8": "", "four_bits": ""}
DIFFERENCES = {f"{arm}.minus_float32.{key}": (f"{arm}.{key}", f"float32.{key}")
               for arm in ("passes", "bfloat16", "fp8") for key in ("loss", "pass@1")}
DIFFERENCES["four_bits.minus_zero.pass@1"] = "four_bits.pass@1", "four_bits.zero.pass@1"
TILE = 128        # V3's
NANO_TILE = 16    # in training nano
E4M3_MAX = 448.0  # the largest number of E4M3

# ------------------------------------------------------------------------------
# Rounding


def _round_e4m3(x, rows, columns):
    """x (.., R, C) as E4M3 keeps it. A tile of rows x columns has one scale (V3 section 3.3.2);
    at an edge a tile is smaller. The scales are computed online, from x itself."""
    tiles, largest = _tiles_of(x, rows, columns)
    scale = largest / E4M3_MAX
    return _untile((tiles / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale, x)


def _round_four_bits(x, columns):
    """x (.., R, C) as whole numbers from -7 to 7, with a scale for each 1 x columns tile."""
    tiles, largest = _tiles_of(x, 1, columns)
    scale = largest / 7
    return _untile((tiles / scale).round() * scale, x)


def _tiles_of(x, rows, columns):
    """x (.., R, C) as tiles (.., R/rows, rows, C/columns, columns), and the largest magnitude of
    each. It is at least 1e-30, for tiles of zeros. The kernel.py of V3, which only reads, has
    1e-4; gradients are smaller than that."""
    R, C = x.shape[-2:]
    x = F.pad(x, (0, -C % columns, 0, -R % rows))
    tiles = x.unflatten(-1, (x.size(-1) // columns, columns))
    tiles = tiles.unflatten(-3, (x.size(-2) // rows, rows))
    return tiles, tiles.abs().amax((-3, -1), keepdim=True).clamp(min=1e-30)


def _untile(tiles, like):
    """Undoes _tiles_of."""
    R, C = like.shape[-2:]
    return tiles.flatten(-2).flatten(-3, -2)[..., :R, :C]


# ------------------------------------------------------------------------------
# The model in FP8


class Product(torch.autograd.Function):
    """x (M, C) times w (D, C) transposed: (M, D). All three products of a linear layer are of
    rounded numbers (V3 section 3.3.1)."""

    @staticmethod
    def forward(ctx, x, w, tile):
        """x in 1 x tile tiles, w in tile x tile blocks."""
        x, w = _round_e4m3(x, 1, tile), _round_e4m3(w, tile, tile)
        ctx.save_for_backward(x, w)  # activations are kept in FP8
        ctx.tile = tile
        return x @ w.T

    @staticmethod
    def backward(ctx, dy):
        """The sum for dw runs over tokens, and so do its tiles. x is rounded a second time
        (V3 section 3.5.2)."""
        x, w = ctx.saved_tensors
        dx = _round_e4m3(dy, 1, ctx.tile) @ w
        dw = _round_e4m3(dy, ctx.tile, 1).T @ _round_e4m3(x, ctx.tile, 1)
        return dx, dw, None


class Linear(nn.Linear):
    """A projection of attention or of MTP. self.product takes the place of F.linear."""

    def forward(self, x):
        """x (.., C) -> (.., D)"""
        return self.product(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class MLP(moe.MLP):
    """A dense feed-forward, or the shared expert."""

    def forward(self, x):
        """x (.., C) -> (.., C)"""
        y = _swiglu(x.flatten(0, -2), self.w13.weight, self.w2.weight, self.product)
        return y.unflatten(0, x.shape[:-1])


class Experts(moe.Experts):
    """Routed experts, one after the other: no tile has tokens of two experts."""

    def products(self, x_MC, counts_E):
        """Rows that are sorted by expert -> (M, C)."""
        experts = zip(x_MC.split(counts_E.tolist()), self.w13, self.w2)
        return torch.cat([_swiglu(x, w13, w2, self.product) for x, w13, w2 in experts])


def _swiglu(x, w13, w2, product):
    """moe.swiglu with another product. x (M, C)."""
    gated, up = product(x, w13).chunk(2, -1)
    return product(F.silu(gated) * up, w2)


REPLACED = {nn.Linear: Linear, moe.MLP: MLP, moe.Experts: Experts}


def _linear_layers(model):
    """All modules of the kinds that V3 computes in FP8. Embedding, head, router, norms and
    attention between tokens are none of these (V3 section 3.3.1)."""
    return [m for m in model.modules() if type(m) in REPLACED and m is not model.head]


def _replace_products(model, product):
    """Changes the classes of the linear layers, in place: they call product(x (M, C), w (D, C))
    -> (M, D). The weights that the optimizer moves stay float32."""
    for module in _linear_layers(model):
        module.__class__, module.product = REPLACED[type(module)], product
    return model


# ------------------------------------------------------------------------------
# Errors of single products

# Models of few layers, after a few steps on the corpus: one thread has to train them.
SIZES = {"laptop": {"n_layers": 3, "n_mtp_layers": 0}, "node": {"n_layers": 2, "n_mtp_layers": 0}}
FEW = Train(steps=12, documents=12, lr=1e-3, muon_lr=0, warmup=2)


def _whole(x):
    """x with one scale."""
    return _round_e4m3(x, *x.shape[-2:])


RULES = {  # {rule: the rounding of what is summed over columns, of weights}
    "tensor": (_whole, _whole),
    "tile": (lambda x: _round_e4m3(x, 1, TILE), lambda w: _round_e4m3(w, TILE, TILE)),
    "bfloat16": (lambda x: x.bfloat16().float(),) * 2}


class Measured(torch.autograd.Function):
    """An exact product. It appends the errors of rounded ones, as (rule, product, error)."""

    @staticmethod
    def forward(ctx, x, w, found):
        """x (M, C), w (D, C) -> (M, D)"""
        ctx.save_for_backward(x, w)
        ctx.found = found
        return x @ w.T

    @staticmethod
    def backward(ctx, dy):
        """Measures the products y = x w^T, dx = dy w and dw = dy^T x."""
        x, w = ctx.saved_tensors
        x64, w64, dy64 = x.double(), w.double(), dy.double()
        exact = {"y": x64 @ w64.T, "dx": dy64 @ w64, "dw": dy64.T @ x64}
        for rule, (along_rows, in_blocks) in RULES.items():
            x8, w8 = along_rows(x), in_blocks(w)
            x8_again = along_rows(x8.T).T  # the second rounding; with one scale it changes nothing
            rounded = {"y": x8 @ w8.T, "dx": along_rows(dy) @ w8, "dw": along_rows(dy.T) @ x8_again}
            for name, y in exact.items():
                error = rounded[name] - y
                rows = y.norm(dim=1) > 0  # an expert may have no token that is learnt from
                if rows.any():
                    row_errors = error[rows].norm(dim=1) / y[rows].norm(dim=1)
                    ctx.found.append((rule, name, float(error.norm() / y.norm())))
                    ctx.found.append((rule, f"{name}.rows", float(row_errors.mean())))
        return dy @ w, dy.T @ x, None


def _errors(preset, run):
    """{RULE.PRODUCT: error} of a size, the mean over all linear layers of one backward pass. An
    error is |rounded - exact| / |exact| in the Frobenius norm, and exact is float64's.
    RULE.PRODUCT.rows is the mean of the errors of single rows, large and small ones alike."""
    torch.manual_seed(run.seed)
    model, found = moe.Transformer(dataclasses.replace(PRESETS[preset], **SIZES[preset])), []

    def draw(rng):
        return tasks.make_document(rng, run.corpus)

    for _ in tqdm(train(model, FEW, draw, run.seed), preset, FEW.steps):
        pass

    def measured_product(x, w):
        return Measured.apply(x, w, found) if len(x) else x @ w.T  # no token, no error

    _replace_products(model, measured_product)
    rng = random.Random(f"{run.seed}/fp8")
    rows = pack([draw(rng) for _ in range(FEW.documents)], FEW.row_tokens)
    next_token_loss(model, rows, rows)[0].backward()
    errors = {}
    for rule, product, error in found:
        errors.setdefault(f"{rule}.{product}", []).append(error)
    return {key: fmean(values) for key, values in errors.items()}


# ------------------------------------------------------------------------------
# The arms


def measure_arm(arm, folder):
    """The numbers of an arm."""
    run = folder.run
    if arm == "products":
        return {f"{preset}.{key}": error for preset in SIZES
                for key, error in _errors(preset, run).items()}
    if arm == "four_bits":
        return _test_low_bits(load_kept(folder, "zero"), run)
    torch.manual_seed(run.seed)
    model = folder.place(moe.Transformer(run.model))
    if arm == "bfloat16":
        model.compute_dtype = torch.bfloat16
    if arm == "fp8":
        _replace_products(model, lambda x, w: Product.apply(x, w, NANO_TILE))
    steps = train(model, run.base, lambda rng: tasks.make_document(rng, run.corpus), run.seed)
    losses = [record["loss"] for record, _ in tqdm(steps, arm, run.base.steps)]
    numbers = {f"loss@{step}": fmean(losses[max(0, step - 100):step])
               for step in range(100, len(losses) + 1, 100)}
    return numbers | {"loss": fmean(losses[-100:])} | _test(model, run)


def _test(model, run):
    """pass@1 on test. The copy has the usual classes."""
    model = copy_model(model)
    model.compute_dtype = torch.float32
    return {"pass@1": test_numbers(model, run)["pass@1"]}


@torch.no_grad()
def _test_low_bits(model, run):
    """pass@1 of a model, of the same with the weights of its linear layers in FP8, and in 4 bits
    with a scale for 16 weights of a row."""
    numbers = {"zero.pass@1": _test(model, run)["pass@1"]}
    for key, rounding in (("fp8.pass@1", lambda w: _round_e4m3(w, NANO_TILE, NANO_TILE)),
                          ("pass@1", lambda w: _round_four_bits(w, NANO_TILE))):
        rounded = copy_model(model)
        for module in _linear_layers(rounded):
            for weight in module.parameters(recurse=False):
                weight.copy_(rounding(weight))
        numbers[key] = _test(rounded, run)["pass@1"]
    return numbers


def combine(numbers):
    """The mean errors of products, and how far a loss is from float32's, as a share of it."""
    found = {}
    for rule in RULES:
        found[f"fp8.error.{rule}"] = fmean(
            numbers[f"products.{preset}.{rule}.{product}"]
            for preset in SIZES for product in ("y", "dx", "dw"))
    for arm in ("passes", "bfloat16", "fp8"):
        found[f"{arm}.relative"] = numbers[f"{arm}.loss"] / numbers["float32.loss"] - 1
    return found


def page(rows, notes):
    """The lines of the report: errors of products, the bases, and Zero in few bits."""
    products = {"y": "y = x w^T", "dx": "dx = dy w", "dw": "dw = dy^T x", "y.rows": "rows of y",
                "dx.rows": "rows of dx", "dw.rows": "rows of dw"}
    body = []
    for preset in SIZES:
        for rule, name in (("tensor", "E4M3, one scale a tensor"),
                           ("tile", "E4M3, tiles and blocks"),
                           ("bfloat16", "bfloat16")):
            body.append([preset, name, *(cell(rows, f"products.{preset}.{rule}.{product}", 100)
                                         for product in products)])
    lines = [*table(["size", "rounding, errors in %", *products.values()], body), ""]
    columns = {"loss": "loss", "pass@1": "pass@1", "relative": "loss, relative to float32"}
    body = [[arm, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm in ("float32", "passes", "bfloat16", "fp8")]
    lines += [*table(["base", *columns.values()], body), ""]
    for arm in ("passes", "bfloat16", "fp8"):
        loss = compare(rows, "float32.loss", f"{arm}.loss")
        relative = compare(rows, 0, f"{arm}.relative")
        if loss and relative:
            lines += [f"- loss of {arm}, minus float32: {loss.text()}",
                      f"- as a share of float32's (V3: below 0.0025): {relative.text()}"]
    body = [[name, cell(rows, f"four_bits.{key}")] for name, key in (
        ("float32", "zero.pass@1"), ("FP8", "fp8.pass@1"), ("4 bits", "pass@1"))]
    lines += ["", *table(["weights of Zero", "pass@1"], body)]
    loss = compare(rows, "four_bits.zero.pass@1", "four_bits.pass@1")
    return [*lines, "", f"- 4 bits, minus float32: {loss.text(points=True)}"] if loss else lines
