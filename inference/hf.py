"""Chat with an exported model through Hugging Face transformers, as any other program would use it.

    python inference/hf.py                                        chat
    python inference/hf.py generate --prompt "Once upon a time"   go on from a text
    python inference/hf.py < questions.txt                        one question a line

The native counterpart, and the faster one to start, is inference.py.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from etude import cli, paths
from etude.cli import option
from etude.errors import MismatchError, UsageError
from etude.generation.settings import SamplingSettings
from etude.terminal import converse, say

COMMANDS = {"chat": "answer questions, remembering the conversation", "generate": "go on from a text"}
SUFFIX = "_llama_format"
DEFAULT_MODEL = paths.weight("etude_sft_model" + SUFFIX)


@dataclass(frozen=True)
class HFConfig(SamplingSettings):
    model: str = option(DEFAULT_MODEL, "folder in Llama format, as tool/convert_hf.py writes it")
    prompt: str | None = option(None, "answer this and leave")
    system: str = option("", "chat: a system message to begin the conversation with")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")


def main() -> None:
    command, config = cli.parse(HFConfig, __doc__.splitlines()[0], commands=COMMANDS)
    if config.system and command == "generate":
        raise UsageError("--system belongs to chat; leave it out of generate")
    ensure_exported(Path(config.model))
    model = HFModel(config)
    answer = model.chat if command == "chat" else model.go_on
    if config.prompt is not None:
        answer(config.prompt)
        return
    converse(answer, model.clear)


def ensure_exported(folder: Path) -> None:
    """See that ``folder`` holds an export of the model beside it as that is now. Where it doesn't, export on a terminal,
    else raise :class:`MismatchError` with the command to run.
    """
    source, name = folder.with_name(folder.name.removesuffix(SUFFIX)), paths.typed(folder)
    exists, has_source = (folder / "config.json").is_file(), source != folder and (source / "config.json").is_file()
    if not exists and not has_source:
        remedy = "python train/train_sft.py" if str(folder) == DEFAULT_MODEL else "python tool/convert_hf.py --input MODEL"
        raise MismatchError(f"{name}: there is no exported model here; run: {remedy}")
    from etude.export import export_is_current, export_llama, export_record
    from etude.weights import MODEL_TYPE, read_config_json

    if exists and read_config_json(folder).get("model_type") == MODEL_TYPE:
        raise MismatchError(f"{name}: this is the model as trained; run: python tool/convert_hf.py --input {name}")
    if not has_source or (exists and export_is_current(source, folder)):
        return
    record = export_record(folder)
    options = {key: record[key] for key in ("dtype", "license") if key in record}  # as last time
    flags = [f"--{key}={value}" for key, value in {"input": paths.typed(source), "output": name, **options}.items()]
    command = shlex.join(["python", "tool/convert_hf.py", *flags])
    reason = f"{name}: " + ("the model has changed since it was exported" if exists else "the model is not exported yet")
    if not sys.stdin.isatty():
        raise MismatchError(f"{reason}; run: {command}")
    say(f"{reason}; exporting: {command}")
    export_llama(source, folder, **options)


class HFModel:
    """A model that transformers loaded, and the conversation with it."""

    def __init__(self, config: HFConfig):
        import torch

        from etude.chat import ChatFormat
        from etude.device import pick_device
        from etude.llama import load_transformers
        from etude.tokenizer import Tokenizer

        self.config, self.device = config, pick_device(config.device)
        self.model = load_transformers(config.model, torch.float32).to(self.device)
        self.context, vocab_size = self.model.config.max_position_embeddings, self.model.config.vocab_size
        # Not transformers' apply_chat_template, which encodes the rendered text as a whole: whoever types <|im_end|> would
        # end his turn and could go on as the assistant. ChatFormat gives the same ids, but what is typed stays text.
        self.tokenizer = Tokenizer(config.model)
        self.chat_format = ChatFormat(self.tokenizer)
        self.stop_ids = {self.tokenizer.eos_id, self.tokenizer.document_end_id}
        wordless = self.tokenizer.special_ids | set(range(len(self.tokenizer), vocab_size))
        sampling = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        self.options = {
            **({"do_sample": True, **sampling} if config.temperature else {"do_sample": False}),
            "repetition_penalty": config.repetition_penalty,
            "eos_token_id": sorted(self.stop_ids),
            "pad_token_id": self.tokenizer.pad_id,
            "suppress_tokens": sorted(wordless - self.stop_ids) or None,
        }
        self.clear()

    def clear(self) -> None:
        self.messages = [{"role": "system", "content": self.config.system}] if self.config.system else []

    def chat(self, question: str) -> None:
        """Answer ``question`` in the conversation so far, as much of it as the context holds."""
        from etude.generation.history import fit_history

        messages = [*self.messages, {"role": "user", "content": question}]
        reserve = min(self.config.max_new_tokens, self.context // 4)
        messages, dropped = fit_history(self.chat_format, messages, self.context, reserve)
        if dropped:
            say(f"[the context of {self.context} tokens is full; turns forgotten, oldest first: {dropped}]")
        reply = self.stream(self.chat_format.prompt(messages))
        self.messages = [*messages, {"role": "assistant", "content": reply}]

    def go_on(self, text: str) -> None:
        """Print what follows ``text``; an empty one begins a document."""
        bos = self.tokenizer.bos_id
        self.stream(([] if bos is None else [bos]) + self.tokenizer.encode(text) or [self.tokenizer.document_end_id])

    def stream(self, ids: list[int]) -> str:
        """Print the answer to ``ids`` as it comes, and return it."""
        import torch

        from etude.generation.plain import check_prompt

        check_prompt(ids, self.context)
        if self.config.seed is not None:
            torch.manual_seed(self.config.seed)
        row, printer = torch.tensor([ids], device=self.device), Printer(self.tokenizer)
        limit = min(self.config.max_new_tokens, self.context - len(ids))
        try:
            new = self.model.generate(
                row, attention_mask=torch.ones_like(row), streamer=printer, max_new_tokens=limit, **self.options
            )
            if new[0, -1].item() not in self.stop_ids:
                say("[the answer is cut: --max_new_tokens or the context is used up]")
        except KeyboardInterrupt:
            printer.end()
            if not sys.stdin.isatty():
                raise
            say("[stopped]")
        return printer.text


class Printer:
    """A streamer for transformers' ``generate`` that prints whole characters only; its own hold back whole words."""

    def __init__(self, tokenizer):
        from etude.generation.text import TextDecoder

        self.decoder, self.text, self.seen_prompt = TextDecoder(tokenizer), "", False

    def put(self, ids) -> None:
        if self.seen_prompt:
            self._show("".join(self.decoder.push(token) for token in ids.flatten().tolist()))
        self.seen_prompt = True  # generate hands over the prompt first

    def end(self) -> None:
        self._show(self.decoder.finish() + "\n")
        self.text = self.text.removesuffix("\n")

    def _show(self, text: str) -> None:
        print(text, end="", flush=True)
        self.text += text


if __name__ == "__main__":
    cli.run(main)
