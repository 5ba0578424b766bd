"""Rotary position embeddings: each pair of channels of a query or key turns by an angle that grows with position.

Half-split layout, as Hugging Face has it: channel i turns together with channel i + d/2. (The original paper, RoFormer,
https://arxiv.org/abs/2104.09864, pairs neighbours; the two differ by a permutation of the projections' rows.)
The table of angles is a function of the config, made when it is first needed and never part of the weights, so a model
may be built on the meta device, moved or loaded in any order without losing it.

Shapes: B batch, T tokens, d channels of a head.
"""

import math

import torch
from torch import Tensor

from etude.model.config import EtudeConfig


class RotaryTable:
    """Cosine and sine of every position's angles, made once for a device. (Compiled code that computed them in place would
    do so again in each layer: on an H200 that takes a sixth of a small model's training step.)
    """

    def __init__(self, config: EtudeConfig):
        self.config = config
        self._cos: Tensor | None = None
        self._sin: Tensor | None = None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each (max_position_embeddings, d/2) in fp32."""
        if self._cos is None or self._cos.device != device:
            with torch.inference_mode(False):  # a table first used in inference must serve training too
                self._cos, self._sin = rotary_angles(
                    self.config, torch.arange(self.config.max_position_embeddings, device=device)
                )
        return self._cos, self._sin


def rotary_angles(config: EtudeConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, (..., d/2) in fp32, for ``positions`` (...)."""
    frequencies, scale = inverse_frequencies(config, positions.device)
    angles = positions[..., None].float() * frequencies  # (..., d/2)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` (B, T, heads, d) by angles whose ``cos`` and ``sin`` are (B or 1, T, 1, d/2) in fp32.

    The product is taken in fp32 and rounded once: angles in bf16 would blur the distance between far tokens.
    """
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)  # (B, T, heads, d/2) each
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def inverse_frequencies(config: EtudeConfig, device: torch.device) -> tuple[Tensor, float]:
    """Radians per position of each channel pair, (d/2,) in fp32, and the factor YaRN multiplies cos and sin by.

    ``rope_scaling`` stretches a trained context: ``linear`` divides every frequency; ``llama3`` divides the slow ones
    and blends the middle (Llama 3.1); ``yarn`` does so by rotations per context and sharpens attention
    (https://arxiv.org/abs/2309.00071). Computed in the order of Hugging Face's ``modeling_rope_utils``, so that both
    round alike.
    """
    d = config.head_dim
    powers = config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
    plain = 1.0 / powers
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return plain / factor, 1.0
    context = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / plain
        blend = ((context / wavelength - low) / (high - low)).clamp(0, 1)  # 0: slow, divided; 1: fast, kept
        return (1 - blend) * plain / factor + blend * plain, 1.0
    return _yarn(config, powers)


def _yarn(config: EtudeConfig, powers: Tensor) -> tuple[Tensor, float]:
    scaling, d = config.rope_scaling, config.head_dim
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def channel_that_turns(times: float) -> float:
        """The channel pair that makes ``times`` full turns over the original context."""
        return d * math.log(context / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = channel_that_turns(scaling.get("beta_fast") or 32)
    high = channel_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = (torch.arange(d // 2, dtype=torch.float32, device=powers.device) - low) / max(high - low, 0.001)
    kept = 1 - ramp.clamp(0, 1)
    frequencies = (1 / (factor * powers)) * (1 - kept) + (1 / powers) * kept

    def sharpening(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        numerator, denominator = scaling.get("mscale"), scaling.get("mscale_all_dim")
        both = numerator and denominator
        attention_factor = sharpening(numerator) / sharpening(denominator) if both else sharpening(1.0)
    return frequencies, attention_factor
