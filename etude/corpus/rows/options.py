"""What the tools for rows have in common on the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etude.cli import option
from etude.errors import UsageError

INPUT = "JSONL files, folders, globs, or - for standard input"


@dataclass(frozen=True)
class JobConfig:
    """Rows in, rows out: every tool that writes rows to one place as they stood."""

    input: tuple[str, ...] = option((), INPUT)
    output: str = option("", "file to write, compressed by its ending, or - for standard output")
    max_bad: int = option(0, "bad rows to set aside before giving up")
    force: bool = option(False, "overwrite the output")

    def __post_init__(self) -> None:
        require_at_least(0, self, "max_bad")


def require_at_least(least: float, config: Any, *names: str) -> None:
    """Raise :class:`UsageError` for the first of these options that is below ``least``."""
    for name in names:
        if getattr(config, name) < least:
            raise UsageError(f"{name} ({getattr(config, name)}) must be at least {least}")


def numbers_of(name: str, values: Sequence[str]) -> list[float]:
    """Numbers above 0, with commas or spaces between. Raises :class:`UsageError`."""
    try:
        numbers = [float(value) for value in ",".join(values).split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < float("inf") for number in numbers):
        raise UsageError(f"{name} ({' '.join(values)}) must be numbers above 0, with commas between")
    return numbers
