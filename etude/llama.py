"""To and from Hugging Face's Llama format.

An Etude model is a Llama under another ``model_type``: its weights bear Hugging Face's names and its rotary layout is
Hugging Face's, so nothing is permuted. What remains is config.json, in a form that old and new readers understand, and
proof: an export appears only if transformers, reading the files just written, computes what Etude computes.
"""

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.chat import ChatFormat
from etude.errors import DataError, MismatchError, UsageError, VerificationError
from etude.files import whole_folder
from etude.model.attention import KVCache
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.tokenizer import Tokenizer
from etude.weights import (
    MODEL_TYPE,
    build_model,
    load_model,
    read_config_json,
    read_safetensors,
    to_disk_name,
    write_safetensors,
)

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}  # what generation_config.json recommends

# What transformers assumes where a config.json is silent. Sizes have no default: a guess would never fit the weights.
HF_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "initializer_range": 0.02}
HF_DEFAULTS_OF = {
    "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
}


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
    if kind not in HF_DEFAULTS_OF:
        raise MismatchError(f"{source}: model_type is {kind!r}; Etude can load {MODEL_TYPE}, {', '.join(HF_DEFAULTS_OF)}")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in sizes if values.get(name) is None]:
        raise DataError(f"{source}: lacks {', '.join(missing)}")
    values = {**HF_DEFAULTS, **HF_DEFAULTS_OF[kind], **values}
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
        return EtudeConfig(**{**same, "rope_theta": float(rope.get("rope_theta", values["rope_theta"]))})
    except (UsageError, TypeError, ValueError) as error:
        raise MismatchError(f"{source}: {error}") from None


def _obstacles(values: dict[str, Any], rope: dict[str, Any]) -> list[str]:
    """What ``values`` asks for that Etude's model does not do, in words."""
    window = values.get("sliding_window") if values["model_type"] == "mistral" else None
    layer_types = set(values.get("layer_types") or []) - {"full_attention"}
    found = {
        "auto_map (a model with code of its own, which Etude never runs)": values.get("auto_map"),
        "quantization_config (quantized weights)": values.get("quantization_config"),
        "attention_bias": values.get("attention_bias"),
        "mlp_bias": values.get("mlp_bias"),
        f"hidden_act {values.get('hidden_act')}": values.get("hidden_act", "silu") not in ("silu", "swish"),
        "sliding-window attention": values.get("use_sliding_window")
        or layer_types
        or (window is not None and window < values["max_position_embeddings"]),
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
            _check_logits(model, load_transformers(folder, torch.float32), [ids])
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
        shard_of = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(shard_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index_path}: not an index of shards ({error!r}); download it again") from None
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        # A plain name, so that an index cannot reach out of its folder.
        if not isinstance(shard, str) or re.search(r"[/\\]|^\.*$", shard):
            raise DataError(f"{index_path}: {shard!r} is not the name of a file in this folder")
        if not (folder / shard).is_file():
            raise DataError(f"{index_path}: its shard {shard} is missing; download it again")
        tensors |= read_safetensors(folder / shard)
    if absent := sorted(shard_of.keys() - tensors.keys()):
        raise DataError(f"{index_path}: {len(absent)} weights are in no shard, {absent[0]} among them; download them again")
    return tensors


# --- export --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and by how much transformers' results differ from Etude's."""

    architecture: str
    parameters: int
    dtype: str
    positions: int  # at which all logits were compared, in fp32
    max_logit_difference: float
    greedy_tokens: int  # generated by both, identical
    dtype_difference: float  # largest change of a logit by storing and computing in dtype instead of fp32


MAX_LOGIT_DIFFERENCE = 1e-4
NEW_TOKENS = 32  # generated greedily after each prompt, as far as the context goes
TEXTS = (
    "The history of the city begins in the 12th century, when merchants built a bridge across the river.",
    "数学是研究数量、结构以及空间等概念的一门学科。",
    "Etude 练习曲 was trained in 2025; it costs €3.50,\n\tisn't large, and says 你好 🙂!",
)
CHATS = (
    [{"role": "user", "content": "Hello! Who are you?"}],
    [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "你好，请介绍一下你自己。"},
        {"role": "assistant", "content": "我是一个小型语言模型。"},
        {"role": "user", "content": "What is the capital of France?"},
    ],
)
SOURCE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
RECORD = "etude_export.json"


def export_llama(
    model_folder: str | Path, output_folder: str | Path, *, dtype: str = "float32", license: str = "unknown"
) -> ExportReport:
    """Write the Etude model in ``model_folder`` as a Hugging Face folder: a Llama, or a Qwen3 if it has ``qk_norm``.

    ``license`` is the model card's, a Hugging Face identifier such as ``apache-2.0``. The folder appears whole, made
    afresh, or not at all: :class:`VerificationError` unless transformers, reading it back, gives the same ids, the same
    fp32 logits (to 1e-4) and the same greedy tokens. With a half-precision ``dtype`` that is checked of the rounded
    weights, and the report says what rounding cost.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype ({dtype}) must be one of {', '.join(DTYPES)}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", license):
        raise UsageError(f"license ({license}) must be a Hugging Face licence identifier, such as apache-2.0 or other")
    model_folder, output_folder = Path(model_folder), Path(output_folder)
    model, tokenizer = load_model(model_folder), Tokenizer(model_folder)
    if len(tokenizer) > model.config.vocab_size:
        raise MismatchError(f"{model_folder}: {len(tokenizer)} tokens, but vocab_size is {model.config.vocab_size}")
    _refuse_to_replace(output_folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    config = config_to_hf(dataclasses.replace(model.config, **ids), dtype)
    weights = {to_disk_name(name): tensor.to(DTYPES[dtype]).contiguous() for name, tensor in model.state_dict().items()}

    with whole_folder(output_folder) as folder:
        write_safetensors(weights, folder / "model.safetensors")
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", {**ids, "do_sample": True, **SAMPLING})
        tokenizer.save(folder, max_length=model.config.max_position_embeddings)
        try:
            report = _verify(folder, model, tokenizer, dtype)
        except VerificationError as error:
            raise VerificationError(f"{output_folder}: not exported: {error}") from error
        _write_json(folder / RECORD, {"source": fingerprint(model_folder), "license": license, **dataclasses.asdict(report)})
        card = model_card(output_folder.name, model.config, report, license)
        (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
    return report


def export_record(output_folder: str | Path) -> dict[str, Any]:
    """What :func:`export_llama` noted beside an export: its source's fingerprint, its licence and its report."""
    try:
        record = json.loads((Path(output_folder) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def export_is_current(model_folder: str | Path, output_folder: str | Path) -> bool:
    """Whether ``output_folder`` was exported from ``model_folder`` as that is now."""
    return export_record(output_folder).get("source") == fingerprint(model_folder)


def fingerprint(model_folder: str | Path) -> str:
    """SHA-256 over the files an export is made from."""
    whole = hashlib.sha256()
    for name in SOURCE_FILES:
        path = Path(model_folder) / name
        if path.is_file():
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _refuse_to_replace(folder: Path) -> None:
    """Raise :class:`UsageError` if exporting to ``folder`` would delete anything but an earlier export."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is a file of this name; choose another output folder")
    known = ("*.safetensors", "*.json", "*.jinja", "*.bin", "merges.txt", "README.md", "LICENSE", ".gitattributes")
    names = {path.name: path.is_dir() for path in sorted(folder.iterdir())}
    foreign = [name for name, is_dir in names.items() if is_dir or not any(fnmatch(name, each) for each in known)]
    if foreign or (names and "config.json" not in names):
        held = ", ".join((foreign or list(names))[:3])
        raise UsageError(f"{folder}: this is no earlier export (it holds {held}); choose another output folder")
    if names and read_config_json(folder).get("model_type") == MODEL_TYPE:
        raise UsageError(f"{folder}: this is an Etude model, which an export would replace; choose another output folder")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


# --- verification --------------------------------------------------------------------------------------------------


def load_transformers(folder: str | Path, dtype: torch.dtype) -> Any:
    """The model in ``folder`` as transformers reads it, in evaluation mode."""
    return _from_pretrained("AutoModelForCausalLM", folder, dtype=dtype).eval()


def _from_pretrained(auto_class: str, folder: str | Path, **options) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()  # its advice is about transformers, not about this model
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # of whatever kind: transformers can make nothing of the folder
        reason = " ".join(str(error).split())[:300]
        raise VerificationError(f"transformers cannot load {folder}: {reason}") from error


def _verify(folder: Path, model: Etude, tokenizer: Tokenizer, dtype: str) -> ExportReport:
    """Compare the files in ``folder`` with the ``model`` and ``tokenizer`` they were made from."""
    chats = [ChatFormat(tokenizer).prompt(messages) for messages in CHATS] if tokenizer.settings.get("chat_template") else []
    _check_tokenizer(folder, tokenizer, chats)
    prompts = [tokenizer.encode(text) for text in TEXTS] + chats
    prompts.append(list(islice(cycle(chain(*prompts)), 512)))  # far positions show what near ones hide: a wrong frequency
    context = model.config.max_position_embeddings
    prompts = [ids[: max(context - NEW_TOKENS, context // 2, 1)] for ids in prompts]

    stored = copy.deepcopy(model).to(DTYPES[dtype]).float()  # the weights as the file rounds them
    theirs = load_transformers(folder, torch.float32)
    difference = _check_logits(stored, theirs, prompts)
    room = [min(NEW_TOKENS, context - len(ids)) for ids in prompts]
    greedy = [_greedy(stored, ids, count, tokenizer.eos_id) for ids, count in zip(prompts, room, strict=True)]
    if greedy != [_greedy_transformers(theirs, ids, count) for ids, count in zip(prompts, room, strict=True)]:
        raise VerificationError("transformers continues a prompt with other tokens than Etude")
    rounding = 0.0 if dtype == "float32" else max_logit_difference(model, load_transformers(folder, DTYPES[dtype]), prompts)
    return ExportReport(
        architecture=type(theirs).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=dtype,
        positions=sum(len(ids) for ids in prompts),
        max_logit_difference=difference,
        greedy_tokens=sum(len(new) for new in greedy),
        dtype_difference=rounding,
    )


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, chats: Sequence[list[int]]) -> None:
    theirs = _from_pretrained("AutoTokenizer", folder)
    for text in TEXTS:
        if theirs(text, add_special_tokens=False)["input_ids"] != tokenizer.encode(text):
            raise VerificationError(f"transformers' tokenizer gives other ids for {text!r}")
    for messages, ids in zip(CHATS, chats, strict=False):
        if theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) != ids:
            raise VerificationError(f"transformers gives other ids for the chat {messages!r}")


def _check_logits(ours: Etude, theirs: Any, prompts: Sequence[list[int]]) -> float:
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


@torch.inference_mode()
def _greedy(model: Etude, ids: list[int], count: int, eos_id: int) -> list[int]:
    """The likeliest next tokens, up to and with ``eos_id``. It uses the cache: what is exported is the model that chats."""
    cache = KVCache(model.config, 1, len(ids) + count, like=model.head_weight)
    row, new = torch.tensor([ids]), []
    while len(new) < count and eos_id not in new[-1:]:
        new.append(int(model.logits(model.hidden(row, cache=cache)[:, -1]).argmax()))
        row = torch.tensor([new[-1:]])
    return new


def _greedy_transformers(model: Any, ids: list[int], count: int) -> list[int]:
    row = torch.tensor([ids])
    new = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=count)
    return new[0, len(ids) :].tolist()


# --- model card ----------------------------------------------------------------------------------------------------


def model_card(name: str, config: EtudeConfig, report: ExportReport, license: str) -> str:
    """The README.md of an export; its head is what the Hugging Face Hub reads."""
    return f"""\
---
license: {license}
library_name: transformers
pipeline_tag: text-generation
tags:
- etude
---

# {name}

A language model of {report.parameters:,} parameters ({config.num_hidden_layers} layers, {config.hidden_size} wide) that reads
{config.max_position_embeddings} tokens at most. Trained with Etude, exported as `{report.architecture}` in {report.dtype}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

Verified at export against the model as trained: the largest difference of any fp32 logit over {report.positions} positions is
{report.max_logit_difference:.1e}, and {report.greedy_tokens} greedily generated tokens are identical.
"""
