"""Files with one JSON object a line: problems, and dialogues in chat format."""
import json

from engine.errors import UserError


def read_lines(path, wanted, convert):
    """[convert(record)] of a file with one JSON object a line; UserError names a bad line."""
    found = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            got = f"got {line.strip()[:60].decode('utf-8', 'replace')!r}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                found.append(convert(record))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                own = str(error) if isinstance(error, UserError) else f"wanted {wanted} in UTF-8"
                raise UserError(f"{path}, line {number}: {own}, {got}") from None
    if not found:
        raise UserError(f"{path}: this file has no lines, wanted {wanted}")
    return found


def read_chat(path):
    """[(question, response)] of chat-format lines, as SFT trainers read and chat_line() writes."""
    def convert(record):
        user, assistant = record["messages"]
        if (user["role"], assistant["role"]) != ("user", "assistant"):
            raise UserError("wanted one user message and one assistant message")
        (user["content"] + assistant["content"]).encode()
        return user["content"], assistant["content"]
    return read_lines(path, '{"messages": [{"role": "user", "content": TEXT}, '
                      '{"role": "assistant", "content": TEXT}]}', convert)


def chat_line(question, text):
    """One dialogue as a line of chat-format JSON."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
