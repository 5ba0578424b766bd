"""How the next token is chosen: the options that every way of generating shares. Importing this costs nothing (no torch)."""

import math
from dataclasses import dataclass, fields

from etude.cli import option
from etude.errors import UsageError


@dataclass(frozen=True)
class SamplingSettings:
    """Names and meanings are Hugging Face's. A script's config inherits from this, and so has these as flags."""

    max_new_tokens: int = option(256, "longest answer, in tokens")
    temperature: float = option(0.8, "below 1 sharpens, above 1 flattens the distribution; 0: always the likeliest token")
    top_k: int = option(50, "sample among the k likeliest tokens; 0: all")
    top_p: float = option(0.95, "sample among the likeliest tokens that together hold this probability; 1: all")
    min_p: float = option(0.0, "sample among tokens at least this fraction as likely as the likeliest; 0: all")
    repetition_penalty: float = option(1.0, "above 1: what was said, prompt included, becomes less likely; 1: off")
    seed: int | None = option(None, "the same seed gives the same answers; left out: different each time")

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (
                self.temperature == 0 or 0.001 <= self.temperature < math.inf,
                "at least 0.001, or 0 for always the likeliest token",
            ),
            "top_k": (self.top_k >= 0, "at least 1, or 0 to switch it off"),
            "top_p": (0 < self.top_p <= 1, "greater than 0 and at most 1, where 1 switches it off"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1, where 0 switches it off"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "greater than 0, where 1 switches it off"),
            "seed": (self.seed is None or self.seed >= 0, "at least 0, or left out for a different answer each time"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise UsageError(f"{name} ({getattr(self, name)}) must be {rule}")


def sampling_of(config: SamplingSettings) -> dict[str, int | float | None]:
    """The sampling options alone of a config that has others besides."""
    return {field.name: getattr(config, field.name) for field in fields(SamplingSettings)}
