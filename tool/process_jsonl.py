"""Work on JSONL corpora: check, count, convert, filter, deduplicate, shuffle, split, merge, sample, look at rows."""

import importlib
from collections.abc import Callable

from etude import cli

ROWS = "etude.corpus.rows"
COMMANDS = {  # a command's function stands beside its config, and has its name
    "check": (f"{ROWS}.survey.CheckConfig", "name every row that training would refuse, by file and line"),
    "stats": (f"{ROWS}.survey.StatsConfig", "rows, bytes, lengths, scripts, languages, exact repeats, turns, tokens"),
    "convert": (f"{ROWS}.convert.ConvertConfig", "text, Markdown, CSV, Parquet and JSON dialects to one kind of rows"),
    "filter": (f"{ROWS}.quality.FilterConfig", "keep rows by length, language, pattern, repetition and quality"),
    "dedup": (f"{ROWS}.dedup.DedupConfig", "leave out rows whose text is the same as, or much like, an earlier one's"),
    "shuffle": (f"{ROWS}.arrange.ShuffleConfig", "put rows in a random order, however many"),
    "split": (f"{ROWS}.deal.SplitConfig", "divide rows into training and held-out files"),
    "merge": (f"{ROWS}.arrange.MergeConfig", "put files together, by weights if wanted"),
    "sample": (f"{ROWS}.arrange.SampleConfig", "draw some rows"),
    "show": (f"{ROWS}.show.ShowConfig", "print rows, or their tokens and loss mask"),
}


def main() -> None:
    command, config = cli.parse_commands(COMMANDS, __doc__)
    function = getattr(importlib.import_module(type(config).__module__), command)
    function(config, **encoders(command, getattr(config, "tokenizer", "")))


def encoders(command: str, folder: str) -> dict[str, Callable]:
    """What stats and show need of a tokenizer; the corpus tools themselves know of none."""
    if not folder:
        return {}
    from etude.chat import ChatFormat
    from etude.tokenizer import Tokenizer

    tokenizer = Tokenizer(folder)
    if command == "stats":
        return {"count_tokens": lambda texts: list(map(len, tokenizer.encode_batch(texts)))}
    chat = ChatFormat(tokenizer)

    def encode_chat(messages) -> tuple[list[int], list[bool]]:
        encoded = chat.encode(messages)
        return encoded.ids, encoded.mask

    def decode(token: int) -> str:
        content = tokenizer.token_bytes(token)
        try:
            return content.decode("utf-8") or tokenizer.decode([token])
        except UnicodeDecodeError:  # a part of a character
            return f"⟨{content.hex(' ')}⟩"

    return {"encode_text": tokenizer.encode, "encode_chat": encode_chat, "decode": decode}


if __name__ == "__main__":
    cli.run(main)
