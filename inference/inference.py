"""Chat with a model, or let it go on from a text: interactively, with one prompt, or with a file of them.

    python inference/inference.py                                          chat with the newest stage's model
    python inference/inference.py complete --prompt "Once upon a time"     one answer
    python inference/inference.py chat --input questions.txt --output answers.jsonl

The options are explained by --help, the exit codes in etude/errors.py.
"""

import dataclasses
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from etude import cli, paths
from etude.cli import option
from etude.errors import DataError, EtudeError, MismatchError, UsageError
from etude.generation.settings import SamplingSettings, sampling_of
from etude.terminal import converse, say

COMMANDS = {"chat": "answer questions, remembering the conversation", "complete": "go on from a text"}


def newest_model() -> str:
    fine_tuned, pretrained = paths.weight("etude_sft_model"), paths.weight("etude_pretrained_model")
    return fine_tuned if (Path(fine_tuned) / "config.json").is_file() else pretrained


@dataclass(frozen=True)
class InferenceConfig(SamplingSettings):
    model: str = option(newest_model, "model folder: the fine-tuned model if there is one, else the pretrained one")
    prompt: str | None = option(None, "answer this and leave")
    input: str = option("", "answer a file: .txt with a prompt a line, or .jsonl with prompts or conversations")
    output: str = option("", "where --input's answers go, as JSONL; left out: standard output")
    batch_size: int = option(8, "prompts of --input answered at a time")
    system: str = option("", "chat: a system message to begin the conversation with")
    stop: tuple[str, ...] = option((), "strings that end an answer and are not shown")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = option("auto", "fp32, bf16 or fp16; auto is fp32")


def main() -> None:
    command, config = cli.parse(InferenceConfig, __doc__.splitlines()[0], commands=COMMANDS)
    check(command, config)
    from etude.generation.text import load

    settings = sampling_of(config)
    model = load(config.model, config.device, config.precision)
    say(f"{paths.typed(config.model)}: {model.model.config.num_parameters()['total']:,} parameters, context {model.context}")
    if config.input:
        answer_file(model, command, config, settings)
    elif config.prompt is not None:
        show(answer(model, command, [*opening(config), user(config.prompt)], config, settings))
    else:
        hold_conversation(model, command, config, settings)


def check(command: str, config: InferenceConfig) -> None:
    if config.input and config.prompt is not None:
        raise UsageError("--prompt and --input were both given; choose one")
    if config.output and not config.input:
        raise UsageError("--output holds the answers to --input; give --input as well, or leave it out")
    if config.output and Path(config.output).resolve() == Path(config.input).resolve():
        raise UsageError(f"--output ({config.output}) would overwrite --input; name another file")
    if config.system and command == "complete":
        raise UsageError("--system belongs to chat; leave it out of complete")
    if config.batch_size < 1:
        raise UsageError(f"batch_size ({config.batch_size}) must be at least 1")
    if not (Path(config.model) / "config.json").is_file():
        stages = "python train/train_pretrain.py" + (", then: python train/train_sft.py" if command == "chat" else "")
        raise MismatchError(f"{paths.typed(config.model)}: there is no model here; run: {stages}; or name one with --model")


def answer(model, command: str, messages: list[dict], config: InferenceConfig, settings: dict) -> Generator[str, None, str]:
    """Stream the answer to the newest message; earlier ones that the context cannot hold are left out, with a notice."""
    from etude.generation.history import fit_history

    if command == "complete":
        return (yield from model.stream_complete(messages[-1]["content"], stop=config.stop, **settings))
    reserve = min(config.max_new_tokens, model.context // 4)
    kept, dropped = fit_history(model.chat_format, messages, model.context, reserve)
    if dropped:
        say(f"[the context of {model.context} tokens is full; turns forgotten, oldest first: {dropped}]")
    return (yield from model.stream_chat(kept, stop=config.stop, **settings))


def show(stream: Generator[str, None, str], stoppable: bool = False) -> str:
    """Print an answer as it comes, and return it. If ``stoppable``, Ctrl-C ends the answer and not the program."""
    text = ""
    try:
        while True:
            piece = next(stream)
            print(piece, end="", flush=True)
            text += piece
    except StopIteration as end:
        print(flush=True)
        if end.value == "length":
            say("[the answer is cut: --max_new_tokens or the context is used up]")
    except KeyboardInterrupt:
        print(flush=True)
        if not stoppable:
            raise
        say("[stopped]")
    return text


def hold_conversation(model, command: str, config: InferenceConfig, settings: dict) -> None:
    """Answer what is typed or piped in, line by line, remembering what was said."""
    messages = opening(config)

    def reply_to(line: str) -> None:
        reply = show(answer(model, command, [*messages, user(line)], config, settings), stoppable=sys.stdin.isatty())
        messages.extend([user(line), {"role": "assistant", "content": reply}])

    def clear() -> None:
        messages[:] = opening(config)

    converse(reply_to, clear)


def answer_file(model, command: str, config: InferenceConfig, settings: dict) -> None:
    """Answer every prompt of --input in order; each batch is written as soon as it is done."""
    prompts = list(read_prompts(model, command, config))
    if not prompts:
        raise DataError(f"{config.input}: no prompts in it; write one a line")
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    with open(config.output, "w", encoding="utf-8", newline="\n") if config.output else nullcontext(sys.stdout) as file:
        for at in range(0, len(prompts), config.batch_size):
            batch = prompts[at : at + config.batch_size]
            replies = model.replies([ids for _, ids in batch], config.stop, config.batch_size, first_row=at, **settings)
            for (record, _), reply in zip(batch, replies, strict=True):
                print(json.dumps({**record, **dataclasses.asdict(reply)}, ensure_ascii=False), file=file)
            file.flush()
            say(f"{at + len(batch)} of {len(prompts)} answered")


def read_prompts(model, command: str, config: InferenceConfig) -> Iterator[tuple[dict, list[int]]]:
    """Each prompt as it goes into the output, and as ids. A conversation's last reply, if it has one, is left aside."""
    from etude.corpus.inputs import find_files, kind_of
    from etude.corpus.jsonl import Rejects, read_lines, read_records
    from etude.generation.plain import check_prompt

    for path in find_files([config.input]):
        if kind_of(path) == ".jsonl":
            records = read_records(path, Rejects())
        else:
            records = ((f"{path}:{number}", {"prompt": line}) for number, line in read_lines(path) if line.strip())
        for place, record in records:
            try:
                ids = prompt_ids(model, command, config, record)
                check_prompt(ids, model.context)
            except EtudeError as error:
                raise DataError(f"{place}: {error}") from None
            yield record, ids


def prompt_ids(model, command: str, config: InferenceConfig, record: dict) -> list[int]:
    from etude.corpus.conversations import to_messages

    if command == "complete" or "prompt" in record:
        if not isinstance(record.get("prompt"), str):
            raise DataError(f"no text under the key 'prompt' (found: {', '.join(record) or 'none'})")
        if command == "complete":
            return model.completion_ids(record["prompt"])
        messages = [user(record["prompt"])]
    else:
        messages = to_messages(record)
        if messages[-1]["role"] == "assistant":
            messages.pop()
    return model.chat_ids(messages if messages[:1] and messages[0]["role"] == "system" else opening(config) + messages)


def opening(config: InferenceConfig) -> list[dict]:
    return [{"role": "system", "content": config.system}] if config.system else []


def user(text: str) -> dict:
    return {"role": "user", "content": text}


if __name__ == "__main__":
    cli.run(main)
