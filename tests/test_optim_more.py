"""More tests of engine/optim.py: how micro-batches are dealt to processes."""
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import optim


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5), st.integers(1, 120))
def test_optim_micro_batches_give_all_processes_equal_passes(lengths, count, limit):
    """For rows dealt to 1 to 5 processes: every row is dealt once, all processes have equally many
    lists, only the last list may be empty, and a list is within the limit or has one row."""
    dealt = []
    for number in range(count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "rank_and_size", lambda: (number, count))
            dealt.append(list(optim.micro_batches(lengths, range(len(lengths)), limit)))
    assert len({len(lists) for lists in dealt}) == 1
    assert Counter(row for lists in dealt for rows in lists for row in rows) == Counter(
        range(len(lengths)))
    for lists in dealt:
        assert all(lists[:-1])
        assert all(len(rows) <= 1 or len(rows) * max(lengths[r] for r in rows) <= limit
                   for rows in lists)


def test_optim_micro_batches_deal_long_rows_in_turn(monkeypatch):
    """Rows of 1 to 8 tokens, one a list, are dealt to and fro by hand: 1, 4, 5 and 8 to one
    process, 2, 3, 6 and 7 to the other."""
    dealt = []
    for number in range(2):
        monkeypatch.setattr(optim, "rank_and_size", lambda: (number, 2))
        dealt.append(optim.micro_batches(range(1, 9), range(8), 1))
    assert dealt == [[[0], [3], [4], [7]], [[1], [2], [5], [6]]]
