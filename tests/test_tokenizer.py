"""The tests of engine/tokenizer.py, by way of the encoding that tasks.py builds with it."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks
from tasks import ENCODING, END_ID, RANKS, WORDS
from tests.helpers import lightly


@lightly
@given(st.text())
def test_encoding_loses_nothing(text):
    """Decoding gives back any text that was encoded, in any script."""
    assert ENCODING.decode(ENCODING.encode_ordinary(text)) == text


@lightly
@given(st.text("0123456789"))
def test_encoding_has_one_token_for_each_digit(digits):
    """A number has as many tokens as digits."""
    assert len(ENCODING.encode_ordinary(digits)) == len(digits)


@pytest.mark.parametrize("word", [
    word for words in WORDS.values() for name, word in words.items()
    if name != "summary"])  # a summary has several words
def test_encoding_has_one_token_for_a_word_between_numbers(word):
    """A word of the corpus is the same single token wherever it stands between two numbers."""
    token = ENCODING.encode_single_token(word)
    assert all(ENCODING.encode_ordinary(f"{a}{word}{b}")[len(a):-len(b)] == [token]
               for a in ("7", "25", "=18") for b in ("0", "99", "-3"))


def test_make_ranks_holds_all_bytes_and_each_word():
    """Ids have no gap, begin with the 256 bytes, and hold each word of the vocabulary as one
    token."""
    assert list(RANKS.values()) == list(range(len(RANKS)))
    assert all(RANKS[bytes([b])] == b for b in range(256))
    assert len(RANKS) == 256 + len(tasks.VOCABULARY)
    for word in tasks.VOCABULARY:
        assert ENCODING.encode_ordinary(word) == [RANKS[word.encode()]]


def test_make_encoding_gives_each_special_token_its_own_id():
    """The special tokens follow the ranks with one id each, so the padding token is not the end
    token."""
    ids = [ENCODING.encode_single_token(token) for token in tasks.SPECIAL]
    assert ids == list(range(len(RANKS), tasks.VOCAB_SIZE)) and tasks.PAD_ID != END_ID
