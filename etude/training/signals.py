"""Being asked to stop: SIGINT (Ctrl-C) and SIGTERM set a flag, and the loop ends its step, saves and leaves."""

import signal
import sys
import threading
from types import FrameType


class StopSignals:
    """While open, SIGINT and SIGTERM only set :attr:`received`. A further one changes nothing: the save under way must
    not be lost to impatience.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, True
        if first:
            print(f"\n{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr, flush=True)
