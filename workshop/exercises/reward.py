"""Exercise: write the reward. If it pays for something wrong, RL will find that.

Check yourself: python workshop/check.py reward
"""


def accuracy(text, answer):
    """1.0 if a response gives the right answer, else 0.0. It never raises an error,
    whatever the text is. R1 v1 section 2.2.2.

    text     such as <think>25-7=18 check 18+7=25</think><answer>18</answer>. It ends
             with one answer block. Before that stands one think block, or text without
             any tag.
    answer   the right whole number, as text. The response must give it in the plain
             form: 18 or -5, in ASCII digits, without plus sign, leading zero or space.

    Between </think> and <answer> a summary of up to forty characters may stand, without
    <, >, digits and newlines.
    """
    raise NotImplementedError
