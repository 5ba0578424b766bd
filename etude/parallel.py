"""Several processes that train one model together: started by ``torchrun``, one a device, each with a copy of the model, or
with a part of it (see :mod:`etude.training.sharding`).

A step's gradient is the sum over its rows, whoever computes it, so the processes add theirs up and take the same step.
On a CPU two processes reach the very bits of one that takes the two halves as micro-batches.
"""

import hashlib
import os
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import Tensor

from etude.errors import Interrupted, PeerLost, StorageError, UsageError

BUCKET_ELEMENTS = 2**26  # gradients are sent in pieces of a quarter GiB, so that a second copy of all is not needed
FAILED = "etude/failed"  # where the store keeps what went wrong in one process


class Processes:
    """This process and those it trains with; alone, every method does nothing.

    Numbers that a decision hangs on travel over the CPU (gloo), so that agreeing never waits for a GPU's queue.
    """

    def __init__(self, rank: int = 0, count: int = 1, timeout_seconds: float = 600.0, on_machine: int | None = None):
        """``on_machine``: how many of them run on this machine; None: not known."""
        self.rank, self.count, self.timeout_seconds, self.on_machine = rank, count, timeout_seconds, on_machine
        self._step = 0
        self._control = None  # a gloo group beside NCCL's
        self._store: torch.distributed.Store  # what processes leave for one another, by key
        self._counts: Counter[tuple[str, str, int]] = Counter()  # messages by kind, subject and rank
        self._on_gpu = False
        self._failed = False  # what is told as a failure is this process's own
        self._lost = False  # a collective failed: nobody is going to answer

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the person."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """Which of a global batch's ``count`` rows are this process's: a stretch of them, as even as it goes."""
        return slice(self.rank * count // self.count, (self.rank + 1) * count // self.count)

    def sum_gradients(self, gradients: list[Tensor]) -> None:
        """Add up each gradient over the processes, in place."""
        if self.count == 1:
            return
        import torch.distributed as dist

        with self._telling("adding up the gradients"):
            if self._on_gpu:
                from torch.distributed.distributed_c10d import _coalescing_manager  # NCCL's groups: all at once, without copies

                with _coalescing_manager(device=gradients[0].device):
                    for gradient in gradients:
                        dist.all_reduce(gradient)
                return
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                dist.all_reduce(flat)
                torch._foreach_copy_(
                    bucket, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in bucket]), bucket, strict=True)]
                )

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor`` added up over the processes, in place."""
        if self.count > 1:
            import torch.distributed as dist

            with self._telling("adding up the losses"):
                dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """What every process has, one after the other: of (n, …) in each, (count · n, …)."""
        if self.count == 1:
            return tensor

        gathered = tensor.new_empty(self.count * len(tensor), *tensor.shape[1:])
        with self._telling("gathering"):
            all_gather(gathered, tensor.contiguous())
        return gathered

    def any(self, flag: bool, step: int) -> bool:
        """Whether ``flag`` is set in any process. Also tells the others that this one has reached ``step``."""
        if self.count == 1:
            return flag
        import torch.distributed as dist

        self._step = step
        flags = torch.tensor([int(flag)])
        with self._telling("meeting after the step"):
            self._store.set(f"etude/step/{self.rank}", str(step))
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._control)
        return bool(flags.item())

    def from_first(self, make: Callable[[], str]) -> str:
        """What ``make`` returns in the first process; the others only receive it."""
        if self.count == 1:
            return make()
        import torch.distributed as dist

        text = make().encode() if self.is_first else b""
        with self._telling("hearing from the first process"):
            length = torch.tensor([len(text)])
            dist.broadcast(length, 0, group=self._control)
            content = (
                torch.tensor(list(text), dtype=torch.uint8) if self.is_first else torch.empty(int(length), dtype=torch.uint8)
            )
            if length:
                dist.broadcast(content, 0, group=self._control)
        return bytes(content.tolist()).decode()

    def meet(self) -> None:
        """Wait until all are here."""
        self.from_first(lambda: "")

    # -- messages, for other threads than the one that trains: their collectives would mix with its own -----------------------

    def tell(self, subject: str, text: str) -> None:
        """Leave ``text`` for the others: the n-th on a subject is what they hear when they listen for the n-th time."""
        if self.count > 1:
            self._store.set(self._key("told", subject, self.rank), text)

    def heard(self, subject: str, rank: int = 0) -> str:
        """Wait for what process ``rank`` tells. Raises :class:`PeerLost` if that is nothing, and :class:`StorageError` if a
        process failed in :meth:`failing_together`.
        """
        key = self._key("heard", subject, rank)
        end = time.monotonic() + 10 * self.timeout_seconds  # the others may be writing to a slow disk
        try:
            while not self._store.check([key]):  # asked, not awaited: waiting would keep the store from the thread that trains
                if self._store.check([FAILED]):
                    raise StorageError(self._store.get(FAILED).decode())
                if self._lost or time.monotonic() > end:
                    raise RuntimeError("nothing heard")
                time.sleep(0.01)
            return self._store.get(key).decode()
        except RuntimeError as error:
            raise PeerLost(
                f"rank {self.rank} of {self.count}, after step {self._step}: no word of rank {rank}'s {subject} within "
                f"{10 * self.timeout_seconds:g} s, or the connection broke. Start it again, and it goes on from the last checkpoint"
            ) from error

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Have an error in here end the waiting of the others as well, with that error."""
        try:
            yield
        except Exception as error:
            if self.count > 1 and not (self._failed or isinstance(error, PeerLost)):
                with suppress(RuntimeError):  # who keeps the store is gone
                    if self._store.check([FAILED]):  # so this error comes of that one
                        raise StorageError(self._store.get(FAILED).decode()) from error
                    self._tell_failure(error)
            raise

    def _tell_failure(self, error: BaseException) -> None:
        self._failed = True
        self._store.set(FAILED, f"rank {self.rank} of {self.count}: {error}")

    def _key(self, kind: str, subject: str, rank: int) -> str:
        self._counts[kind, subject, rank] += 1
        return f"etude/{subject}/{rank}/{self._counts[kind, subject, rank]}"

    # -- being connected ------------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self, device: torch.device) -> Iterator[None]:
        """While open, the processes are connected. Raises :class:`PeerLost` when one of them stops answering."""
        if self.count == 1:
            yield
            return
        import torch.distributed as dist

        timeout = timedelta(seconds=self.timeout_seconds)
        self._on_gpu = device.type == "cuda"
        backend = "nccl" if self._on_gpu else "gloo"
        # NCCL's own watchdog ends the process without a word to the person, so it comes second.
        longer = 2 * timeout if backend == "nccl" else timeout
        try:
            self._store = _fresh_store(self.rank, self.count, self.timeout_seconds)
            dist.init_process_group(
                backend, store=self._store, rank=self.rank, world_size=self.count,
                timeout=longer, device_id=device if backend == "nccl" else None,
            )  # fmt: skip
            self._control = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None
        except RuntimeError as error:
            raise PeerLost(
                f"rank {self.rank} of {self.count}: the others did not start within {self.timeout_seconds:g} s, or the connection "
                "broke. Start it again"
            ) from error
        try:
            with self.watching():
                yield
        except Interrupted:  # all of them, after the same step
            dist.destroy_process_group()
            raise
        except BaseException as error:
            # Leaving in order would wait for the others. They may be waiting for us; torchrun ends them with this process.
            with suppress(RuntimeError):
                if not self._store.check([FAILED]):
                    self._tell_failure(error)
            raise
        else:
            self.meet()
            dist.destroy_process_group()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Tell of a lost process as :meth:`together` does, where the collectives are not made here but by a divided model."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _is_of_the_connection(error):
                raise
            raise self._peer_lost("in a collective of the divided model") from error

    @contextmanager
    def overseen(self, doing: str) -> Iterator[None]:
        """Leave, with the same message, when the block takes longer than the timeout. For work on a GPU: its queue may wait for
        a lost process, and who waits for the queue cannot be interrupted. (NCCL's own watchdog ends it later, without a word.)
        """
        if self.count == 1 or not self._on_gpu:
            yield
            return
        timer = threading.Timer(self.timeout_seconds, self._leave, [doing])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _leave(self, doing: str) -> None:
        error = self._peer_lost(doing)
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    @contextmanager
    def _telling(self, doing: str) -> Iterator[None]:
        """Turn a collective's timeout or broken connection into one line that names who is missing."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._peer_lost(doing) from error

    def _peer_lost(self, doing: str) -> PeerLost:
        self._lost = True
        return PeerLost(
            f"rank {self.rank} of {self.count}, after step {self._step}, {doing}: no answer within {self.timeout_seconds:g} s, "
            f"or the connection broke; {self._whereabouts()}. Start it again, and it goes on from the last checkpoint"
        )

    def _whereabouts(self) -> str:
        """Where the others were seen last."""
        seen = []
        for rank in range(self.count):
            if rank != self.rank:
                try:
                    known = self._store.check([f"etude/step/{rank}"])
                    step = self._store.get(f"etude/step/{rank}").decode() if known else "0"
                    seen.append(f"rank {rank} was last seen after step {step}")
                except RuntimeError:  # the store went with the process that kept it
                    seen.append(f"rank {rank} cannot be asked")
        return ", ".join(seen)


def all_gather(gathered: Tensor, tensor: Tensor, group: "torch.distributed.ProcessGroup | None" = None) -> None:
    """Fill ``gathered`` with what every process of the group has, one after the other."""
    import torch.distributed as dist

    gather = (
        dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    )  # renamed in torch 2.13
    gather(gathered, tensor, group=group)


def from_environment(batch_size: int, timeout_seconds: float) -> Processes:
    """The processes as torchrun's environment variables tell them."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > batch_size:
        raise UsageError(
            f"batch_size ({batch_size}) must be at least the number of processes ({count}): each takes a row or more"
        )
    on_machine = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else None
    return Processes(int(os.environ.get("RANK", "0")), count, timeout_seconds, on_machine)


def local_device(name: str) -> str:
    """The device for this process: with several GPUs, the one that torchrun's LOCAL_RANK says."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


def _fresh_store(rank: int, count: int, timeout_seconds: float) -> "torch.distributed.Store":  # some builds have none
    """torchrun's store, without what an earlier start left in it.

    After --max_restarts the new processes get the old ones' store, and would take dead processes' addresses for those of each
    other (https://github.com/pytorch/pytorch/issues/135712). So they agree on a name for this start, and on keys that begin with
    it: each puts up a word of its own, and the first all that it sees, until every process has found its own among them.
    (TORCHELASTIC_RESTART_COUNT will not do: each machine counts for itself.)
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    mine = uuid.uuid4().hex
    store.set(f"etude/word/{rank}", mine)
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        if rank == 0:
            words = ",".join(store.get(f"etude/word/{other}").decode() for other in range(count))
            store.set("etude/words", words)
        else:
            words = store.get("etude/words").decode()
        if words.split(",")[rank : rank + 1] == [mine]:
            start = hashlib.sha256(words.encode()).hexdigest()
            store.set(f"{start}/{rank}", "")
            if store.check([f"{start}/{other}" for other in range(count)]):
                return torch.distributed.PrefixStore(start, store)
        time.sleep(0.02)
    raise PeerLost(f"rank {rank} of {count}: the others did not start within {timeout_seconds:g} s")


def _is_of_the_connection(error: RuntimeError) -> bool:
    # gloo raises no class of its own.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
