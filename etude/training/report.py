"""What a run says of itself: the header before its steps, and a line for some of them."""

from typing import TYPE_CHECKING

import torch

from etude import paths
from etude.device import describe, peak_flops
from etude.model.linear import Linear, pays
from etude.model.transformer import Etude
from etude.runlog import duration

if TYPE_CHECKING:
    from etude.training.trainer import Trainer


def header(trainer: "Trainer", resumed: str = "") -> str:
    """The model, the device and the run, a line each; and what it goes on from."""
    shape, count = trainer.model.config, trainer.processes.count
    precision = f"fp8 in {_products_in_fp8(trainer.model)} products" if trainer.model.fp8 else trainer.precision
    compiled = ", compiled" if trainer.compiled else ""
    several = f"; {count} processes, each with {'a part of the model' if trainer.sharded else 'a copy'}" if count > 1 else ""
    epochs = trainer.steps / trainer.batches.steps_per_epoch
    parameters, output = shape.num_parameters()["total"], paths.typed(trainer.config.output)
    lines = [
        f"model     {parameters:,} parameters: {shape.hidden_size} wide, {shape.num_hidden_layers} layers, vocabulary {shape.vocab_size:,}",
        f"device    {describe(trainer.device)}; {precision}{compiled}{several}",
        f"run       {trainer.steps:,} steps of {trainer.tokens_per_step:,} tokens ({epochs:.2f} epochs) → {output}",
    ]
    return "\n".join([*lines, f"resume    {resumed}"] if resumed else lines)


def _products_in_fp8(model: Etude) -> str:
    weights = [module.weight for module in model.modules() if isinstance(module, Linear)] + [model.head_weight]
    return f"{sum(map(pays, weights))} of {len(weights)}"


def of_steps(trainer: "Trainer", metrics: dict[str, float], window: list[tuple[float, int]]) -> tuple[dict[str, float], str]:
    """What is recorded of the last of some steps, and its line. ``metrics`` are the step's own; ``window`` has each one's seconds
    and tokens.
    """
    seconds, tokens = (sum(values) for values in zip(*window, strict=True))
    rate = tokens / seconds
    left = (trainer.steps - trainer.step) * seconds / len(window)
    values = {**metrics, "tokens_per_second": rate, "tokens": trainer.tokens_seen, "seconds": trainer.seconds}
    text = (
        f"step {trainer.step:>{len(str(trainer.steps))}}/{trainer.steps}  loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
        f"grad {metrics['grad_norm']:.2f}  {rate:,.0f} tok/s"
    )
    if trainer.device.type == "cuda":
        values["peak_memory_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
        text += f"  {values['peak_memory_bytes'] / 2**30:.1f} GiB"
        if peak := peak_flops(trainer.device):
            flops = trainer.model.config.training_flops_per_token(trainer.batches.samples.block_size)
            values["mfu"] = rate * flops / peak
            text += f"  MFU {values['mfu']:.1%}"
    return values, f"{text}  {duration(left)} left"
