"""One process a folder: two that write the same files would destroy each other's."""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from etude import paths
from etude.errors import MismatchError

NAME = ".lock"
POLL_SECONDS = 0.2


class FolderLock:
    """Holds ``folder``'s lock while open. If another process has it, waits for it, or with ``wait=False`` raises
    :class:`MismatchError` naming that process.

    The operating system keeps the lock and lets it go when the process ends, however it ends, so none can be left behind.
    The file's content only tells whose it is.
    """

    def __init__(self, folder: str | Path, wait: bool = False):
        self.path = Path(folder) / NAME
        self.waited = False  # whether another process had it first
        self._wait = wait
        self._file: IO[str] | None = None

    def __enter__(self) -> "FolderLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+", encoding="utf-8")
        told = False
        while not _locked(self._file):
            self.waited = True
            if not self._wait:
                holder = self._holder()
                self._file.close()
                raise MismatchError(
                    f"{paths.typed(self.path.parent)}: another run is training into it ({holder}); wait for it, stop it, "
                    "or choose another --output"
                )
            if not told:
                told = True
                print(f"waiting   for {self._holder()}, who is at work on the same", flush=True)
            time.sleep(POLL_SECONDS)
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
        _unlock(self._file)  # closing alone would leave it to a child that was forked meanwhile
        self._file.close()

    def _holder(self) -> str:
        try:
            self._file.seek(0)
            who = json.loads(self._file.read())
            return f"pid {who['pid']} on {who['host']} since {who['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "its process is not known"


def _locked(file: IO[str]) -> bool:
    """Lock an open file for this process alone; False if another has it. Where the file system knows no locks, True."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(2**20)  # a byte far behind the text, which others may then still read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        print(f"warning: {file.name}: cannot be locked ({error.strerror}); see that no second run writes here", file=sys.stderr)
    return True


def _unlock(file: IO[str]) -> None:
    with contextlib.suppress(OSError):
        if os.name == "nt":
            import msvcrt

            file.seek(2**20)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_UN)
