"""A model on disk: config.json and model.safetensors, under Hugging Face's unfused weight names."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from etude.errors import DataError, MismatchError, StorageError
from etude.files import whole_file
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude

MODEL_TYPE = "etude"


def to_disk_name(name: str) -> str:
    """A parameter's name in a file: Hugging Face keeps all but the head under ``model.``."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def from_disk_name(name: str) -> str:
    return name.removeprefix("model.")


def save_model(model: Etude, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (fp32) into ``folder``; each appears whole or not at all."""
    folder = Path(folder)
    tensors = {to_disk_name(name): tensor.detach().float().contiguous().cpu() for name, tensor in model.state_dict().items()}
    with whole_file(folder / "model.safetensors") as path:
        write_safetensors(tensors, path)
    with whole_file(folder / "config.json") as path:
        config = {"model_type": MODEL_TYPE, **model.config.to_dict()}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_config(folder: str | Path) -> EtudeConfig:
    """The config of an Etude model folder. Raises :class:`MismatchError` where there is none."""
    values = read_config_json(folder)
    if values.get("model_type") != MODEL_TYPE:
        raise MismatchError(f"{folder}/config.json: model_type is {values.get('model_type')!r}, not {MODEL_TYPE!r}")
    return EtudeConfig.from_dict(values)


def read_config_json(folder: str | Path) -> dict:
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MismatchError(f"{folder}: there is no model here (no config.json); train one, or name another folder") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); the file is damaged") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: not a JSON object; the file is damaged")
    return values


def load_model(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Etude:
    """Load a folder that :func:`save_model` wrote, in evaluation mode."""
    config = load_config(folder)
    return build_model(config, read_safetensors(Path(folder) / "model.safetensors"), device, dtype, source=str(folder))


def build_model(
    config: EtudeConfig, tensors: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype, source: str
) -> Etude:
    """A model of ``config`` that holds exactly ``tensors`` (disk names); ``source`` is named in errors."""
    with torch.device("meta"), _without_initialisation():
        model = Etude(config)
    named = {from_disk_name(name): tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in named.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        detail = "; ".join(f"{name}: expected {expected.get(name)}, found {found.get(name)}" for name in wrong[:3])
        raise MismatchError(f"{source}: {len(wrong)} weights do not fit config.json ({detail})")
    model.load_state_dict(named, assign=True)
    return model.eval()


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

    try:
        return load_file(path)
    except FileNotFoundError:
        raise MismatchError(f"{path}: missing; train a model first, or name another folder") from None
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}); restore it from a checkpoint") from None
