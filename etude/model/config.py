"""The shape of a model, under Hugging Face's names for a Llama."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from etude.errors import UsageError

ROPE_SCALING_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor"},
}
ROPE_SCALING_OPTIONAL = {
    "yarn": {
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


@dataclass(frozen=True)
class EtudeConfig:
    """A validated model shape. Every field bears the name that Hugging Face's ``LlamaConfig`` gives it, so a flag, a
    line of config.json and an export say the same; ``qk_norm`` alone is ours (Hugging Face calls that model Qwen3).
    """

    vocab_size: int
    hidden_size: int = 768  # D, the width of the residual stream
    num_hidden_layers: int = 6
    num_attention_heads: int = 12  # H, query heads
    num_key_value_heads: int | None = None  # G, key and value heads; None means H (multi-head attention)
    head_dim: int | None = None  # None means hidden_size / num_attention_heads
    intermediate_size: int | None = None  # F; None means 8/3 of hidden_size, rounded up to a multiple of 64
    max_position_embeddings: int = 512  # the longest sequence, in tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # {"rope_type": "linear" | "llama3" | "yarn", ...} as Hugging Face has it
    tie_word_embeddings: bool = True
    qk_norm: bool = False  # RMSNorm on queries and keys; exports to Qwen3 instead of Llama
    dropout: float = 0.0  # after the embedding and on each residual branch, while training
    initializer_range: float = 0.02  # standard deviation of the initial weights
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        def default(name: str, value: int) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} ({getattr(self, name)}) must be at least 1")
        default("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads ({self.num_attention_heads}), "
                "or head_dim be given"
            )
        default("head_dim", self.hidden_size // self.num_attention_heads)
        default("intermediate_size", 64 * math.ceil(self.hidden_size * 8 / 3 / 64))
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise UsageError(f"head_dim ({self.head_dim}) must be even: rotary embeddings turn pairs of channels")
        if self.intermediate_size < 1:
            raise UsageError(f"intermediate_size ({self.intermediate_size}) must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout ({self.dropout}) must be at least 0 and less than 1")
        if self.rms_norm_eps <= 0 or self.rope_theta <= 0:
            raise UsageError("rms_norm_eps and rope_theta must be greater than 0")
        if self.rope_scaling is not None:
            scaling = _checked_rope_scaling(self.rope_scaling)
            if scaling and scaling["rope_type"] == "yarn":
                scaling.setdefault("original_max_position_embeddings", self.max_position_embeddings)
            object.__setattr__(self, "rope_scaling", scaling)

    def num_parameters(self) -> dict[str, int]:
        """Parameters in total, and those of matrix products per token (what a step's FLOPs are counted from)."""
        D, F, L = self.hidden_size, self.intermediate_size, self.num_hidden_layers
        attention = D * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        matrices = L * (attention + 3 * D * F)
        norms = L * (2 * D + (2 * self.head_dim if self.qk_norm else 0)) + D
        embedding = self.vocab_size * D
        total = matrices + norms + embedding * (1 if self.tie_word_embeddings else 2)
        return {"total": total, "matmul": matrices + embedding}

    def training_flops_per_token(self, length: int) -> int:
        """FLOPs of forward and backward for one token of a sequence of ``length``: 6 N + 12 L (H d) T, attention
        counted in full as in PaLM's appendix B (https://arxiv.org/abs/2204.02311).
        """
        attention = 12 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * length
        return 6 * self.num_parameters()["matmul"] + attention

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EtudeConfig":
        """The config in ``values``, which may hold other keys as well (``model_type`` and such)."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def _checked_rope_scaling(scaling: dict[str, Any]) -> dict[str, Any] | None:
    scaling = dict(scaling)
    kind = scaling.pop("type", None)  # the key's name before transformers 4.45
    kind = scaling.pop("rope_type", kind)
    if kind in (None, "default"):
        return None
    if kind not in ROPE_SCALING_KEYS:
        raise UsageError(f"rope_scaling's rope_type ({kind}) must be one of {', '.join(ROPE_SCALING_KEYS)}")
    scaling.pop("rope_theta", None)  # transformers 5 keeps it in the same place; we have a field of its own
    missing = ROPE_SCALING_KEYS[kind] - scaling.keys()
    unknown = scaling.keys() - ROPE_SCALING_KEYS[kind] - ROPE_SCALING_OPTIONAL.get(kind, set())
    if missing or unknown:
        problem = f"lacks {', '.join(sorted(missing))}" if missing else f"has unknown keys: {', '.join(sorted(unknown))}"
        raise UsageError(f"rope_scaling of type {kind} {problem}")
    for key in scaling.keys() & {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}:
        if isinstance(scaling[key], bool) or not isinstance(scaling[key], int | float) or scaling[key] <= 0:
            raise UsageError(f"rope_scaling's {key} ({scaling[key]!r}) must be a number greater than 0")
    return {"rope_type": kind, **scaling}


# Named shapes. A flag beside --preset overrides its field. Sizes are for a vocabulary of 16,384, head tied. Heads of 128 channels
# keep a GPU's attention kernels twice as busy as heads of 64; a CPU does not care.
PRESETS: dict[str, dict[str, int]] = {
    "nano": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768),  # 7.6M
    "small": dict(hidden_size=768, num_hidden_layers=6, num_attention_heads=6, intermediate_size=2048),  # 55M
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=6, intermediate_size=2048),  # 98M
    "medium": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=8, intermediate_size=2816),  # 325M
}
