"""Builds a tiktoken.Encoding from a list of words. Nothing is downloaded.

Its tokens are all bytes, and each word whole.
"""
import re

import tiktoken

# How a text is cut before it is encoded: one digit; a Latin word with its spaces; one or two Han
# characters; any other single character.
PATTERN = r"\p{N}| ?\p{Latin}+ ?|\p{Han}{1,2}|[^\p{N}\p{Latin}\p{Han}]"
HAN = re.compile("[\u4e00-\u9fff]{1,2}")
WORD = re.compile(f" ?[A-Za-z]+ ?|{HAN.pattern}")


def split_words(text):
    """The words of a text, as PATTERN cuts them."""
    return WORD.findall(text)


def all_strings(tree):
    """All texts in nested dicts, tuples and lists."""
    if isinstance(tree, str):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree
    return [text for branch in branches for text in all_strings(branch)]


def make_token_ranks(words):
    """{token: its id} of all bytes, and of words in alphabetical order.

    tiktoken looks a piece up before it merges any pair. So a word needs no ranks for its parts;
    Llama 3's vocabulary relies on that too.
    """
    ranks = {bytes([b]): b for b in range(256)}
    for i, word in enumerate(sorted(words)):
        ranks[word.encode()] = 256 + i
    return ranks


def make_encoding(ranks, special):
    """The tiktoken.Encoding of ranks and of special tokens, whose ids come after them."""
    special_ids = {tag: len(ranks) + i for i, tag in enumerate(special)}
    return tiktoken.Encoding("r1mini", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens=special_ids)
