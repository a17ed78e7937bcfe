"""The tests of engine/jsonl.py: dialogues in chat format. (Files of problems: test_evaluate.py.)"""
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import jsonl
from engine.errors import UserError
from tests.helpers import lightly

CHATS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(lightly, max_examples=100)
@given(st.lists(st.tuples(CHATS, CHATS), min_size=1, max_size=4))
def test_jsonl_dialogue_is_read_back_by_read_chat(dialogues):
    """read_chat reads what jsonl_dialogue wrote: any text, with line ends, quotes or tags in it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "chat.jsonl"
        path.write_text("".join(jsonl.jsonl_dialogue(*d) for d in dialogues), "utf-8", newline="\n")
        assert jsonl.read_chat(path) == dialogues


def chat_of(*messages):
    """A line of chat-format JSON with (role, content) pairs."""
    return json.dumps({"messages": [{"role": role, "content": content}
                                    for role, content in messages]})


ASK, TELL = ("user", "2+3"), ("assistant", "5")
BAD_CHATS = [
    "33", "null", "[]", "{", "x", "[" * 100_000, "{}",  # not an object with messages
    '{"messages": []}', '{"messages": 3}', '{"messages": "ab"}', '{"messages": [[], []]}',
    '{"messages": {"user": 1, "assistant": 2}}',
    '{"messages": [{"role": "user"}, {"role": "assistant"}]}',
    chat_of(ASK), chat_of(TELL, ASK), chat_of(ASK, ASK),  # other roles than one of each
    chat_of(("system", "be kind"), TELL), chat_of(ASK, TELL, ASK),
    chat_of(ASK, ("assistant", 5)), chat_of(("user", 2), ("assistant", 5)),  # no texts
    chat_of(("user", []), ("assistant", [])), chat_of(ASK, ("assistant", None)),
    chat_of(ASK, ("assistant", "\ud800")), chat_of(("user", "\udfff"), TELL),  # no UTF-8
]


@pytest.mark.parametrize("line", BAD_CHATS, ids=lambda line: line[:60])
def test_read_chat_names_a_bad_line(tmp_path, line):
    """A bad dialogue is refused with one short line that names the file and the line's number."""
    path = tmp_path / "chat.jsonl"
    path.write_text(jsonl.jsonl_dialogue("2+3", "5") + "\n" + line + "\n", "utf-8")
    with pytest.raises(UserError) as error:
        jsonl.read_chat(path)
    message = str(error.value)
    assert f"{path}, line 3:" in message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe{"])
def test_read_chat_names_a_file_without_dialogues(tmp_path, content):
    """An empty file, or one that is not UTF-8, is refused with one line that names the file."""
    path = tmp_path / "chat.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="chat.jsonl") as error:
        jsonl.read_chat(path)
    assert "\n" not in str(error.value)
