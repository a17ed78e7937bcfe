"""Hints to the exercises, in steps: `python workshop/check.py hint NAME` shows the first.

Each hint says a little more than the one before. The last one leaves one line to write.
"""

HINTS = {
    "advantage": (
        "Work one row by hand. The rewards 1, 0, 0, 1 have the mean 0.5. What is left of each "
        "reward after the mean is subtracted?",
        "rewards.mean(1, keepdim=True) has the shape (P, 1), so that it can be subtracted from "
        "rewards (P, G). Without keepdim it has the shape (P,), which torch lines up with the "
        "wrong axis.",
        "Divide by rewards.std(1, keepdim=True). In a row of equal rewards it is 0, and 0 / 0 is "
        "nan. .clamp(min=1e-6) keeps what you divide by above 0.",
    ),
    "kl": (
        "Both arguments are logarithms. Which operation on logarithms is a ratio of "
        "probabilities?",
        "log x = reference - new. So log x is at hand, and nothing has to be divided.",
        "x is the exponential of log x: (reference - new).exp(). Then subtract log x and 1.",
    ),
    "kimi": (
        "First make one number for each answer: the shape goes from (n, T) to (n,).",
        "new - old is a log-ratio at each token. Multiply it with the mask, so that padding "
        "counts 0, and sum over the tokens: .sum(1).",
        "Now each answer has an advantage and a log_ratio. Write the formula with these two, and "
        "take .mean() over the answers.",
    ),
    "bias": (
        "Which experts should be chosen more often in the next step: those with many tokens, or "
        "those with few?",
        "Only the direction counts, not how far the load is from the mean. torch.sign(x) is -1, "
        "0 or 1.",
        "torch.sign(load.mean() - load) is 1 for an expert with too little load. Multiply with "
        "speed, and add it to bias. Write bias + ..., not bias += ...",
    ),
    "router": (
        "Keep two tensors apart: scores, which make the gates, and biased = scores + bias, which "
        "only chooses.",
        "biased.unflatten(1, (groups, -1)) has the shape (N, groups, E / groups). topk(2, "
        "-1).values.sum(-1) of it is the score of each group.",
        "Put -inf where a group is not among the best `limited`, with masked_fill. Then "
        "topk(k, -1).indices chooses the experts.",
        "scores.gather(1, chosen) are the scores of the chosen experts. Divide them by their sum, "
        "times scale, and write them into zeros: torch.zeros_like(scores).scatter(1, chosen, "
        "gates).",
    ),
    "absorbed": (
        "A key is w_uk[h] @ latent[s]. Its product with q[h] is q[h] @ (w_uk[h] @ latent[s]). "
        "Where else can the brackets stand?",
        "(q[h] @ w_uk[h]) @ latent[s]: the first factor, of shape (C,), does not depend on s. For "
        "all heads: torch.einsum(\"hd,hdc->hc\", q, w_uk).",
        "scores = that @ latent.T + q_rope @ k_rope.T, of shape (H, S). After scale and softmax "
        "over the tokens, multiply with latent: (H, C).",
        "Only now apply w_uv, once for each head: torch.einsum(\"hvc,hc->hv\", w_uv, read).",
    ),
    "reward": (
        "List what should earn nothing: an empty text, two answers, text behind the answer, 018, "
        "+18. int() accepts more than it should, so compare texts.",
        "Write one regular expression for the whole text, and use re.fullmatch: nothing may stand "
        "before or behind what it describes.",
        "[^<]* is any text without a tag. Before the answer stands <think>[^<]*</think> and at "
        "most forty characters that are not <, >, digits or newlines; or else [^<]* alone.",
        "The number itself is (0|-?[1-9][0-9]*). Give 1.0 if there is a match and match[1] equals "
        "the answer.",
    ),
}
