"""Exercise: which experts a token goes to, and how much of each it gets.

Check yourself: python workshop/check.py router
"""


def route(scores, bias, groups, limited, k, scale):
    """Gates (N, E) of scores (N, E) in 0..1, E experts in `groups` groups of neighbours; 0 for an
    expert that is not chosen. V3 eq 13-16 and section 2.1.2:

    1 biased = scores + bias (E,), for the choice only
    2 a group is worth the sum of its two best biased scores; the best `limited` groups stay
    3 of the experts in these groups, the k with the best biased scores are chosen
    4 their gates: the scores without bias, divided by their sum, times scale
    """
    raise NotImplementedError
