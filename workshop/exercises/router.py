"""Exercise: which experts does a token go to, and with which weight does each one count?

Check yourself: python workshop/check.py router
"""


def route(scores, bias, groups, limited, k, scale):
    """Gates (N, E) for N tokens and E experts. The gate of an expert that is not chosen
    is 0. DeepSeek-V3 equations 13 to 16 and section 2.1.2.

    scores (N, E) are between 0 and 1, bias is (E,). The experts form `groups` groups of
    equal size; neighbours are in one group.

    1 biased = scores + bias. It is used for the choice only.
    2 The score of a group is the sum of its two best biased scores. The `limited` groups with
      the best scores stay.
    3 Of the experts in these groups, choose the k with the best biased scores.
    4 The gates of the chosen experts are their scores without bias, divided by the sum of
      these scores, times `scale`.
    """
    raise NotImplementedError
