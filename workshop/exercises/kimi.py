"""Exercise: the objective of Kimi k1.5. It has no clip; a square holds the policy back.

Check yourself: python workshop/check.py kimi
"""


def kimi(new, old, advantage, mask, tau):
    """The objective of n answers, a number that is to be maximised. Kimi k1.5 equation 3.

    new (n, T)       log-probabilities that the policy gives to the tokens of each answer
    old (n, T)       those that it gave to them when it wrote the answers
    advantage (n,)   the reward of each answer minus the mean reward of its group
    mask (n, T)      1.0 at the tokens of an answer, 0.0 elsewhere
    tau              how strongly the policy is held back

    The log-ratio of an answer is the sum of new - old over its tokens. The objective is
    the mean over the answers of

        advantage * log_ratio - tau / 2 * log_ratio ** 2
    """
    raise NotImplementedError
