"""Files with one JSON object a line, and dialogues in the chat format that SFT trainers read."""
import codecs
import json

from engine.errors import UserError


def read_lines(path, wanted, convert):
    """[convert(record)] of a file with one JSON object a line. UserError names the first line that
    is not as `wanted`, a text, says."""
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                records.append(convert(json.loads(line.decode("utf-8"))))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                got = line.strip()[:60].decode("utf-8", "replace")
                reason = f"wanted {wanted} in UTF-8"
                if isinstance(error, UserError):
                    reason = str(error)
                raise UserError(f"{path}, line {number}: {reason}, got {got!r}") from None
    if not records:
        raise UserError(f"{path}: this file has no lines, wanted {wanted}")
    return records


def read_chat(path):
    """[(question, response)] of a file of dialogues."""
    def convert(record):
        user, assistant = record["messages"]
        if (user["role"], assistant["role"]) != ("user", "assistant"):
            raise UserError("wanted one user message and one assistant message")
        question, response = user["content"], assistant["content"]
        (question + response).encode()  # ValueError if a character has no UTF-8
        return question, response
    return read_lines(path, '{"messages": [{"role": "user", "content": TEXT}, '
                      '{"role": "assistant", "content": TEXT}]}', convert)


def jsonl_dialogue(question, text):
    """One dialogue as a line of JSON, which read_chat() reads."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
