"""What a stage starts from: a new model or the weights of one, and the prompts its samples answer."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from etude import paths
from etude.chat import ChatFormat
from etude.data.tokens import TokenStore
from etude.device import pick_device, pick_precision
from etude.errors import MismatchError, UsageError
from etude.generation.plain import generate
from etude.generation.settings import SamplingSettings
from etude.llama import load_any
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.parallel import local_device
from etude.tokenizer import TURN_START, Tokenizer
from etude.training.checkpoint import sha256
from etude.training.config import SHAPE_FIELDS, PretrainConfig, TrainingConfig

SAMPLE_TOKENS = 48


def pretraining_tokenizer(config: PretrainConfig) -> Tokenizer:
    """The tokenizer to train with: a model that is trained on keeps its own, for its ids mean nothing to another."""
    tokenizer = Tokenizer(config.tokenizer or config.init_from or paths.weight("tokenizer"))
    named_both = config.tokenizer and config.init_from and (Path(config.init_from) / "tokenizer.json").is_file()
    if named_both and tokenizer.vocabulary != Tokenizer(config.init_from).vocabulary:
        raise MismatchError(
            f"{config.tokenizer}: not the vocabulary that {config.init_from} was trained with; leave out --tokenizer"
        )
    return tokenizer


def pretraining_model(config: PretrainConfig, tokenizer: Tokenizer) -> Etude:
    """A new model with the shape that ``config`` asks for, or the one in ``init_from``, for continued pretraining."""
    _require_machine(config)
    if config.init_from:
        model = load_any(config.init_from, verify=True)
        _require_fit(model, tokenizer, config.init_from, config)
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        asked = [
            name for name in SHAPE_FIELDS if getattr(config, name) not in (defaults[name], getattr(model.config, name, None))
        ]
        if asked or config.preset != "auto":
            raise UsageError(f"--init_from keeps the shape of its model; leave out --{(asked or ['preset'])[0]}")
        return _with_dropout(model, config)
    shape = EtudeConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
        dropout=config.dropout or 0.0,
        **config.model_shape(on_accelerator=pick_device(config.device).type != "cpu"),
    )
    _require_length(shape, config)
    torch.manual_seed(config.seed)
    model = Etude(shape)
    if config.initializer == "fan_in":
        model.init_weights_by_fan_in()
    return model


def starting_model(config: TrainingConfig, before: str) -> tuple[Etude, Tokenizer]:
    """The model and the tokenizer in ``config.init_from``; ``before`` is the command that makes one."""
    _require_machine(config)
    folder = Path(config.init_from)
    if not (folder / "config.json").is_file():
        raise MismatchError(f"{folder}: there is no model to start from; run: {before}")
    tokenizer, model = Tokenizer(folder), load_any(folder, verify=True)
    _require_fit(model, tokenizer, str(folder), config)
    return _with_dropout(model, config), tokenizer


def weights_fingerprint(folder: str) -> str:
    """SHA-256 of the weights that a run starts from, "" where it starts from none: on resume they must be the same."""
    files = sorted(Path(folder).glob("*.safetensors")) if folder else []
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest() if files else ""


def _require_machine(config: TrainingConfig) -> None:
    """Raise :class:`UsageError` for a device or a precision that this machine doesn't have: the trainer would, but after the data."""
    pick_precision(config.precision, pick_device(local_device(config.device)), training=True)


def _with_dropout(model: Etude, config: TrainingConfig) -> Etude:
    if config.dropout is None or config.dropout == model.config.dropout:
        return model
    changed = Etude(dataclasses.replace(model.config, dropout=config.dropout))
    changed.load_state_dict(model.state_dict())
    return changed


def _require_fit(model: Etude, tokenizer: Tokenizer, folder: str, config: TrainingConfig) -> None:
    if model.config.vocab_size < len(tokenizer):
        raise MismatchError(
            f"{folder}: the model's vocabulary ({model.config.vocab_size}) is smaller than the tokenizer's ({len(tokenizer)}); "
            "use the tokenizer that the model was trained with"
        )
    _require_length(model.config, config)


def _require_length(shape: EtudeConfig, config: TrainingConfig) -> None:
    if config.block_size > shape.max_position_embeddings:
        raise UsageError(
            f"block_size ({config.block_size}) is longer than the model's max_position_embeddings "
            f"({shape.max_position_embeddings}); lower --block_size"
        )


def continuation_sample(tokenizer: Tokenizer, prompt: str, val: TokenStore) -> Callable[[Etude], str] | None:
    """How a model goes on from ``prompt``, or from the beginning of a validation document."""
    ids = tokenizer.encode(prompt) if prompt else val.ids(0, min(8, len(val))).tolist()
    if not ids:
        return None
    return lambda model: tokenizer.decode(ids) + " ▸" + _greedy(model, ids, tokenizer.document_end_id, tokenizer)


def reply_sample(tokenizer: Tokenizer, prompt: str, val: TokenStore) -> Callable[[Etude], str] | None:
    """A model's reply to ``prompt``, or to the first question of a validation conversation."""
    if prompt:
        ids = ChatFormat(tokenizer).prompt([{"role": "user", "content": prompt}])
    elif val.documents:
        stop = int(val.starts[1])
        learnt = val.mask(0, stop)
        ids = val.ids(0, int(learnt.argmax())).tolist()  # all that comes before the first reply
    else:
        return None
    shown = tokenizer.decode(ids).replace(TURN_START, "").replace("\n", " ")
    return lambda model: f"{shown} ▸{_greedy(model, ids, tokenizer.eos_id, tokenizer)}"


def _greedy(model: Etude, ids: list[int], stop_id: int, tokenizer: Tokenizer) -> str:
    settings = SamplingSettings(max_new_tokens=SAMPLE_TOKENS, temperature=0)
    was_training = model.training
    model.eval()
    try:
        room = model.config.max_position_embeddings - SAMPLE_TOKENS
        steps = generate(model, [ids[-max(1, room) :]], settings, stop_ids={stop_id}, pad_id=tokenizer.pad_id)
        new = [step.tokens[0] for step in steps if step.tokens[0] is not None]
    finally:
        model.train(was_training)
    return tokenizer.decode(new, skip_special=True).replace("\n", " ")
