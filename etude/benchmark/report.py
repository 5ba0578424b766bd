"""What the benchmarks share: turns, waiting for a device, weights that show mistakes, and how figures are told."""

import json
from collections.abc import Callable

from etude.files import whole_file


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


def memory_of(work: Callable[[], object], device) -> int:
    """Do it, and return how many bytes it took on a GPU at most, besides what lay there before; elsewhere 0."""
    import torch

    if device.type != "cuda":
        work()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def lively_std(hidden_size: int) -> float:
    """A standard deviation of random weights with which a mistake shows in what a model computes.

    With the usual 0.02 a new model whose head is tied says its last token again and again, whatever its layers do.
    """
    return 1.6 / hidden_size**0.5
