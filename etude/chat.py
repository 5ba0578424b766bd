"""Conversations: four dialects of JSON in, messages out; messages in, token ids and the loss mask out.

The tokenizer's chat template is the one source of the format. It renders the structure; the ids are the concatenation of
separately encoded pieces, the template's own text with special tokens on and each message's content with them off. So a
``<|im_end|>`` that somebody typed stays text, and a supervised span is exact whatever the content.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from etude.errors import DataError
from etude.tokenizer import Tokenizer

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


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as ids, and which of them a model is to learn: the replies and their end tokens."""

    ids: list[int]
    mask: list[bool]  # True: supervised; as long as ids
    ends: list[int]  # where each reply's end token stands, or would stand, +1: a whole conversation may be cut there


class ChatFormat:
    """Encodes conversations in the format of a tokenizer's chat template."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._structure = lru_cache(maxsize=4096)(self._split_template)

    def encode(self, messages: Messages) -> EncodedChat:
        """Ids and mask of a whole conversation, for training."""
        return self.encode_batch([messages])[0]

    def encode_batch(self, conversations: Sequence[Messages]) -> list[EncodedChat]:
        """:meth:`encode` of many conversations, on all cores."""
        contents = self.tokenizer.encode_batch([message["content"] for messages in conversations for message in messages])
        encoded, at = [], 0
        for messages in conversations:
            encoded.append(self._join(messages, contents[at : at + len(messages)], add_generation_prompt=False))
            at += len(messages)
        return encoded

    def prompt(self, messages: Messages) -> list[int]:
        """Ids up to where the next reply begins: always a prefix of the ids that the answered conversation has."""
        contents = self.tokenizer.encode_batch([message["content"] for message in messages])
        return self._join(messages, contents, add_generation_prompt=True).ids

    def _join(self, messages: Messages, contents: Sequence[list[int]], add_generation_prompt: bool) -> EncodedChat:
        pieces = self._structure(tuple(message["role"] for message in messages), add_generation_prompt)
        ids, mask, ends = list(pieces[0]), [False] * len(pieces[0]), []
        for message, content, piece in zip(messages, contents, pieces[1:], strict=True):
            learnt = message["role"] == "assistant"
            ids += content
            mask += [learnt] * len(content)
            ids += piece
            # Of the template's text after a reply only the token that ends it is learnt.
            ends_turn = learnt and bool(piece) and piece[0] in self.tokenizer.special_ids
            mask += [ends_turn] + [False] * (len(piece) - 1) if piece else []
            if learnt:
                ends.append(len(ids) - len(piece) + ends_turn)
        return EncodedChat(ids, mask, ends)

    def _split_template(self, roles: tuple[str, ...], add_generation_prompt: bool) -> list[list[int]]:
        """Ids of the template's text before, between and after the contents of messages with these roles."""
        markers = [f"\ue000{number}\ue001" for number in range(len(roles))]  # private-use characters: in no template
        text = self.tokenizer.render(tuple(zip(roles, markers, strict=True)), add_generation_prompt)
        pieces = []
        for marker in markers:
            before, found, text = text.partition(marker)
            if not found:
                raise DataError(f"the chat template leaves out a message (roles: {', '.join(roles)})")
            pieces.append(self.tokenizer.encode_template(before))
        return [*pieces, self.tokenizer.encode_template(text)]

    def verify(self, messages: Messages) -> None:
        """Raise :class:`DataError` unless the ids decode to just what the template renders for ``messages``: a template
        that strips or rewrites contents would make training and other programs' prompts differ.
        """
        rendered = self.tokenizer.render(tuple((message["role"], message["content"]) for message in messages))
        joined = self.tokenizer.decode(self.encode(messages).ids)
        if rendered != joined:
            raise DataError(f"the chat template rewrites contents: it renders {rendered!r}, the ids say {joined!r}")
