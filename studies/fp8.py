"""Does FP8 cost anything?

The paper: a linear layer computes its three products in FP8 (E4M3). Activations have one
scale for each 1x128 tile, weights one for each 128x128 block (V3 section 3.3.2). The loss
differs from bfloat16's by less than 0.25%, at 16B and 230B parameters (V3 Appendix B.1).

    python r1mini.py study fp8

    products    errors of single products at the sizes of `laptop` and `node`
    float32     a base of nano
    passes      float32 in passes of half the size. Only the order of sums differs. This control
                shows how far float32's own rounding errors drive two bases apart
    bfloat16    products and attention in bfloat16
    fp8         linear layers in FP8. Tiles are 1x16 and blocks 16x16, since nano is 64 wide
    four_bits   Zero, tested with its weights in FP8 and in 4 bits

Loss is the mean over the last 100 steps, whose documents were never read before. It is computed
with the arm's own rounding. All bases of a seed start from the same weights and read the same
documents. All bases are tested with float32 products. float32 and bfloat16 are also tested with
bfloat16 products: this tells what is lost in training from what is lost when the model writes.

What differs from V3:
- Numbers are rounded to E4M3 and then multiplied in float32. So this study shows what rounding
  costs, not what FP8 saves.
- Sums are in float32. V3's tensor cores keep about 14 bits of a sum, so V3 moves it to float32
  after every 128 terms.
- All other operations are in float32, so FP8 is compared with float32. V3 computes them in
  bfloat16 or float32, and compares FP8 with bfloat16.
- The input of W_O is E4M3 (V3: E5M6), and no scale is rounded to a power of 2 (V3: some are).
- V3 keeps AdamW's moments in bfloat16, and the inputs of SwiGLU in FP8. Here both are float32, and
  the optimizer of matrices is Muon.
- The models of `products` have made twelve steps, so large outliers, against which tiles help, may
  not have formed.
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
from tools.figures import Picture, arms_panel
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
    each. It is at least 1e-30, since a tile of zeros would have the scale 0. V3's kernel.py takes
    1e-4. It only serves inference, and many gradients are smaller than that."""
    R, C = x.shape[-2:]
    x = F.pad(x, (0, -C % columns, 0, -R % rows))
    tiles = x.unflatten(-1, (x.size(-1) // columns, columns))
    tiles = tiles.unflatten(-3, (x.size(-2) // rows, rows))
    return tiles, tiles.abs().amax((-3, -1), keepdim=True).clamp(min=1e-30)


def _untile(tiles, like):
    """Undoes _tiles_of: gives the tiles the shape of the tensor `like`."""
    R, C = like.shape[-2:]
    return tiles.flatten(-2).flatten(-3, -2)[..., :R, :C]


# ------------------------------------------------------------------------------
# The model in FP8


class Product(torch.autograd.Function):
    """y = x w^T, with x (M, C), w (D, C) and y (M, D). This product and the two of its gradients
    multiply rounded numbers (V3 section 3.3.1)."""

    @staticmethod
    def forward(ctx, x, w, tile):
        """Rounds x in 1 x tile tiles, and w in tile x tile blocks (V3 section 3.3.2)."""
        x, w = _round_e4m3(x, 1, tile), _round_e4m3(w, tile, tile)
        ctx.save_for_backward(x, w)  # activations are kept in FP8
        ctx.tile = tile
        return x @ w.T                                                         # (M, D)

    @staticmethod
    def backward(ctx, dy):
        """A tile lies along the axis that a product sums over. For dw that is the tokens, so x,
        which is rounded already, is rounded again (V3 section 3.5.2)."""
        x, w = ctx.saved_tensors
        dx = _round_e4m3(dy, 1, ctx.tile) @ w                                  # (M, C)
        dw = _round_e4m3(dy, ctx.tile, 1).T @ _round_e4m3(x, ctx.tile, 1)      # (D, C)
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
    """Routed experts, one after the other. So no tile has tokens of two experts."""

    # moe.Experts.forward would not call products() on devices without a grouped product.
    forward = moe.Experts.forward_grouped

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
    """The modules that V3 computes in FP8. Embedding, head, router, norms and attention between
    tokens are not among them (V3 section 3.3.1)."""
    return [m for m in model.modules() if type(m) in REPLACED and m is not model.head]


def _replace_products(model, product):
    """Changes the classes of the linear layers in place, and returns the model. They then call
    product(x (M, C), w (D, C)) -> (M, D). The weights that the optimizer moves stay float32."""
    for module in _linear_layers(model):
        module.__class__, module.product = REPLACED[type(module)], product
    return model


# ------------------------------------------------------------------------------
# Errors of single products

# Few layers and few steps on the corpus, since one thread has to train these models.
SIZES = {"laptop": {"n_layers": 3, "n_mtp_layers": 0}, "node": {"n_layers": 2, "n_mtp_layers": 0}}
SHORT = Train(steps=12, documents=12, lr=1e-3, muon_lr=0, warmup=2)


def _round_with_one_scale(x):
    """x as E4M3 keeps it, with one scale for the whole tensor."""
    return _round_e4m3(x, *x.shape[-2:])


def _round_bfloat16(x):
    """x as bfloat16 keeps it."""
    return x.bfloat16().float()


RULES = {  # {rule: (the rounding of a matrix that is summed over its columns, that of weights)}
    "tensor": (_round_with_one_scale, _round_with_one_scale),
    "tile": (lambda x: _round_e4m3(x, 1, TILE), lambda w: _round_e4m3(w, TILE, TILE)),
    "bfloat16": (_round_bfloat16, _round_bfloat16)}


class Measured(torch.autograd.Function):
    """The product y = x w^T in float32. Its backward pass appends the errors of rounded products
    to the list `errors`, as (rule, product, error)."""

    @staticmethod
    def forward(ctx, x, w, errors):
        """x (M, C), w (D, C) -> y (M, D)"""
        ctx.save_for_backward(x, w)
        ctx.errors = errors
        return x @ w.T

    @staticmethod
    def backward(ctx, dy):
        """Measures y = x w^T, dx = dy w and dw = dy^T x, beside float64."""
        x, w = ctx.saved_tensors
        x64, w64, dy64 = x.double(), w.double(), dy.double()
        exact = {"y": x64 @ w64.T, "dx": dy64 @ w64, "dw": dy64.T @ x64}
        for rule, (along_rows, in_blocks) in RULES.items():
            x8, w8 = along_rows(x), in_blocks(w)
            x8_again = along_rows(x8.T).T  # the second rounding; with one scale it changes nothing
            rounded = {"y": x8 @ w8.T, "dx": along_rows(dy) @ w8, "dw": along_rows(dy.T) @ x8_again}
            for product, exact_product in exact.items():
                error = rounded[product] - exact_product
                norm_of_row = exact_product.norm(dim=1)
                is_row_used = norm_of_row > 0  # dy is 0 where a token predicts nothing
                if not is_row_used.any():
                    continue  # no token of this expert predicts anything
                error_of_row = error.norm(dim=1)[is_row_used] / norm_of_row[is_row_used]
                ctx.errors.append((rule, product, float(error.norm() / exact_product.norm())))
                ctx.errors.append((rule, f"{product}.rows", float(error_of_row.mean())))
        return dy @ w, dy.T @ x, None


def _errors(preset, run):
    """{RULE.PRODUCT: error} of a size: the mean over all linear layers in one backward pass. The
    error of a product is |rounded - exact| / |exact| in the Frobenius norm, where exact is
    float64's. RULE.PRODUCT.rows is the mean of the errors of its rows, so that rows of small
    numbers count as much as others."""
    torch.manual_seed(run.seed)
    model = moe.Transformer(dataclasses.replace(PRESETS[preset], **SIZES[preset]))
    measured = []  # (rule, product, error)

    def draw(rng):
        return tasks.make_document(rng, run.corpus)

    for _ in tqdm(train(model, SHORT, draw, run.seed), preset, SHORT.steps):
        pass

    def measured_product(x, w):
        if len(x) == 0:  # an expert without tokens has no error
            return x @ w.T
        return Measured.apply(x, w, measured)

    _replace_products(model, measured_product)
    rng = random.Random(f"{run.seed}/fp8")
    rows = pack([draw(rng) for _ in range(SHORT.documents)], SHORT.row_tokens)
    next_token_loss(model, rows, rows)[0].backward()
    errors = {}
    for rule, product, error in measured:
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
    numbers |= {"loss": fmean(losses[-100:]), "pass@1": _test(model, run)}
    if arm in ("float32", "bfloat16"):
        numbers["pass@1.bfloat16"] = _test(model, run, torch.bfloat16)
    return numbers


def _test(model, run, dtype=torch.float32):
    """pass@1 on test, with products in dtype."""
    model = copy_model(model)  # the copy has the usual linear layers
    model.compute_dtype = dtype
    return test_numbers(model, run)["pass@1"]


@torch.no_grad()
def _test_low_bits(model, run):
    """pass@1 of a model with its own weights, with the weights of its linear layers in FP8, and
    with these in 4 bits, where 16 weights of a row share a scale."""
    numbers = {"zero.pass@1": _test(model, run)}
    for key, rounding in (("fp8.pass@1", lambda w: _round_e4m3(w, NANO_TILE, NANO_TILE)),
                          ("pass@1", lambda w: _round_four_bits(w, NANO_TILE))):
        rounded = copy_model(model)
        for module in _linear_layers(rounded):
            for weight in module.parameters(recurse=False):
                weight.copy_(rounding(weight))
        numbers[key] = _test(rounded, run)
    return numbers


def combine(numbers):
    """The mean error of products by rule, and each loss relative to float32's."""
    means = {}
    for rule in RULES:
        means[f"fp8.error.{rule}"] = fmean(
            numbers[f"products.{preset}.{rule}.{product}"]
            for preset in SIZES for product in ("y", "dx", "dw"))
    for arm in ("passes", "bfloat16", "fp8"):
        means[f"{arm}.relative"] = numbers[f"{arm}.loss"] / numbers["float32.loss"] - 1
    return means


def picture(rows):
    """The loss of each base relative to float32's, and the pass@1 of Zero in few bits."""
    relative = rows["fp8.relative"]["mean"]
    lost = 100 * (rows["four_bits.pass@1"]["mean"] - rows["four_bits.zero.pass@1"]["mean"])
    bits = {"four_bits.zero": "float32", "four_bits.fp8": "FP8", "four_bits": "4 bits"}
    return Picture([arms_panel(f"FP8 changes the loss\nby {relative:+.2%},", rows,
                               {"passes": "float32, other passes", "bfloat16": "bfloat16",
                                "fp8": "FP8"}, "relative", "loss, relative to float32"),
                    arms_panel(f"4 bits Zero's answers\nby {lost:+.1f} points", rows, bits,
                               "pass@1", "correct answers")],
                   "a dot is a seed, a line the mean; right: Zero's weights in few bits")


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
    columns = {"loss": "loss", "relative": "loss, relative to float32", "pass@1": "pass@1",
               "pass@1.bfloat16": "pass@1 with bfloat16 products"}
    body = [[arm, *(cell(rows, f"{arm}.{key}") for key in columns)]
            for arm in ("float32", "passes", "bfloat16", "fp8")]
    lines += [*table(["base", *columns.values()], body), ""]
    for arm in ("passes", "bfloat16", "fp8"):
        loss = compare(rows, "float32.loss", f"{arm}.loss")
        relative = compare(rows, 0, f"{arm}.relative")
        if loss and relative:
            lines += [f"- loss of {arm}, minus float32: {loss.text()}",
                      "- as a share of float32's (V3, FP8 against bfloat16: below 0.0025): "
                      f"{relative.text()}"]
    body = [[name, cell(rows, f"four_bits.{key}")] for name, key in (
        ("float32", "zero.pass@1"), ("FP8", "fp8.pass@1"), ("4 bits", "pass@1"))]
    lines += ["", *table(["weights of Zero", "pass@1"], body)]
    comparison = compare(rows, "four_bits.zero.pass@1", "four_bits.pass@1")
    if comparison:
        lines += ["", f"- 4 bits, minus float32: {comparison.text(points=True)}"]
    return lines
