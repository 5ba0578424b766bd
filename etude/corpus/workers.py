"""Work on all cores, in order, in bounded memory."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from etude.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    meanwhile: Callable[[Item], Result] | None = None,
) -> Iterator[Result]:
    """``map(function, items)`` in ``workers`` processes; 1 works in this one, 0 takes all cores.

    ``function`` and the items travel by pickle, so an item should be a batch worth the journey (about a MB). At most two
    batches a worker are under way, so memory does not grow with the input. Errors that ``function`` raises arrive here.
    ``meanwhile`` does the same in this process, until the others begin to answer.
    """
    workers = workers or cores()
    if workers == 1:
        yield from map(function, items)
        return
    # A fresh interpreter for each worker: a fork would copy threads' locks, and Windows and macOS have none.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker)
    under_way: deque = deque()
    try:
        with _no_interrupts():
            starting = [pool.submit(os.getpid) for _ in range(workers if meanwhile else 0)]
        for item in items:
            if not all(start.done() for start in starting):
                yield meanwhile(item)
                continue
            with _no_interrupts():
                under_way.append(pool.submit(function, item))
            if len(under_way) >= 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process ended without a word (out of memory?); try --workers 1 to see where") from None
    finally:
        with _interrupts_later():
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Answer Ctrl-C afterwards: a pool whose end is interrupted waits for its workers for ever when Python ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked and callable(before):
        before(signal.SIGINT, None)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back while a worker starts, which inherits it: it would end with a traceback before it can ignore it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The same items, made by a thread that keeps ``depth`` of them ready. For work that lets other threads run, as unpacking."""
    iterator, end = iter(items), object()
    thread = ThreadPoolExecutor(1)
    try:
        under_way = deque(thread.submit(next, iterator, end) for _ in range(depth))
        while (item := under_way.popleft().result()) is not end:
            under_way.append(thread.submit(next, iterator, end))
            yield item
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, which ends the workers; and end when the parent is killed, rather than wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
