"""Exercise: the KL penalty. How far is the policy from its reference?

Check yourself: python workshop/check.py kl
"""


def kl_k3(new, reference):
    """The k3 estimate of KL(policy || reference) at each token. DeepSeekMath equation 4.

    new         log-probabilities that the policy gives to the tokens it wrote, a tensor
    reference   log-probabilities that the reference gives to the same tokens

    k3 = x - log x - 1 with x = pi_ref / pi, a ratio of probabilities. The result has
    the shape of `new`.
    """
    raise NotImplementedError
