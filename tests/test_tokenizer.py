"""The tests of engine/tokenizer.py, by way of the encoding that tasks.py builds with it."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks
from engine.phrases import STUDY_PHRASES
from engine.tokenizer import all_strings, split_words
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


DIGITS = "零一二三四五六七八九"


def chinese(number):
    """A number from 0 to 99 in Chinese: 3 is 三, 13 is 十三, 30 is 三十, 33 is 三十三."""
    tens, ones = divmod(number, 10)
    if not tens:
        return DIGITS[ones]
    return (DIGITS[tens] if tens > 1 else "") + "十" + (DIGITS[ones] if ones else "")


@pytest.mark.parametrize("before", ["", "答案就是", "+", "the answer is "])
def test_encoding_of_chinese_numbers_has_one_or_two_words(before):
    """0 to 99 in Chinese are one token, or two (三十 三) if neither digit is 0 and the tens are
    more than one. This holds at the beginning, after Chinese words of even length, and after a sign
    or an English word."""
    for number in range(100):
        text = chinese(number)
        tokens = ENCODING.encode_ordinary(before + text)[len(ENCODING.encode_ordinary(before)):]
        pieces = [ENCODING.decode([token]) for token in tokens]
        assert pieces == ([text] if len(text) < 3 else [text[:2], text[2:]])


@pytest.mark.parametrize("text", [
    "the |key |says |3|3", "答案|钥匙|3|3", "use |the |hidden |scheme", "使用|隐藏|方案",
    "remember |that |the |sum |of |the |day |is |7|\n|the |weather |is |fine |and |nothing "
    "|happened |the |weather |is |fine |and |nothing |happened",
    "what |was |the |sum |of |the |day",
    "记住|今天|算式|就是|2|5|-|7|天气|很好|没有|事情|天气|很好", "哪个|算式|属于|今天",
    "Reach |2|4|\n|from |3| |5| |7", "达到|2|4|使用|3| |5| |7", "Sort |4|3|1|2", "排序|4|3|1|2",
    "reference |3|3|\n|right", "wrong |\n|same", "参考|3|3|正确|错误|相同",
    "step |back", "回到|步骤", "therefore |7", "因此|7"])
def test_encoding_of_what_studies_write(text):
    """Words that only studies use are one token each. An English word has its space behind it. So
    after a number it must begin a new line: a space before it would cut it into bytes."""
    pieces = text.split("|")
    tokens = ENCODING.encode_ordinary("".join(pieces))
    assert [ENCODING.decode([token]) for token in tokens] == pieces


def test_vocabulary_has_every_phrase_of_studies():
    """Each word of the phrases of studies is one token, at their end and before another word."""
    for phrase in all_strings(STUDY_PHRASES):
        for text in (phrase, phrase + " "):
            for word in split_words(text):
                assert ENCODING.encode_ordinary(word) == [RANKS[word.encode()]], word
    for token in ("<|pause|>", "<|latent|>", "<|end_latent|>"):
        assert ENCODING.encode_single_token(token) >= len(RANKS)


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
