"""Exercise: the leash. How far is the policy from its reference, judged by the tokens it drew?

Check yourself: python workshop/check.py kl
"""


def kl_k3(new, reference):
    """The k3 estimate of KL(policy || reference) at each token, of the log-probabilities that both
    give to it, tensors of one shape: x - log x - 1 with x = pi_ref / pi. DeepSeekMath eq 4."""
    raise NotImplementedError
