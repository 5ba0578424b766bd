"""What pretraining does where nothing is said: rates that suit the batch, and all that one dial, the depth, decides.

The rates were found at 65,536 tokens a step and 768 channels (docs/performance.md, "Quality in a fixed time"). Muon's carry over to
other widths, as its updates are scaled by the matrices' sides (https://arxiv.org/abs/2502.16982). Importing this costs nothing.
"""

import math

BATCH_TOKENS = 65_536  # of a step, for which the rates below are
RATES = {"muon": 9e-3, "adamw": 1.5e-3}
CONTINUED_RATE = 3e-4  # of AdamW, for a model that is trained already
# With Muon and fan_in weights, as shares of the matrices' rate. Queries and keys would let attention's logits explode; the embedding's
# rows are of size 1, and each is met in few steps only.
QUERY_KEY, HEAD, EMBEDDING, TIED_EMBEDDING = 1 / 3, 4 / 9, 0.2 / 9e-3, 1 / 3
BATCH_SIZE = 16  # sequences

CHANNELS_PER_LAYER = 64  # nanochat's shape, and that of the preset base
HEAD_CHANNELS = 128
TOKENS_PER_WEIGHT = 20  # https://arxiv.org/abs/2203.15556


def rate_for(optimizer: str, tokens: int) -> float:
    """The peak learning rate for steps of so many tokens. It grows with their root, as a gradient's noise falls
    (https://arxiv.org/abs/2205.10287), up to the batch it was found for, and not beyond.
    """
    return RATES[optimizer] * min(1.0, math.sqrt(tokens / BATCH_TOKENS))


def fill_in(config) -> None:
    """Put what was left out into a :class:`~etude.training.config.PretrainConfig`."""

    def default(name: str, value: object) -> None:
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)

    default("batch_size", BATCH_SIZE)
    default("optimizer", "adamw" if config.init_from else "muon")
    continued = CONTINUED_RATE if config.init_from else None
    default("learning_rate", continued or rate_for(config.optimizer, max(1, config.batch_size * config.block_size)))


def share_of(kind: str, config) -> float:
    """What the matrices' learning rate is multiplied by for a kind of weight whose own is not set."""
    if config.optimizer != "muon" or getattr(config, "initializer", "") != "fan_in" or config.init_from:
        return 1.0
    embedding = TIED_EMBEDDING if config.tie_word_embeddings else EMBEDDING
    return {"query_key": QUERY_KEY, "head": HEAD, "embedding": embedding}.get(kind, 1.0)


def shape_of(depth: int) -> dict[str, int]:
    """The model of so many layers."""
    heads = math.ceil(depth * CHANNELS_PER_LAYER / HEAD_CHANNELS)
    width = heads * HEAD_CHANNELS
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": math.ceil(width * 8 / 3 / 128) * 128,
    }


def batch_and_steps(shape: dict[str, int], block_size: int) -> tuple[int, int]:
    """Sequences of a step, and steps, for a model trained on 20 tokens for each weight of its layers. The batch is what DeepSeek
    found best for the FLOPs of a run, 0.292 C^0.3271 tokens (https://arxiv.org/abs/2401.02954).
    """
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    weights = shape["num_hidden_layers"] * (4 * width**2 + 3 * width * inner)
    tokens = TOKENS_PER_WEIGHT * weights
    batch_tokens = 0.292 * (6 * weights * tokens) ** 0.3271
    batch_size = max(1, round(batch_tokens / block_size / 8) * 8)
    return batch_size, math.ceil(tokens / (batch_size * block_size))
