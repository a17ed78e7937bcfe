"""Exercise: how much better is an answer than the other answers to its question?

Check yourself: python workshop/check.py advantage
"""


def advantages(rewards):
    """Group-relative advantages (P, G) of the rewards (P, G), a tensor. DeepSeekMath
    section 4.1.2.

    A row holds the rewards of the G answers to one question. From each reward subtract
    the mean of its row, then divide by the standard deviation of the row (the one with
    G - 1). In a row whose rewards are all equal, every advantage is 0.
    """
    raise NotImplementedError
