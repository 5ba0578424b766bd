"""Text in, text out: a model folder as a Python object.

    model = etude.load("weight/etude_sft_model")
    model.chat("Where does the fox live?")
    model.complete(["Once upon a time", "从前"], temperature=0, max_new_tokens=50)
    for piece in model.stream_chat("Tell me a story."):
        print(piece, end="", flush=True)

``settings`` are the fields of :class:`~etude.generation.plain.SamplingSettings`, by name.
"""

import codecs
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
import torch.nn.functional as F

from etude.chat import ChatFormat
from etude.corpus.conversations import Messages, to_messages
from etude.corpus.jsonl import unencodable
from etude.device import PRECISIONS, pick_device, pick_precision
from etude.errors import DataError, MismatchError, UsageError
from etude.generation.plain import generate
from etude.generation.settings import SamplingSettings
from etude.llama import load_any
from etude.model.transformer import Etude
from etude.tokenizer import Tokenizer


def load(folder: str | Path, device: str = "auto", precision: str = "auto", verify: bool = False) -> "TextModel":
    """The model in ``folder``, Etude's own or in Llama format, which holds all it needs: config.json, the weights and the
    tokenizer's files.

    ``precision`` "auto" is fp32 everywhere: answers are then the same in any batch, ties aside. "bf16" halves the
    memory and is faster on hardware that multiplies it. ``verify`` compares a foreign model with transformers first.
    """
    chosen = pick_device(device)
    dtype = PRECISIONS["fp32" if precision == "auto" else pick_precision(precision, chosen)]
    return TextModel(load_any(folder, chosen, dtype, verify), Tokenizer(folder))


@dataclass(frozen=True)
class Reply:
    """The text a model gave, and why it ended: "stop" (an end token or a stop string) or "length"."""

    text: str
    finish_reason: str


class TextModel:
    """A model and its tokenizer. Text handed in can never become a control token, whatever it says."""

    def __init__(self, model: Etude, tokenizer: Tokenizer):
        if len(tokenizer) > model.config.vocab_size:
            raise MismatchError(
                f"{tokenizer.folder}: the tokenizer has {len(tokenizer)} tokens, the model only {model.config.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.chat_format = ChatFormat(tokenizer)
        self.context = model.config.max_position_embeddings
        self.stop_ids = frozenset({tokenizer.eos_id, tokenizer.document_end_id})
        # What has no text to show, other than the ends: control tokens, and the padding of the model's vocabulary.
        beyond = range(len(tokenizer), model.config.vocab_size)
        self.forbidden_ids = frozenset(tokenizer.special_ids | frozenset(beyond)) - self.stop_ids

    @overload
    def complete(self, prompt: str, **options) -> str: ...
    @overload
    def complete(self, prompt: Sequence[str], **options) -> list[str]: ...

    def complete(self, prompt, *, stop=(), batch_size=16, **settings):
        """What follows ``prompt``, without the prompt; a list of texts for a list of prompts.

        ``stop`` is a string, or several, that ends an answer and is not part of it.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        replies = self.replies([self.completion_ids(text) for text in prompts], stop, batch_size, **settings)
        texts = [reply.text for reply in replies]
        return texts[0] if isinstance(prompt, str) else texts

    @overload
    def chat(self, messages: str | Messages, **options) -> str: ...
    @overload
    def chat(self, messages: Sequence[str] | Sequence[Messages], **options) -> list[str]: ...

    def chat(self, messages, *, stop=(), batch_size=16, **settings):
        """The reply to a question or a conversation, ``[{"role": "user", "content": ...}, ...]``; a list of replies for a
        list of questions or conversations. A conversation longer than the context is refused; ``fit_history`` cuts it.
        """
        single = isinstance(messages, str) or (len(messages) > 0 and isinstance(messages[0], dict))
        conversations = [messages] if single else messages
        replies = self.replies([self.chat_ids(conversation) for conversation in conversations], stop, batch_size, **settings)
        texts = [reply.text for reply in replies]
        return texts[0] if single else texts

    def stream_complete(self, prompt: str, *, stop: str | Sequence[str] = (), **settings) -> Generator[str, None, str]:
        """:meth:`complete` in pieces as they come, each of whole characters. The generator's return value is the
        finish reason. The pieces joined are what :meth:`complete` returns under the same seed.
        """
        return (yield from self._stream(self.completion_ids(prompt), stop, settings))

    def stream_chat(self, messages: str | Messages, *, stop: str | Sequence[str] = (), **settings) -> Generator[str, None, str]:
        """:meth:`chat` in pieces, as :meth:`stream_complete` does it."""
        return (yield from self._stream(self.chat_ids(messages), stop, settings))

    def loss(self, text: str) -> float:
        """Mean cross-entropy of ``text`` in nats per token.

        Every token counts once, the first one too: it is predicted from what stands before any document. A text longer
        than the context is read in windows of the context's length that overlap by half, so each later token is
        predicted from at least half a context.
        """
        first = self.tokenizer.document_end_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        ids = [first, *self._encode(text)]
        if len(ids) == 1:
            raise UsageError("the text is empty (0 tokens): give at least one character to measure")
        total, done = 0.0, 1  # ids[:done] have been predicted
        while done < len(ids):
            end = min(len(ids), done + (self.context if done == 1 else max(1, self.context // 2)))
            window = ids[max(0, end - 1 - self.context) : end]
            total += self._window_loss(window, end - done)
            done = end
        return total / (len(ids) - 1)

    def perplexity(self, text: str) -> float:
        """exp of :meth:`loss`: among how many equally likely tokens the model is in doubt, on average."""
        return math.exp(self.loss(text))

    # What the calls above are made of.

    def completion_ids(self, text: str) -> list[int]:
        """A text to continue as ids. An empty one begins a document."""
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self._encode(text) or [self.tokenizer.document_end_id]

    def chat_ids(self, messages: str | Messages) -> list[int]:
        """A question or a conversation as ids, up to where the reply begins."""
        turns = to_messages({"messages": [{"role": "user", "content": messages}] if isinstance(messages, str) else messages})
        if turns[-1]["role"] == "assistant":
            raise UsageError("the conversation ends with the assistant's turn: there is nothing to answer; add a question")
        for turn in turns:
            _check_text(turn["content"])
        return self.chat_format.prompt(turns)

    def replies(
        self,
        prompts: Sequence[Sequence[int]],
        stop: str | Sequence[str] = (),
        batch_size: int = 16,
        first_row: int = 0,
        **settings,
    ) -> list[Reply]:
        """Answer prompts given as ids, ``batch_size`` at a time; ``first_row`` as for :func:`generate`."""
        if batch_size < 1:
            raise UsageError(f"batch_size ({batch_size}) must be at least 1")
        sampling, stop = SamplingSettings(**settings), _stop_strings(stop)
        found = []
        for at in range(0, len(prompts), batch_size):
            batch = prompts[at : at + batch_size]
            pieces, reasons = zip(*self._decode(batch, sampling, stop, first_row + at), strict=True)
            found += map(Reply, map("".join, zip(*pieces, strict=True)), reasons[-1])
        return found

    def _stream(self, ids: list[int], stop: str | Sequence[str], settings: dict) -> Generator[str, None, str]:
        reason = ""
        for pieces, reasons in self._decode([ids], SamplingSettings(**settings), _stop_strings(stop), first_row=0):
            if pieces[0]:
                yield pieces[0]
            reason = reasons[0]
        return reason

    def _decode(
        self, prompts: Sequence[Sequence[int]], settings: SamplingSettings, stop: tuple[str, ...], first_row: int
    ) -> Iterator[tuple[list[str], list[str | None]]]:
        """Each step's new text of every row, and why rows have ended (None: they go on)."""
        decoders = [TextDecoder(self.tokenizer, stop) for _ in prompts]
        reasons: list[str | None] = [None] * len(prompts)
        pad_id = self.tokenizer.pad_id
        for step in generate(self.model, prompts, settings, self.stop_ids, pad_id, self.forbidden_ids, first_row):
            pieces = [""] * len(prompts)
            for row, decoder in enumerate(decoders):
                if reasons[row] is not None:
                    continue
                if (token := step.tokens[row]) is not None:
                    pieces[row] = decoder.push(token)
                if step.reasons[row] is not None:
                    pieces[row] += decoder.finish()
                reasons[row] = "stop" if decoder.stopped else step.reasons[row]
            yield pieces, list(reasons)
            if None not in reasons:  # stop strings may have ended rows that generate() would go on with
                return

    def _encode(self, text: str) -> list[int]:
        _check_text(text)
        return self.tokenizer.encode(text)

    @torch.inference_mode()
    def _window_loss(self, ids: list[int], count: int) -> float:
        """The summed cross-entropy of the last ``count`` of ``ids``, each predicted from those before it."""
        window = torch.tensor([ids], device=self.model.head_weight.device)
        hidden = self.model.hidden(window[:, :-1])[0, -count:]  # (count, D)
        return F.cross_entropy(self.model.logits(hidden).float(), window[0, -count:], reduction="sum").item()


class TextDecoder:
    """One row's tokens to text that can be shown at once: whole characters, and nothing of a stop string or after it.

    A byte-level token may hold part of a character, and a stop string may straddle tokens; so bytes wait until they make
    a character, and text that may turn out to begin a stop string waits until it cannot. What comes out in all is the same
    however the text was cut into tokens.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stopped = False
        self._token_bytes, self._stop, self._held = tokenizer.token_bytes, stop, ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # bytes that never make a character: U+FFFD

    def push(self, token: int) -> str:
        """The text that ``token`` completes; often all of its own."""
        return self._release(self._utf8.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """What was still waiting; half a character becomes U+FFFD."""
        return self._release(self._utf8.decode(b"", final=True), last=True)

    def _release(self, text: str, last: bool = False) -> str:
        if self.stopped:
            return ""
        self._held += text
        starts = {stop: self._held.find(stop) for stop in self._stop}
        ends = [(start + len(stop), start) for stop, start in starts.items() if start >= 0]
        if ends:  # the one that is complete first ends the text
            self.stopped = True
            return self._held[: min(ends)[1]]
        begun = [n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        shown = len(self._held) - (0 if last else max(begun, default=0))
        text, self._held = self._held[:shown], self._held[shown:]
        return text


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in strings:
        raise UsageError("stop ('') must be at least one character; leave it out to have none")
    return strings


def _check_text(text: str) -> None:
    if problem := unencodable(text):
        raise DataError(f"the text {problem}; mend it first")
