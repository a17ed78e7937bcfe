"""A solution of exercises/reward.py. The project's own: tasks.accuracy."""
import re

NO_TAGS = r"[^<]*"
RESPONSE = re.compile(rf"""
    (?: <think> {NO_TAGS} </think>  [^<>\d\n]{{0,40}}   # thinking, and a short summary
      | {NO_TAGS} )                                     # or text without any tag
    <answer> (0 | -?[1-9][0-9]*) </answer>
    """, re.VERBOSE)


def accuracy(text, answer):
    match = RESPONSE.fullmatch(text)
    return float(match is not None and match[1] == answer)
