"""One process a run folder: two that write the same checkpoints would destroy each other's."""

import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from etude import paths
from etude.errors import MismatchError

NAME = ".lock"


class RunLock:
    """Holds ``folder``'s lock while open. Raises :class:`MismatchError` naming the process that holds it already.

    The operating system keeps the lock and lets it go when the process ends, however it ends, so none can be left behind.
    The file's content only tells who it is.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / NAME
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+", encoding="utf-8")
        try:
            _lock(self._file)
        except OSError:
            holder = self._holder()
            self._file.close()
            raise MismatchError(
                f"{paths.typed(self.path.parent)}: another run is training into it ({holder}); wait for it, stop it, "
                "or choose another --output"
            ) from None
        self._file.seek(0)
        self._file.truncate()
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._file.write(json.dumps(who))
        self._file.flush()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # The file stays: deleting it would let a third process lock a new one while a second holds the old.
        self._file.seek(0)
        self._file.truncate()
        self._file.close()

    def _holder(self) -> str:
        try:
            self._file.seek(0)
            who = json.loads(self._file.read())
            return f"pid {who['pid']} on {who['host']} since {who['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "its process is not known"


def _lock(file: IO[str]) -> None:
    """Lock an open file for this process alone, at once or not at all. Raises :class:`OSError` if another has it."""
    if os.name == "nt":
        import msvcrt

        file.seek(2**20)  # a byte far behind the text, which others may then still read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
