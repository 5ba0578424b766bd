"""Conversations in four dialects of JSON → messages."""

from typing import Any

from etude.errors import DataError

Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": ...}, ...]

ROLE_OF = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}


def to_messages(record: Any) -> Messages:
    """The conversation in a JSON record. Known dialects: ``conversations`` of role/content or of from/value, ``messages``,
    and ``instruction`` / ``input`` / ``output``. Raises :class:`DataError` saying what is wrong.
    """
    if not isinstance(record, dict):
        raise DataError("not a JSON object")
    if "instruction" in record and "output" in record:
        turns = _from_instruction(record)
    else:
        turns = record.get("conversations", record.get("messages"))
        if turns is None:
            raise DataError("no conversation: expected a key 'conversations', 'messages', or 'instruction' and 'output'")
    if not isinstance(turns, list) or not turns:
        raise DataError("the conversation is empty or not a list")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    if system := record.get("system"):  # ShareGPT keeps the system turn beside the conversation
        if not isinstance(system, str):
            raise DataError(f"'system' is {type(system).__name__}, not text")
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
    return messages


def _from_instruction(record: dict) -> list[dict]:
    for key in ("instruction", "input", "output"):
        if not isinstance(record.get(key, ""), str):
            raise DataError(f"{key!r} is {type(record[key]).__name__}, not text")
    question = "\n".join(part for part in (record["instruction"], record.get("input", "")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _message(turn: Any, number: int) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise DataError(f"turn {number} is not an object")
    role, content = (turn.get(a, turn.get(b)) for a, b in (("role", "from"), ("content", "value")))
    if not isinstance(role, str) or role not in ROLE_OF:
        raise DataError(f"turn {number}: unknown role {role!r}; known: {', '.join(ROLE_OF)}")
    if not isinstance(content, str):
        raise DataError(f"turn {number}: its content is {type(content).__name__}, not text")
    return {"role": ROLE_OF[role], "content": content}


def check_order(messages: Messages) -> None:
    """Raise :class:`DataError` unless turns go (system,) user, assistant, user, assistant, …, with a reply to learn."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            place = number + 1 + len(messages) - len(turns)
            raise DataError(f"turn {place} is by {message['role']!r} where {expected!r} was expected")
        if not message["content"].strip():
            place = number + 1 + len(messages) - len(turns)
            raise DataError(f"turn {place} is empty")
    if len(turns) < 2:
        raise DataError("there is no assistant reply to learn from")
