"""Exercise: the rule that pays. Whatever it pays for wrongly, RL will find.

Check yourself: python workshop/check.py reward
"""


def accuracy(text, answer):
    """1.0 if a response gives the right answer, else 0.0; never an error, whatever the text.

    text    <think>25-7=18 check 18+7=25</think><answer>18</answer>: one answer block, the very last
            thing; before it one think block, or text without any tag
    answer  the right whole number, as text. It counts only if written plainly: 18 or -5, in ASCII
            digits, no sign +, no leading zero, no space
    Between </think> and <answer> a summary of forty characters at most, without <, >, digit or
    newline, is allowed. R1 section 2.2.2.
    """
    raise NotImplementedError
