"""Etude: train a small language model of your own, from a folder of text to a model that chats.

The names below are in reading order: the tokenizer, the chat format, the model, its files, and its use. Each is imported
when it is first asked for, so ``import etude`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from etude.chat import ChatFormat
    from etude.export import export_llama
    from etude.generation.history import fit_history
    from etude.generation.plain import generate
    from etude.generation.settings import SamplingSettings
    from etude.generation.text import TextModel, load
    from etude.llama import load_any
    from etude.model.config import EtudeConfig
    from etude.model.transformer import Etude
    from etude.tokenizer import Tokenizer, train_tokenizer
    from etude.weights import save_model

_MODULE_OF = {
    "train_tokenizer": "etude.tokenizer",
    "Tokenizer": "etude.tokenizer",
    "ChatFormat": "etude.chat",
    "EtudeConfig": "etude.model.config",
    "Etude": "etude.model.transformer",
    "save_model": "etude.weights",
    "load_any": "etude.llama",
    "export_llama": "etude.export",
    "SamplingSettings": "etude.generation.settings",
    "generate": "etude.generation.plain",
    "fit_history": "etude.generation.history",
    "TextModel": "etude.generation.text",
    "load": "etude.generation.text",
}

__all__ = [  # noqa: RUF022  in reading order
    "train_tokenizer",
    "Tokenizer",
    "ChatFormat",
    "EtudeConfig",
    "Etude",
    "save_model",
    "load_any",
    "export_llama",
    "SamplingSettings",
    "generate",
    "fit_history",
    "TextModel",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next time it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
