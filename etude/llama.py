"""To and from Hugging Face's Llama format: config.json, and models that others have published.

An Etude model is a Llama under another ``model_type``: its weights bear Hugging Face's names and its rotary layout is
Hugging Face's, so nothing is permuted. What remains is config.json, in a form that old and new readers understand.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.errors import DataError, MismatchError, VerificationError
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.weights import (
    MODEL_TYPE,
    build_model,
    checked_config,
    load_model,
    one_line,
    read_config_json,
    read_json,
    read_safetensors,
)

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM"}

# What transformers assumes where a config.json is silent. Sizes have no default: a guess would never fit the weights.
HF_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "initializer_range": 0.02}
HF_DEFAULTS_OF = {
    "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
}
# What these must be where they are given and not null; the others are checked with EtudeConfig's fields.
HF_KINDS = {"rope_scaling": dict, "rope_parameters": dict, "layer_types": list, "sliding_window": int}
MAX_LOGIT_DIFFERENCE = 1e-4  # between Etude's logits and transformers', in fp32


# --- config.json ---------------------------------------------------------------------------------------------------


def config_to_hf(config: EtudeConfig, dtype: str = "float32") -> dict[str, Any]:
    """The config.json of ``config`` as a Llama, or as a Qwen3 if it has ``qk_norm``.

    Every key is written out, since transformers' defaults are not ours (``bos_token_id`` 1, ``head_dim`` 128 in a
    Qwen3), and under both of its names where transformers 5 has a new one.
    """
    kind = "qwen3" if config.qk_norm else "llama"
    scaling = config.rope_scaling
    if scaling:  # transformers 4 warns of factors that are whole numbers
        lengths = ("original_max_position_embeddings",)
        scaling = {key: float(v) if type(v) is int and key not in lengths else v for key, v in scaling.items()}
    theta = float(config.rope_theta)
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{name: value for name, value in config.to_dict().items() if name not in ("qk_norm", "dropout")},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({"use_sliding_window": False, "sliding_window": None} if config.qk_norm else {"mlp_bias": False}),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, **(scaling or {})},
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def config_from_hf(values: dict[str, Any], source: str = "config.json") -> EtudeConfig:
    """The config in a Hugging Face config.json, of the old form (``rope_theta``) or the new (``rope_parameters``).

    Raises :class:`MismatchError` naming ``source`` and all that Etude's model has no counterpart for.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in HF_DEFAULTS_OF:
        known = f"{MODEL_TYPE}, {', '.join(HF_DEFAULTS_OF)}"
        raise MismatchError(f"{source}: model_type is {one_line(repr(kind))}; Etude can load {known}")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in sizes if values.get(name) is None]:
        raise DataError(f"{source}: lacks {', '.join(missing)}")
    values = {**HF_DEFAULTS, **HF_DEFAULTS_OF[kind], **values}
    for name, wanted in HF_KINDS.items():
        if not isinstance(values.get(name), wanted | None):
            raise MismatchError(f"{source}: {name} is {one_line(repr(values[name]))}, not a {wanted.__name__}")
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    if obstacles := _obstacles(values, rope):
        raise MismatchError(f"{source}: Etude's model cannot represent {', '.join(obstacles)}")
    if rope.get("rope_type", rope.get("type")) in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    same = {field.name: values[field.name] for field in dataclasses.fields(EtudeConfig) if field.name in values}
    eos = values.get("eos_token_id")
    same["eos_token_id"] = next(iter(eos), None) if isinstance(eos, list) else eos  # the first of several
    same |= {"rope_scaling": rope or None, "qk_norm": kind == "qwen3", "dropout": 0.0}
    try:
        same["rope_theta"] = float(rope.get("rope_theta", values["rope_theta"]))
    except (TypeError, ValueError, OverflowError) as error:
        raise MismatchError(f"{source}: rope_theta: {one_line(error)}") from None
    return checked_config(same, source)


def _obstacles(values: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    """What ``values`` asks for that Etude's model does not do, in words."""
    window = values.get("sliding_window") if values["model_type"] == "mistral" else None
    layer_types = [kind for kind in values.get("layer_types") or [] if kind != "full_attention"]
    length = values["max_position_embeddings"]
    found = {
        "auto_map (a model with code of its own, which Etude never runs)": values.get("auto_map"),
        "quantization_config (quantized weights)": values.get("quantization_config"),
        "attention_bias": values.get("attention_bias"),
        "mlp_bias": values.get("mlp_bias"),
        f"hidden_act {one_line(values.get('hidden_act'))}": values.get("hidden_act", "silu") not in ("silu", "swish"),
        "sliding-window attention": values.get("use_sliding_window")
        or layer_types
        or (window is not None and isinstance(length, int) and window < length),
        "partial_rotary_factor": rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1)) not in (1, None),
        "rope_parameters that differ between layers": any(isinstance(value, dict) for value in rope.values()),
    }
    return [words for words, present in found.items() if present]


# --- import --------------------------------------------------------------------------------------------------------


def load_any(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, verify: bool = False
) -> Etude:
    """The model in ``folder``, Etude's own or of the Llama family (llama, mistral, qwen3), in evaluation mode.

    With ``verify`` a foreign model is loaded by transformers too, and :class:`VerificationError` raised unless the
    logits of both agree in fp32.
    """
    folder = Path(folder)
    values = read_config_json(folder)
    if values.get("model_type") == MODEL_TYPE:
        return load_model(folder, device, dtype)
    config = config_from_hf(values, source=str(folder / "config.json"))
    tensors = _read_hf_weights(folder)
    # Checkpoints of 2023 hold the rotary frequencies as well; and a tied head is sometimes stored a second time.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    if head is not None and not torch.equal(head, tensors.get("model.embed_tokens.weight", head.new_empty(0))):
        raise MismatchError(f"{folder}: lm_head.weight differs from the embedding, though config.json says they are tied")
    model = build_model(config, tensors, "cpu", torch.float32 if verify else dtype, source=str(folder))
    if verify:
        length = min(512, config.max_position_embeddings)
        ids = [number * 7919 % config.vocab_size for number in range(length)]  # 7919, a prime: ids from all over
        try:
            check_logits(model, load_transformers(folder, torch.float32), [ids])
        except VerificationError as error:
            raise VerificationError(f"{folder}: not imported: {error}") from error
    return model.to(device=device, dtype=dtype)


def _read_hf_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from the shards that its index names."""
    index_path = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index_path.is_file():
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if pickled and not (folder / "model.safetensors").is_file():
            raise MismatchError(
                f"{folder}: the weights are pickled ({pickled[0]}), and unpickling can run code; "
                "convert them to safetensors (transformers' save_pretrained writes it) where you trust their source"
            )
        return read_safetensors(folder / "model.safetensors")
    try:
        shard_of = read_json(index_path)["weight_map"]
        shards = sorted(set(shard_of.values()))
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index_path}: not an index of shards ({one_line(repr(error))}); download it again") from None
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        # A plain name, so that an index cannot reach out of its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w+-][\w.+-]{0,200}", shard, re.ASCII):
            raise DataError(f"{index_path}: {one_line(repr(shard))} is not the name of a file in this folder")
        if not (folder / shard).is_file():
            raise DataError(f"{index_path}: its shard {shard} is missing; download it again")
        tensors |= read_safetensors(folder / shard)
    if absent := sorted(shard_of.keys() - tensors.keys()):
        first = one_line(absent[0])
        raise DataError(f"{index_path}: {len(absent)} weights are in no shard, {first} among them; download them again")
    return tensors


# --- what transformers makes of a folder -----------------------------------------------------------------------------


def load_transformers(folder: str | Path, dtype: torch.dtype) -> Any:
    """The model in ``folder`` as transformers reads it, in evaluation mode. Nothing pickled is read."""
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, found = from_pretrained("AutoModelForCausalLM", folder, **options)
    if missing := sorted(found["missing_keys"]):  # which transformers would make up at random, with a warning
        raise VerificationError(f"{folder}: {len(missing)} of transformers' weights are in no file, {missing[0]} among them")
    return model.eval()


def from_pretrained(auto_class: str, folder: str | Path, **options) -> Any:
    """What transformers' ``auto_class`` makes of ``folder``, whose own code is never run.

    Raises :class:`MismatchError` where config.json asks for such code, :class:`VerificationError` where transformers fails.
    """
    import transformers

    values = read_config_json(folder)
    # transformers fetches an attention kernel that is named as "owner/repository" from the hub, and runs it.
    kernels = [key for key, value in values.items() if "_implementation" in key and "/" in str(value)]
    if values.get("auto_map") or kernels:
        key = "auto_map" if values.get("auto_map") else one_line(kernels[0])
        raise MismatchError(f"{folder}/config.json: {key} names code of the model's own, which Etude never runs")
    transformers.utils.logging.set_verbosity_error()  # its advice is about transformers, not about this model
    transformers.utils.logging.disable_progress_bar()
    try:
        # Left out, trust_remote_code means that transformers asks whoever sits at the terminal.
        options = {"local_files_only": True, "trust_remote_code": False, **options}
        return getattr(transformers, auto_class).from_pretrained(folder, **options)
    except Exception as error:  # of whatever kind: transformers can make nothing of the folder
        reason = one_line(" ".join(str(error).split()))
        raise VerificationError(f"transformers cannot load {folder}: {reason}") from error


def check_logits(ours: Etude, theirs: Any, prompts: Sequence[list[int]]) -> float:
    difference = max_logit_difference(ours, theirs, prompts)
    if not difference <= MAX_LOGIT_DIFFERENCE:  # so put, NaN is refused as well
        raise VerificationError(
            f"transformers' logits differ from Etude's by up to {difference:.2e}; {MAX_LOGIT_DIFFERENCE:.0e} is allowed"
        )
    return difference


@torch.inference_mode()
def max_logit_difference(ours: Etude, theirs: Any, prompts: Sequence[list[int]]) -> float:
    """The largest difference of any logit at any position of ``prompts``."""
    rows = [torch.tensor([ids]) for ids in prompts]
    return torch.stack([(ours(row) - theirs(row).logits.float()).abs().max() for row in rows]).max().item()
