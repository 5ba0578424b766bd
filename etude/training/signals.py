"""Being asked to stop: SIGINT (Ctrl-C) and SIGTERM set a flag, and the loop ends its step, saves and leaves."""

import signal
import sys
import threading
from types import FrameType

from etude.parallel import Processes


class StopSignals:
    """While open, SIGINT and SIGTERM only set :attr:`received`. A further one changes nothing: the save under way must
    not be lost to impatience.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        self.received = False
        self._processes = processes or Processes()
        self._agreed = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
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
        if first:
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr, flush=True)
