"""Parameter groups, optimizers, and the learning rate as a function of the step."""

import math

import torch
from torch import Tensor, nn

from etude.device import pick_precision
from etude.parallel import Processes
from etude.training.config import TrainingConfig
from etude.training.muon import Muon
from etude.training.recipe import share_of
from etude.training.sharding import local


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


class AdamW(torch.optim.AdamW):
    """torch's, computing with each process's rows of a divided model as with plain tensors, which it may: AdamW looks at every
    weight by itself. As DTensors they would go through several milliseconds of dispatch.
    """

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local(tensor) for tensor in tensors]
        return has_complex


def make_optimizers(
    model: nn.Module,
    config: TrainingConfig,
    device: torch.device,
    processes: Processes | None = None,
    compiled: bool = False,
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the layers' matrices and AdamW for the rest; one schedule serves both, of which each kind of
    weight may have its own share.

    Norms, biases and embeddings are not decayed: pulling them to zero only fights the loss.
    """
    kinds: dict[str, list[nn.Parameter]] = {"matrices": [], "query_key": [], "head": [], "embedding": [], "norms": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds[_kind(name, parameter)].append(parameter)
    groups = {
        kind: {
            "params": parameters,
            "weight_decay": 0.0 if kind in ("embedding", "norms") else config.weight_decay,
            "lr_factor": _lr_factor(kind, config),
        }
        for kind, parameters in kinds.items()
        if parameters
    }
    by_muon = [groups.pop(kind) for kind in ("matrices", "query_key") if config.optimizer == "muon" and kind in groups]
    adamw = AdamW(
        list(groups.values()),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=device.type in ("cuda", "cpu"),
    )
    if not by_muon:
        return [adamw]
    dtype = torch.bfloat16 if pick_precision("auto", device) == "bf16" else torch.float32
    settings = (config.learning_rate, config.weight_decay, config.momentum)
    return [adamw, Muon(by_muon, *settings, _heads(model), dtype, processes, compiled)]


def _kind(name: str, parameter: nn.Parameter) -> str:
    if name.startswith("lm_head."):
        return "head"
    if name.startswith("embed_tokens."):
        return "embedding"
    if parameter.ndim < 2:
        return "norms"
    return "query_key" if name.endswith(("q_proj.weight", "k_proj.weight")) else "matrices"


def _heads(model: nn.Module) -> dict[nn.Parameter, tuple[int, int]]:
    """The matrices whose heads :class:`Muon` takes for themselves, and along which dimension: all of attention's but the values', which
    learnt a little more together (docs/performance.md, "Muon").
    """
    along = {"q_proj": 0, "k_proj": 0, "o_proj": 1}
    return {
        getattr(layer.self_attn, name).weight: (dimension, model.config.head_dim)
        for layer in model.layers
        for name, dimension in along.items()
    }


def _lr_factor(kind: str, config: TrainingConfig) -> float:
    """What the schedule's learning rate is multiplied by for parameters of a kind."""
    own = getattr(config, f"{kind}_learning_rate", None)
    if own is None:
        return share_of(kind, config)
    return own / config.learning_rate if own else 0.0


def momentum_at(step: int, config: TrainingConfig) -> float:
    """Muon's momentum at step ``step`` (from 0): it rises while gradients still turn quickly."""
    if step >= config.momentum_warmup:
        return config.momentum
    low = min(config.momentum, 0.85)
    return low + (config.momentum - low) * step / config.momentum_warmup


def set_for_step(optimizers: list[torch.optim.Optimizer], lr: float, momentum: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
            if "momentum" in group:
                group["momentum"] = momentum
