"""Parameter groups, optimizers, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from etude.device import pick_precision
from etude.parallel import Processes
from etude.training.config import TrainingConfig
from etude.training.muon import Muon


def lr_at(step: int, steps: int, config: TrainingConfig) -> float:
    """The learning rate of step ``step`` (from 0) of ``steps``: linear warm-up, then the schedule.

    The first step already has a rate above 0, and the last has ``final_lr_fraction`` of the peak. ``wsd`` is
    warm-up/stable/decay (https://arxiv.org/abs/2404.06395).
    """
    warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    falling = max(1, math.ceil(config.decay_fraction * steps) if config.schedule == "wsd" else steps - warmup)
    progress = min(1.0, max(0.0, (step + 1 - (steps - falling)) / falling))  # 0: at the peak, 1: at the end
    height = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * height)


def make_optimizers(
    model: nn.Module, config: TrainingConfig, device: torch.device, processes: Processes | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the layers' matrices and AdamW for the rest; one learning rate serves both.

    Norms, biases and embeddings are not decayed: pulling them to zero only fights the loss.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [p for name, p in named if p.ndim >= 2 and not name.startswith(("embed_tokens.", "lm_head."))]
    decayed_head = [p for name, p in named if name.startswith("lm_head.")]
    others = [p for name, p in named if p.ndim < 2 or name.startswith("embed_tokens.")]
    by_muon = matrices if config.optimizer == "muon" else []
    groups = [
        {"params": ([] if by_muon else matrices) + decayed_head, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=device.type in ("cuda", "cpu"),
    )
    if not by_muon:
        return [adamw]
    dtype = torch.bfloat16 if pick_precision("auto", device) == "bf16" else torch.float32
    return [adamw, Muon(by_muon, config.learning_rate, config.weight_decay, config.momentum, dtype, processes)]


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
