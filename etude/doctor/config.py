"""What tool/doctor.py reads. Importing this costs nothing (no torch)."""

from dataclasses import dataclass
from typing import Literal

from etude.cli import option
from etude.errors import UsageError


@dataclass(frozen=True)
class DoctorConfig:
    input: tuple[str, ...] = option(
        (),
        "what to look at: run, model, checkpoint or tokenizer folders, data files; bare words before the options are these, too",
    )
    data: tuple[str, ...] = option((), "data to look at with a model or run (default: what the run's run.yaml names)")
    val_data: tuple[str, ...] = option((), "validation data, of which training must see no row (default: the run's)")
    tokenizer: str = option("", "tokenizer folder: for data alone, or to compare with the model's")
    block_size: int = option(0, "tokens of a training row (0: the run's, else the model's context, else 512)")
    text_key: str = option("text", "key of the text in .jsonl records")
    text_unit: Literal["line", "file"] = option("line", "what one document is in .txt files")
    max_rows: int = option(100_000, "rows to read of each data set (0: all)")
    samples: int = option(32, "rows to put through the model")

    def __post_init__(self) -> None:
        if not self.input:
            raise UsageError("name what to look at: a run, a model, a tokenizer or data (--help explains)")
        if "-" in (*self.input, *self.data, *self.val_data):
            raise UsageError("the doctor reads data more than once, so it cannot come through a pipe; name files")
        for name, least in (("block_size", 0), ("max_rows", 0), ("samples", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} ({getattr(self, name)}) must be at least {least}")
