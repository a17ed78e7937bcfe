"""Exercise: keep the experts equally busy, without a loss.

Check yourself: python workshop/check.py bias
"""


def update_bias(bias, load, speed):
    """The routing biases (E,) after a training step. DeepSeek-V3 section 2.1.2.

    bias (E,)   what is added to the score of each expert when experts are chosen
    load (E,)   how many tokens each expert had in this step
    speed       gamma, how far a bias moves in a step

    The bias of an expert goes up by `speed` if the expert had less than the mean load,
    and down by `speed` if it had more. With exactly the mean load it stays.
    """
    raise NotImplementedError
