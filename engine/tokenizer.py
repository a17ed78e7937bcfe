"""Builds a tiktoken.Encoding from a list of words: nothing is downloaded.

Its tokens are all bytes, and each word whole.
"""
import re

import tiktoken

# A piece: one digit, a Latin word with its spaces, one or two Han characters, or any other one.
PATTERN = r"\p{N}| ?\p{Latin}+ ?|\p{Han}{1,2}|[^\p{N}\p{Latin}\p{Han}]"

HAN = re.compile("[\u4e00-\u9fff]{1,2}")


def strings(tree):
    """All texts in nested dicts and tuples."""
    branches = tree.values() if isinstance(tree, dict) else tree
    return [tree] if isinstance(tree, str) else [s for branch in branches for s in strings(branch)]


def pieces(text):
    """The words of a text, as PATTERN cuts them."""
    return re.findall(f" ?[A-Za-z]+ ?|{HAN.pattern}", text)


# Ranks: all bytes, and each word whole. tiktoken looks a piece up before it merges any pair, so a
# word needs no ranks for its parts (Llama 3's vocabulary too).
def make_ranks(words):
    """{token: its id} of all bytes and of words, in alphabetical order."""
    ranks = {bytes([b]): b for b in range(256)}
    return ranks | {word.encode(): 256 + i for i, word in enumerate(sorted(words))}


def make_encoding(ranks, special):
    """The tiktoken.Encoding of ranks, and of special tokens, whose ids come after them."""
    return tiktoken.Encoding("r1mini", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={tag: len(ranks) + i for i, tag in enumerate(special)})
