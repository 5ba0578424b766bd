"""Talking with a person at a terminal, or with a pipe in their place."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from etude.errors import DataError, UsageError


def converse(answer: Callable[[str], None], clear: Callable[[], None]) -> None:
    """Pass on what is typed or piped in, line by line. ``exit`` leaves, ``clear`` begins anew."""
    if sys.stdin.isatty():
        say("Type and press Enter. exit leaves, clear begins anew, Ctrl-C stops an answer.")
    for line in typed_lines():
        if line.strip() == "exit":
            return
        if line.strip() == "clear":
            clear()
            say("[cleared]")
        elif line.strip():
            try:
                answer(line)
            except (UsageError, DataError) as error:  # such as a question too long: the conversation goes on without it
                if not sys.stdin.isatty():
                    raise
                say(f"error: {error}")


def typed_lines() -> Iterator[str]:
    """Lines from the terminal until Ctrl-D or Ctrl-C, or from a pipe, as UTF-8. Raises :class:`DataError` for no UTF-8 and
    for a pipe that brings nothing.
    """
    if not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        nothing = True
        try:
            for line in sys.stdin:
                nothing = nothing and not line.strip()
                yield line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: not UTF-8 ({error.reason}); convert it first") from None
        if nothing:
            raise DataError("standard input: nothing to answer; write a prompt a line, or use --prompt")
        return
    sys.stdin.reconfigure(errors="replace")  # erasing half a Chinese character must not end the program
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives input() line editing and history
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def say(notice: str) -> None:
    """Tell the person, on standard error: standard output holds answers and nothing else."""
    print(notice, file=sys.stderr, flush=True)
