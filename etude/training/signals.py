"""Being asked to stop: SIGINT (Ctrl-C), SIGTERM and SIGHUP set a flag, and the loop ends its step, saves and leaves."""

import os
import select
import signal
import threading
from contextlib import suppress
from types import FrameType

from etude.parallel import Processes

NUMBERS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: no SIGHUP
STDOUT, STDERR = 1, 2  # descriptors


class StopSignals:
    """While open, SIGINT, SIGTERM and SIGHUP (the terminal was closed) only set :attr:`received`. A further one changes
    nothing: the save under way must not be lost to impatience. Under nohup SIGHUP stays ignored.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.received = False
        self._processes = processes or Processes()
        self._agreed = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in NUMBERS:
                if signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether the run is to stop. With several processes: as they agreed last, so that all stop after the same step."""
        return self.received if self._processes.count == 1 else self._agreed

    def agree(self, step: int) -> None:
        """Ask the other processes whether one of them was told to stop. All have to come here after ``step``."""
        self._agreed = self._processes.any(self.received, step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, True
        name = signal.Signals(number).name
        if name == "SIGHUP":
            _leave_closed_terminal()
        if first:
            _tell(f"\n{name}: finishing this step, then saving\n")


def _tell(text: str) -> None:
    """Write to standard error from a signal handler: not with print(), which raises RuntimeError when the signal came in the
    middle of another print(), and only if there is room: a pipe that nobody reads would hold up the save.
    """
    with suppress(OSError, ValueError):
        if os.name == "nt" or select.select([], [STDERR], [], 0)[1]:  # Windows can ask this of sockets only
            os.write(STDERR, text.encode())


def _leave_closed_terminal() -> None:
    """Send what is printed from now on nowhere if the terminal is gone: each print would be an error of the disk (EIO)."""
    for descriptor in (STDOUT, STDERR):
        try:
            os.write(descriptor, b"")
        except OSError:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
