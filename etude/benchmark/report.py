"""What the benchmarks share: turns, waiting for a device, memory, what a device could do, weights that show mistakes, and how
figures are told.
"""

import json
import time
from collections.abc import Callable
from typing import TypeVar

from etude.files import whole_file

T = TypeVar("T")


def tell(figures: dict[str, object], output: str) -> None:
    """Print a figure a line, and write them to a .json file if one is named."""
    width = max(28, *(len(name) + 2 for name in figures))
    for name, figure in figures.items():
        print(f"{name:<{width}}{figure}")
    if output:
        with whole_file(output) as path:
            path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def in_turns(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each measures in each round. All take turns, so that a machine whose speed drifts is fair to all."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


def wait(device) -> None:
    """Until the device has done what it was given: before a clock is read."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def with_memory(work: Callable[[], T], device) -> tuple[T, int | None]:
    """What ``work`` gives, and how many bytes it took on a GPU at most, besides what lay there before; elsewhere None."""
    import torch

    if device.type != "cuda":
        return work(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return work(), torch.cuda.max_memory_allocated(device) - before


def peaks_of(programs: dict[str, int | None], weights: int) -> dict[str, float]:
    """Lines of peak memory: each program's on a GPU, its weights included. Elsewhere one cannot be told from another, so there
    it is that of the process, which did all of them.
    """
    from etude.memory import resident_peak

    told = {f"{name} peak GiB": weights + peak for name, peak in programs.items() if peak is not None}
    if not told and (resident := resident_peak()) is not None:
        told = {"peak GiB of all, Python included": resident}
    return {name: round(peak / 2**30, 2) for name, peak in told.items()}


def mfu_of(flops: float, device, precision: str) -> dict[str, float]:
    """Lines that say what share ``flops`` a second are of those that one large matrix product reaches here, now."""
    ceiling = matmul_ceiling(device, precision)
    return {
        "etude TFLOP/s": round(flops / 1e12, 2),
        "matmul TFLOP/s": round(ceiling / 1e12, 2),
        "MFU of that": round(flops / ceiling, 4),
    }


def matmul_ceiling(device, precision: str) -> float:
    """FLOP/s of a large matrix product on this device: in bf16, also for steps in 8 bits, or as steps in fp16 and fp32 have it."""
    import torch

    n = 8192 if device.type == "cuda" else 2048
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(precision, torch.bfloat16)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    wait(device)
    started = time.perf_counter()
    for _ in range(10):
        a @ b
    wait(device)
    return 10 * 2 * n**3 / (time.perf_counter() - started)


def lively_std(hidden_size: int) -> float:
    """A standard deviation of random weights with which a mistake shows in what a model computes.

    With the usual 0.02 a new model whose head is tied says its last token again and again, whatever its layers do.
    """
    return 1.6 / hidden_size**0.5
