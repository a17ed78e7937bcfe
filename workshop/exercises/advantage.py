"""Exercise: what an answer is worth beside the other answers to its question.

Check yourself: python workshop/check.py advantage
"""


def advantages(rewards):
    """Group-relative advantages (P, G) of rewards (P, G), a tensor: a row holds the G answers to
    one question. Each reward less the mean of its row, by the row's standard deviation (the one
    with G - 1); 0 in a row whose rewards are all equal. DeepSeekMath section 4.1.2."""
    raise NotImplementedError
