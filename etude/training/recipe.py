"""What training does where nothing is said: rates that suit the batch and the model, and all that one dial, the depth, decides.

The rates of pretraining were found with 768 channels and 65,536 tokens a step, and tried with 128 to 1,536 channels and 4,096 to 65,536 tokens
(docs/performance.md, "Quality in a fixed time"). Importing this costs nothing.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

BATCH_TOKENS, WIDTH = 65_536, 768  # of a step, and channels, for which the rates below are
RATES = {"muon": 9e-3, "adamw": 1.5e-3}
NORMAL = 1 / 3  # of Muon's, where the initial weights are small ones
CONTINUED_RATE = 3e-4  # of AdamW, for a model that is trained already
# With Muon and fan_in weights, as shares of the matrices' rate. Queries and keys would let attention's logits explode; the embedding's
# rows are of size 1, and each is met in few steps only.
QUERY_KEY, HEAD, EMBEDDING, TIED_EMBEDDING = 1 / 3, 4 / 9, 0.2 / 9e-3, 1 / 3
BATCH_SIZE, EPOCHS = 16, 3.0  # sequences; passes over the data

FINE_TUNING_RATE = 0.23  # divided by the model's channels: 3e-4 for 768 of them, 9e-4 for 256
FOREIGN_RATE = 3e-5  # for models in others' formats, which were trained on far more, and have more to lose

CHANNELS_PER_LAYER = 64  # nanochat's shape, and that of the preset base
HEAD_CHANNELS = 128
TOKENS_PER_WEIGHT = 20  # https://arxiv.org/abs/2203.15556


def rate_for(optimizer: str, tokens: int, width: int) -> float:
    """The peak learning rate for steps of so many tokens and a model of so many channels. It grows with the fourth root of the tokens, up
    to the batch it was found for, and not beyond. (The square root, which noise alone would ask for, https://arxiv.org/abs/2205.10287,
    was too low for small batches.) Models wider than the one it was found for want less, by as much as they are wider; narrower ones
    could bear more, but only short runs gain by it.
    """
    return RATES[optimizer] * min(1.0, (tokens / BATCH_TOKENS) ** 0.25) * min(1.0, WIDTH / width)


def fill_in(config) -> None:
    """Put what was left out into a :class:`~etude.training.config.PretrainConfig`, which remembers what that was."""
    default = _filler(config)
    if config.depth is not None:
        batch_size, steps = batch_and_steps(shape_of(config.depth), config.block_size)
        default("batch_size", batch_size)
        if config.epochs is None:
            default("max_steps", math.ceil(batch_size * steps / max(1, config.batch_size)))
    default("batch_size", BATCH_SIZE)
    default("epochs", EPOCHS)
    default("optimizer", "adamw" if config.init_from else "muon")
    width = config.model_shape(on_accelerator=True)["hidden_size"]  # without one, presets are narrower
    rate = rate_for(config.optimizer, max(1, config.batch_size * config.block_size), max(1, width))
    if config.optimizer == "muon" and config.initializer == "normal":
        rate *= NORMAL
    default("learning_rate", CONTINUED_RATE if config.init_from else rate)


def fill_in_for_fine_tuning(config) -> None:
    """The same for a :class:`~etude.training.config.SFTConfig`, after a look at the model it starts from."""
    _filler(config)("learning_rate", _fine_tuning_rate(config.init_from))


def _filler(config) -> Callable[[str, object], None]:
    """What puts a value where there is none, and writes down where."""
    object.__setattr__(config, "filled_in", ())

    def default(name: str, value: object) -> None:
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)
            object.__setattr__(config, "filled_in", (*config.filled_in, name))

    return default


def _fine_tuning_rate(folder: str) -> float:
    """What suits the model in ``folder``. What is wrong with its config.json is said where it is loaded."""
    try:
        values = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        if values["model_type"] == "etude":
            return min(RATES["adamw"], FINE_TUNING_RATE / max(1, values["hidden_size"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        pass
    return FOREIGN_RATE


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
    rows = batch_tokens / block_size
    batch_size = round(rows / 8) * 8 if rows > 8 else max(1, round(rows))
    return batch_size, math.ceil(tokens / (batch_size * block_size))
