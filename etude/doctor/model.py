"""A model folder's files: config.json against the weights, the weights' values, and the ids that must agree with the tokenizer."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from etude.doctor.report import Report, some_of
from etude.errors import DataError
from etude.llama import load_any
from etude.model.transformer import Etude
from etude.tokenizer import Tokenizer
from etude.weights import MODEL_TYPE, read_config_json, read_json, read_safetensors

HUGE = 1e3  # weights of trained models stay far below: the largest of published Llamas are some tens
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def look_at_files(folder: Path, tokenizer: Tokenizer | None, report: Report) -> Etude | None:
    """Examine config.json and the weights, each for itself, then load them as inference does. None if that fails."""
    values: dict[str, Any] = {}
    model = None
    with report.examining("config.json"):
        values = read_config_json(folder)
        look_at_config(values, report)
    with report.examining("weights"):
        tensors = _tensors(folder)
        if values:
            look_at_tying(values, tensors, report)
        look_at_weights(tensors, "weights", report)
        del tensors  # loaded again below; a model should be in memory once
    with report.examining("model"):
        model = load_any(folder)
        count = model.config.num_parameters()["total"]
        report.ok("model", f"loads: {count:,} parameters, vocabulary {model.config.vocab_size:,}")
    if tokenizer is not None and values:
        with report.examining("special ids"):
            look_at_ids(values, _generation_config(folder), tokenizer, report)
    return model


def look_at_config(values: dict[str, Any], report: Report) -> None:
    if values.get("rms_norm_eps") is None:
        report.bad(
            "config.json",
            "rms_norm_eps is missing, and every program assumes another one (1e-5, 1e-6); write down the one of training",
        )
    elif values.get("auto_map"):
        report.bad("config.json", "auto_map names code that comes with the model; Etude never runs such code")
    else:
        kind = values.get("model_type")
        named = "an Etude model" if kind == MODEL_TYPE else f"a model of type {kind!r}"
        report.ok("config.json", f"{named} with rms_norm_eps {values['rms_norm_eps']}")


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The weights as they lie there, fitting or not."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder}: there are no weights here (no .safetensors); train a model, or restore the file")
    return {name: tensor for file in files for name, tensor in read_safetensors(file).items()}


def look_at_tying(values: dict[str, Any], tensors: dict[str, Tensor], report: Report) -> None:
    """``tie_word_embeddings`` against what is stored: who trusts the wrong one computes with the wrong head."""
    tied = values.get("tie_word_embeddings", values.get("model_type") == MODEL_TYPE)  # what each reader assumes in silence
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    same = head is not None and embedding is not None and head.shape == embedding.shape and bool((head == embedding).all())
    if tied and head is not None and not same:
        report.bad(
            "tied head",
            f"config.json says that the embedding is the head (tie_word_embeddings), but {HEAD} is there and differs; say false "
            "if it was trained untied, else remove that tensor",
        )
    elif tied and head is not None:
        report.warn("tied head", f"{HEAD} is stored though it is the embedding (tie_word_embeddings); it need not be")
    elif not tied and head is None:
        report.bad(
            "tied head",
            f"config.json says that the head is untied, but there is no {HEAD}: programs would make one of random numbers; "
            "set tie_word_embeddings to true if it was trained so",
        )
    elif not tied and same:
        report.warn("tied head", f"untied in config.json, but {HEAD} equals the embedding: was it tied when it was trained?")
    else:
        report.ok("tied head", f"{'tied' if tied else 'untied'}, in config.json and in the weights")


def look_at_weights(tensors: dict[str, Tensor], check: str, report: Report) -> bool:
    """Values that no training leaves; whether all are finite."""
    broken, zero, huge = [], [], []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        largest = tensor.abs().max().item()  # NaN if one of them is
        if not math.isfinite(largest):
            broken.append(f"{name} ({(~tensor.isfinite()).sum().item():,} of {tensor.numel():,} values)")
        elif largest == 0:
            zero.append(name)
        elif largest > HUGE:
            huge.append(f"{name} (up to {largest:.3g})")
    if broken:
        report.bad(check, f"not finite: {some_of(broken, 5)}; the model gives NaN; go back to a checkpoint from before")
    if zero:
        report.bad(check, f"nothing but zeros: {some_of(zero, 5)}; these layers do nothing: a load or an export lost them")
    if huge:
        report.warn(
            check, f"extreme values: {some_of(huge, 5)}; half precision overflows soon; was the learning rate too high?"
        )
    if not broken and not zero and not huge:
        report.ok(check, f"{len(tensors)} tensors, all finite, none zero or extreme")
    return not broken


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def look_at_ids(values: dict[str, Any], generation: dict[str, Any], tokenizer: Tokenizer, report: Report) -> None:
    """Special tokens and sizes, in config.json and generation_config.json, against the tokenizer's."""
    own = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    wrong = []
    for source, settings in (("config.json", values), ("generation_config.json", generation)):
        for name, expected in own.items():
            given = settings.get(name)
            several = given if isinstance(given, list) else [given]
            if given is not None and expected not in several and (name != "bos_token_id" or _decides_bos(values, tokenizer)):
                wrong.append(f"{source}: {name} is {given}, the tokenizer's is {expected}")
    if wrong:
        report.bad(
            "special ids",
            f"{some_of(wrong, 6)}; a program that trusts them does not stop, or pads with a word; write the tokenizer's",
        )
    elif values.get("eos_token_id") is None:
        report.warn("special ids", f"config.json names no eos_token_id; the tokenizer's is {own['eos_token_id']}")
    else:
        report.ok("special ids", f"eos {own['eos_token_id']} and pad {own['pad_token_id']}, as in the tokenizer")
    size, tokens = values.get("vocab_size"), len(tokenizer)
    if isinstance(size, int) and size < tokens:
        report.bad(
            "vocabulary",
            f"vocab_size ({size:,}) is smaller than the tokenizer's {tokens:,} tokens, so some text cannot be read at all; "
            "use the tokenizer that the model was trained with",
        )
    elif size != tokens:
        report.ok("vocabulary", f"vocab_size {size} for {tokens:,} tokens: the rest is padding, which is fine")
    else:
        report.ok("vocabulary", f"{tokens:,} tokens, in the model and in the tokenizer")


def _decides_bos(values: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether a bos_token_id can be wrong: many published models name one that their tokenizer never writes."""
    return values.get("model_type") == MODEL_TYPE or tokenizer.bos_id is not None
