"""A model on disk: config.json and model.safetensors, under Hugging Face's unfused weight names."""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.errors import DataError, MismatchError, StorageError, UsageError
from etude.files import whole_file
from etude.model.config import EtudeConfig
from etude.model.rope import inverse_frequencies
from etude.model.transformer import Etude

MODEL_TYPE = "etude"
MAX_JSON = 16 * 2**20  # bytes of a config.json or an index; that of DeepSeek-V3, 671B parameters in 163 shards, has 9 MB
MAX_POSITIONS = 2**24  # Llama 4 Scout, the longest published, has 10 million; the rotary table grows with it


def to_disk_name(name: str) -> str:
    """A parameter's name in a file: Hugging Face keeps all but the head under ``model.``."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def from_disk_name(name: str) -> str:
    return name.removeprefix("model.")


def save_model(model: Etude, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` (fp32) into ``folder``; each appears whole or not at all.

    ``weights`` (by the model's names) are the model's own, unless they are given.
    """
    folder = Path(folder)
    weights = model.state_dict() if weights is None else weights
    tensors = {to_disk_name(name): tensor.detach().float().contiguous().cpu() for name, tensor in weights.items()}
    with whole_file(folder / "model.safetensors") as path:
        write_safetensors(tensors, path)
    with whole_file(folder / "config.json") as path:
        config = {"model_type": MODEL_TYPE, **model.config.to_dict()}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_config(folder: str | Path) -> EtudeConfig:
    """The config of an Etude model folder. Raises :class:`MismatchError` where there is none."""
    values = read_config_json(folder)
    if values.get("model_type") != MODEL_TYPE:
        raise MismatchError(
            f"{folder}/config.json: model_type is {one_line(repr(values.get('model_type')))}, not {MODEL_TYPE!r}"
        )
    if values.get("auto_map"):
        raise MismatchError(f"{folder}/config.json: auto_map names code of the model's own, which Etude never runs")
    return checked_config(values, source=f"{folder}/config.json")


def checked_config(values: dict[str, Any], source: str) -> EtudeConfig:
    """The config in a file's ``values``, which may be anything. Raises :class:`MismatchError` naming ``source``."""
    kinds = typing.get_type_hints(EtudeConfig)
    found = {}
    for field in dataclasses.fields(EtudeConfig):
        value = values.get(field.name, field.default)
        if value is dataclasses.MISSING:
            raise MismatchError(f"{source}: lacks {field.name}")
        allowed = {typing.get_origin(kind) or kind for kind in typing.get_args(kinds[field.name]) or (kinds[field.name],)}
        if type(value) is int and float in allowed:
            value = float(value) if abs(value) < 1e300 else math.inf
        if type(value) not in allowed:  # not isinstance: true and false are no numbers
            wanted = " or ".join(sorted("null" if kind is type(None) else kind.__name__ for kind in allowed))
            raise MismatchError(f"{source}: {field.name} is {one_line(repr(value))}, not {wanted}")
        if type(value) is float and not math.isfinite(value):
            raise MismatchError(f"{source}: {field.name} is {value}, not a finite number")
        limit = MAX_POSITIONS if field.name == "max_position_embeddings" else 2**31
        if type(value) is int and abs(value) > limit:
            raise MismatchError(f"{source}: {field.name} is {one_line(value)}; Etude reads numbers up to {limit:,} there")
        found[field.name] = value
    try:
        return EtudeConfig(**found)
    except (UsageError, TypeError, ValueError) as error:
        raise MismatchError(f"{source}: {one_line(error)}") from None


def read_config_json(folder: str | Path) -> dict:
    path = Path(folder) / "config.json"
    if not path.exists():
        raise MismatchError(f"{folder}: there is no model here (no config.json); train one, or name another folder")
    return read_json(path)


def read_json(path: Path) -> dict:
    """The JSON object in a small file that a stranger may have written. Raises :class:`DataError` naming it."""
    if not path.is_file():  # a named pipe would be waited for without end
        raise DataError(f"{path}: not a file; the model is damaged")
    if path.stat().st_size > MAX_JSON:
        raise DataError(f"{path}: larger than {MAX_JSON / 2**20:.0f} MiB, which no such file is; it is damaged")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({one_line(error)}); the file is damaged") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: not a JSON object; the file is damaged")
    return values


def one_line(text: object) -> str:
    """What stands in a stranger's file, fit for a message: one line, printable, not longer than 300 characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in str(text)[:300])


def load_model(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Etude:
    """Load a folder that :func:`save_model` wrote, in evaluation mode."""
    config = load_config(folder)
    return build_model(config, read_safetensors(Path(folder) / "model.safetensors"), device, dtype, source=str(folder))


def build_model(
    config: EtudeConfig, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype, source: str
) -> Etude:
    """A model of ``config`` that holds exactly ``tensors`` (disk names); ``source`` is named in errors."""
    if config.num_hidden_layers > len(tensors):  # else layers would be made without end for a number that is damaged
        raise MismatchError(f"{source}: config.json says {config.num_hidden_layers} layers, there are {len(tensors)} tensors")
    with torch.device("meta"), _without_initialisation():
        model = Etude(config)
    named = {from_disk_name(name): tensor for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in named.items()}
    if expected != found or len(named) != len(tensors):
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        wrong = wrong or sorted(tensors.keys() & named.keys())  # a name both with and without "model."
        detail = "; ".join(f"{name[:100]}: expected {expected.get(name)}, found {found.get(name)}" for name in wrong[:3])
        raise MismatchError(f"{source}: {len(wrong)} weights do not fit config.json ({one_line(detail)})")
    if odd := sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point()):
        raise MismatchError(f"{source}: {odd[0]} holds {tensors[odd[0]].dtype}, which is no floating-point number")
    _check_rotary(config, source)
    model.load_state_dict({name: tensor.to(device=device, dtype=dtype) for name, tensor in named.items()}, assign=True)
    return model.eval()


def _check_rotary(config: EtudeConfig, source: str) -> None:
    """Raise :class:`MismatchError` where the config's rope_theta and rope_scaling are no numbers to compute angles from."""
    try:
        frequencies, scale = inverse_frequencies(config, torch.device("cpu"))
        good = bool(frequencies.isfinite().all()) and math.isfinite(scale)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        good = False
    if not good:
        settings = one_line({"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling})
        raise MismatchError(f"{source}: config.json's rotary settings give no angles ({settings})")


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a file. Raises :class:`StorageError` when the disk is full or refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library's own class for what is an OSError elsewhere
        raise StorageError(f"{path}: cannot be written ({error}); free some space or choose another folder") from None


@contextmanager
def _without_initialisation() -> Iterator[None]:
    """Make torch's initialisers do nothing: weights are about to be loaded. (On the meta device the first random
    initialisation imports hundreds of modules, which would take seconds at every start.)
    """
    names = ("normal_", "ones_", "uniform_", "kaiming_uniform_")
    originals = {name: getattr(torch.nn.init, name) for name in names}
    try:
        for name in names:
            setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.nn.init, name, original)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. Raises :class:`DataError` or :class:`MismatchError` naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).exists():
        raise MismatchError(f"{path}: missing; train a model first, or name another folder")
    if not Path(path).is_file():
        raise DataError(f"{path}: not a file; restore it from a checkpoint")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({one_line(error)}); restore it from a checkpoint") from None
