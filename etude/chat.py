"""Conversations as token ids and loss mask.

The tokenizer's chat template is the one source of the format. It renders the structure; the ids are the concatenation of
separately encoded pieces, the template's own text with special tokens on and each message's content with them off. So a
``<|im_end|>`` that somebody typed stays text, and a supervised span is exact whatever the content.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from etude.corpus.conversations import Messages
from etude.errors import DataError
from etude.tokenizer import Tokenizer


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
