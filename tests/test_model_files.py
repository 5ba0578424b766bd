"""Model files from strangers: whatever stands in them, they load whole or are refused by name, and nothing in them is run.

Every mutation is drawn from a seeded generator, so a failure can be had again; all run in a forked child, which neither a
crash nor a hang nor an allocation without bounds survives unnoticed.
"""

import ast
import copy
import hashlib
import importlib.util
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from etude.errors import DataError, EtudeError, MismatchError, StorageError, VerificationError
from etude.export import RECORD, export_record
from etude.generation.text import load as load_text
from etude.llama import config_to_hf, load_any, load_transformers
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.tokenizer import Tokenizer
from etude.training import checkpoint
from etude.training.config import PretrainConfig
from etude.training.optim import make_optimizers
from etude.weights import load_model, save_model

SEED = 38
MAX_GROWTH = 300 * 2**20  # bytes of memory that all the refusals of a test may take beyond what was there before
MAX_SECONDS = 20  # for one file
REFUSALS = {DataError.exit_code, MismatchError.exit_code, StorageError.exit_code}


# ---- small real things to damage ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """One model in every form that Etude reads: its own, a Llama in one file, a Llama in shards, a checkpoint."""
    root = tmp_path_factory.mktemp("models")
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    model = Etude(EtudeConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape))
    found = {name: root / name for name in ("etude", "llama", "sharded", "run")}
    save_model(model, found["etude"])
    tokenizer.save(found["etude"])
    shutil.copytree(found["etude"], found["llama"])
    (found["llama"] / "config.json").write_text(json.dumps(config_to_hf(model.config)))
    shutil.copytree(found["llama"], found["sharded"])
    shard(found["sharded"])
    optimizers = make_optimizers(model, PretrainConfig(), torch.device("cpu"))
    model.logits(model.hidden(torch.tensor([[1, 2, 3]]))).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    checkpoint.write(found["run"], checkpoint.snapshot({"step": 1}, model, optimizers), keep=1)
    return found


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def shard(folder: Path) -> None:
    """Cut the one file of weights in two, with the index that names them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: tensors[name].clone() for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, held in halves.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


# ---- a child that is watched --------------------------------------------------------------------------------------------


def in_child(body: Callable[[Callable[[str], None]], list[str]], folder: Path) -> list[str]:
    """What ``body`` returns, run in a forked child. It is handed a function to say what it is about to try with: that is
    named if the child crashes, or is stopped after :data:`MAX_SECONDS`.
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("forks, and asks Linux for the memory in use")
    trying, told = folder / "trying", folder / "told"
    child = os.fork()
    if child == 0:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, resource.RLIM_INFINITY))

            def about_to(what: str) -> None:
                trying.write_text(what)
                signal.alarm(MAX_SECONDS)

            problems = body(about_to)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if grown > MAX_GROWTH:
                problems.append(f"memory grew by {grown / 2**20:.0f} MiB")
            told.write_text(json.dumps(problems))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:  # whatever happens, no second pytest goes on from here
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"the child ended with {code} at {trying.read_text()}"
    return json.loads(told.read_text())


def attempt(load: Callable[[], object], folder: Path) -> tuple[str, object]:
    """What is wrong with how ``load`` ended, "" if nothing; and what it returned, None if it refused as it should."""
    try:
        return "", load()
    except EtudeError as error:
        message = str(error)
        if error.exit_code not in REFUSALS:
            return f"exit code {error.exit_code}: {message[:300]}", None
        if not message.startswith(str(folder)):
            return f"does not begin with what is refused: {message[:300]}", None
        if not message.isprintable() or len(message) > 1500:
            return f"not one printable line: {message[:300]!r}", None
        return "", None
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}", None


# ---- safetensors ----------------------------------------------------------------------------------------------------------

NUMBERS = (-1, 0, 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 1.5, 1e308)
ODD_VALUES = (None, True, "", "x", [], {}, [None], {"a": {"b": []}}, [[[[]]]], "\ud800", *NUMBERS)
DTYPES = ("", "F33", "float32", "f32", "U8", "I8", "I16", "I32", "I64", "F64", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "U64")
NAMES = ("../../x", "/etc/passwd", "a\0b", "", "x" * 10_000, "a\nb", "\x1b[2J", "\ud800", "__metadata__", "春", "model..",
         "%s%n{0}")  # fmt: skip


def split(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def flip(data: bytes, start: int, stop: int, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(start, stop)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def mutated(data: bytes, kind: str, draw: random.Random) -> bytes:
    """``data``, a safetensors file, damaged in one way."""
    header, body = split(data)
    start = len(data) - len(body)
    name = draw.choice(sorted(header.keys() - {"__metadata__"}))
    entry = header[name]
    match kind:
        case "data":
            return flip(data, start, len(data), draw)
        case "header":
            return flip(data, 0, start, draw)
        case "length":
            known = (0, 1, 2, start - 9, start - 7, 99_999_999, 100_000_000, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 8,
                     2**64 - 1)  # fmt: skip
            return struct.pack("<Q", draw.choice((*known, draw.randrange(len(data)), draw.randrange(2**64)))) + data[8:]
        case "cut":
            return data[: draw.choice((0, 1, 7, 8, start, draw.randrange(start), draw.randrange(len(data))))]
        case "appended":
            return data + draw.randbytes(draw.choice((1, 8, 4096)))
        case "inserted":
            at = draw.randrange(8, start)
            return data[:at] + draw.choice((b"\0", b"\xff", b"{", b"}", b'"', b",", b"9" * 30, b"[" * 99)) + data[at:]
        case "offsets":
            first, last = entry["data_offsets"]
            other = header[draw.choice(sorted(header.keys() - {"__metadata__"}))]["data_offsets"]
            odd = draw.choice(ODD_VALUES)
            choices = ([last, first], [first], [first, last, last], [first, last - 4], [first + 1, last + 1], list(other),
                       [odd, last], [first, odd], [odd, odd], odd, [first + len(body), last + len(body)])  # fmt: skip
            entry["data_offsets"] = draw.choice(choices)
        case "dtype":
            entry["dtype"] = draw.choice((*DTYPES, *ODD_VALUES))
        case "shape":
            shape, odd = entry["shape"], draw.choice(ODD_VALUES)
            entry["shape"] = draw.choice(
                ([2**32, 2**32], [2**62, 4], [0], [0, 2**62], [], shape[::-1], [*shape, 1], [1] * 1000, [math.prod(shape)],
                 [odd], [odd, *shape[1:]], odd, [-1 * size for size in shape], [size * 2 for size in shape])
            )  # fmt: skip
        case "names":
            new = draw.choice(NAMES)
            header = {new if key == name else key: value for key, value in header.items()}
        case "entries":
            match draw.randrange(6):
                case 0:
                    del header[name]
                case 1:
                    header[draw.choice(NAMES)] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
                case 2:
                    header[name] = draw.choice(ODD_VALUES)
                case 3:
                    entry[draw.choice(("extra", "dtype ", "shape\0"))] = draw.choice(ODD_VALUES)
                case 4:
                    del entry[draw.choice(sorted(entry))]
                case 5:
                    header[draw.choice(NAMES)] = {"dtype": "F32", "shape": [4], "data_offsets": [len(body), len(body) + 16]}
                    body += bytes(16)
        case "twice":
            twice = draw.choice(
                (json.dumps({name: draw.choice((entry, {**entry, "shape": [1]}, 3))}), '{"__metadata__": {"a": "b"}}')
            )
            return joined(json.dumps(header).encode()[:-1] + b", " + twice[1:].encode(), body)
        case "metadata":
            odd = draw.choice(ODD_VALUES)
            header["__metadata__"] = draw.choice(
                (odd, {"format": odd}, {"format": "tf"}, {"x": "y" * 100_000}, {"a\0": "\x1b[2J"})
            )
        case "nested":
            depth = draw.choice((50, 127, 128, 1000, 100_000))
            opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
            deep = opening * depth + b"1" + closing * draw.choice((0, depth))
            return joined(draw.choice((deep, b'{"__metadata__":' + deep + b"}", b'{"a":' + deep + b"}")), body)
        case "other":
            pickled = b"cos\nsystem\n(S'false'\ntR."
            return draw.choice((b"", bytes(1000), draw.randbytes(1000), b"PK\3\4" + draw.randbytes(99), pickled, joined(pickled, body),
                                joined({}, body), joined({}, b""), joined([], b""), joined(b"null", b""), joined(b"", b"")))  # fmt: skip
    return joined(header, body)


KINDS = ("data", "header", "length", "cut", "appended", "inserted", "offsets", "dtype", "shape", "names", "entries", "twice",
         "metadata", "nested", "other")  # fmt: skip


def damages(count: int) -> Iterator[tuple[str, str, random.Random]]:
    """``count`` times (label, kind, generator), every kind in turn."""
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        yield f"{kind} {SEED}:{number}", kind, random.Random(f"{SEED}:{number}")


# Each way in: what loads, the folder it loads from, the file that is damaged, and how often.
WAYS = {
    "an Etude model": (load_model, "etude", "model.safetensors", 2000),
    "a Llama": (load_any, "llama", "model.safetensors", 500),
    "a shard": (load_any, "sharded", "model-00001-of-00002.safetensors", 500),
    "text in, text out": (lambda folder: load_text(folder, "cpu").model, "etude", "model.safetensors", 300),
}


@pytest.mark.parametrize("way", WAYS)
def test_damaged_safetensors_files_load_whole_or_are_refused_by_name(folders, tmp_path, way):
    load, form, file, count = WAYS[way]
    folder = copied(folders[form], tmp_path / "model")
    sound = (folder / file).read_bytes()
    shapes = {name: tensor.shape for name, tensor in load(folder).state_dict().items()}

    def body(about_to) -> list[str]:
        problems = []
        for label, kind, draw in damages(count):
            about_to(label)
            (folder / file).write_bytes(mutated(sound, kind, draw))
            wrong, model = attempt(lambda: load(folder), folder)
            tensors = model.state_dict() if model is not None else {}
            if wrong:
                problems.append(f"{label}: {wrong}")
            elif kind == "data" and model is None:
                problems.append(f"{label}: refused, though only numbers changed, which nothing here can know")
            elif kind in ("length", "cut", "appended", "nested") and model is not None:
                problems.append(f"{label}: loaded")
            elif tensors and {name: tensor.shape for name, tensor in tensors.items()} != shapes:
                problems.append(f"{label}: loaded with other shapes")
            elif any(tensor.dtype != torch.float32 or tensor.is_meta for tensor in tensors.values()):
                problems.append(f"{label}: loaded in part")
        return problems

    assert in_child(body, tmp_path) == []


@pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "under a manifest that fits"])
def test_no_change_of_a_checkpoint_is_loaded(folders, tmp_path, sealed):
    """The manifest finds every change. Whoever writes a manifest that fits meets the reader of safetensors."""
    step = copied(folders["run"], tmp_path / "run") / "checkpoints" / "step-00000001"
    manifest = step / checkpoint.MANIFEST
    sound = {path: path.read_bytes() for path in sorted(step.iterdir()) if path.suffix == ".safetensors" or not sealed}
    assert len(sound) == (3 if sealed else 5)

    def body(about_to) -> list[str]:
        problems = []
        for number, (label, kind, draw) in enumerate(damages(2000)):
            path = sorted(sound)[number // len(KINDS) % len(sound)]
            whole, label = sound[path], f"{path.name} {label}"
            damaged = mutated(whole, kind, draw) if path.suffix == ".safetensors" else flip(whole, 0, len(whole), draw)
            if damaged == whole:
                continue
            about_to(label)
            path.write_bytes(damaged)
            before, after = (hashlib.sha256(content).hexdigest() for content in (whole, damaged))
            if sealed:
                text = manifest.read_text()
                manifest.write_text(text.replace(before, after))
            wrong, found = attempt(lambda: checkpoint.load(step), step)
            path.write_bytes(whole)
            if sealed:
                manifest.write_text(text)
            if wrong:
                problems.append(f"{label}: {wrong}")
            elif found is not None and not sealed:
                problems.append(f"{label}: loaded")
        return problems

    assert in_child(body, tmp_path) == []


# ---- the JSON beside the weights ------------------------------------------------------------------------------------------

ROPES = (
    {"rope_type": "yarn", "factor": math.nan}, {"rope_type": "linear", "factor": math.inf}, {"rope_type": []}, {"factor": None},
    {"rope_type": "yarn", "factor": 2, "beta_fast": "x"}, {"rope_type": "yarn", "factor": 2, "attention_factor": []},
    {"rope_type": "yarn", "factor": 2, "beta_slow": -1}, {"rope_type": "llama3", "factor": 2}, {"rope_theta": "x"},
    {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 1, "original_max_position_embeddings": 8},
    {"type": "linear", "factor": 1e-300}, {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 10**400},
)  # fmt: skip
VALUES = (*ODD_VALUES, *ROPES, 3, 8, 10**9, 10**12, 10**400, math.nan, math.inf, "8", "\x1b[2J\n", {"content": 3}, "x" * 10_000,
          {"": "modeling.Evil"}, ["a", 3, None])  # fmt: skip
WHOLE_FILES = (b"", b"null", b"[]", b"3", b'"x"', b"{", b"{}", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"\xc3\x28", bytes(100),
               b"[" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900,
               b"9" * 10_000, b'{"vocab_size":' + b"9" * 10_000 + b"}")  # fmt: skip
ABSENT = ("rope_parameters", "rope_scaling", "layer_types", "sliding_window", "auto_map", "eos_token_id", "model_type", "hidden_act",
          "use_sliding_window", "chat_template", "eos_token", "unk_token", "weight_map")  # fmt: skip


def mutated_json(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """(what was done, the file): a value anywhere in ``data`` replaced or taken away, one added, or another file altogether."""
    if draw.random() < 0.1:
        whole = draw.choice((*WHOLE_FILES, data[: draw.randrange(len(data))], flip(data, 0, len(data), draw)))
        return f"{whole[:30]!r}", whole
    values = copy.deepcopy(json.loads(data))
    holder, keys = values, [draw.choice((*values, draw.choice(ABSENT)))]
    while keys[-1] in (holder if isinstance(holder, dict) else range(len(holder))):
        inner = holder[keys[-1]]
        if not isinstance(inner, dict | list) or not inner or draw.random() < 0.3:
            break
        holder, keys = inner, [*keys, draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))]
    if draw.random() < 0.15:
        new = "nothing"
        if isinstance(holder, list) or keys[-1] in holder:
            del holder[keys[-1]]
    else:
        new = holder[keys[-1]] = draw.choice(VALUES)
    return f"{keys} = {str(new)[:60]!r}", json.dumps(values).encode()


def used_model(model: Etude) -> Etude:
    with torch.inference_mode():
        model(torch.tensor([[1]]))
    return model


def used_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer whose every part was asked for once."""
    found = Tokenizer(folder)
    named = {found.pad_id, found.eos_id, found.document_end_id, *found.special_ids, *found.encode("春 a 12")} | {
        found.bos_id or 0
    }
    assert max(named) < len(found) == len(found.byte_lengths) and len(found.fingerprint) == 64
    found.save(folder / "saved")
    if found.settings.get("chat_template"):
        found.render((("user", "x"), ("assistant", "y")))
    return found


JSON_WAYS = {
    "an Etude model's config.json": (lambda folder: used_model(load_model(folder)), "etude", "config.json"),
    "a Llama's config.json": (lambda folder: used_model(load_any(folder)), "llama", "config.json"),
    "an index": (lambda folder: used_model(load_any(folder)), "sharded", "model.safetensors.index.json"),
    "tokenizer_config.json": (used_tokenizer, "etude", "tokenizer_config.json"),
    "tokenizer.json": (used_tokenizer, "etude", "tokenizer.json"),
    "config.json, for text": (lambda folder: load_text(folder, "cpu"), "llama", "config.json"),
    "tokenizer_config.json, for text": (lambda folder: load_text(folder, "cpu"), "etude", "tokenizer_config.json"),
    "tokenizer.json, for text": (lambda folder: load_text(folder, "cpu"), "etude", "tokenizer.json"),
}


@pytest.mark.parametrize("way", JSON_WAYS)
def test_damaged_json_files_load_or_are_refused_by_name(folders, tmp_path, way):
    load, form, file = JSON_WAYS[way]
    folder = copied(folders[form], tmp_path / "model")
    sound = (folder / file).read_bytes()
    load(folder)

    def body(about_to) -> list[str]:
        problems, accepted = [], 0
        for number in range(250):
            what, damaged = mutated_json(sound, random.Random(f"{SEED}:{way}:{number}"))
            about_to(what)
            (folder / file).write_bytes(damaged)
            wrong, found = attempt(lambda: load(folder), folder)
            accepted += found is not None
            if wrong:
                problems.append(f"{number} {what}: {wrong}")
        return problems if accepted < 225 else [*problems, f"{accepted} of 250 were accepted: the mutations do nothing"]

    assert in_child(body, tmp_path) == []


# ---- what a number or a name may not do -----------------------------------------------------------------------------------


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


@pytest.mark.parametrize("form", ["etude", "llama"])
@pytest.mark.parametrize("key, value", [("num_hidden_layers", 10**9), ("max_position_embeddings", 10**9), ("head_dim", 10**9)])
def test_sizes_that_nobody_has_memory_for_are_refused_before_they_are_tried(folders, tmp_path, form, key, value):
    folder = copied(folders[form], tmp_path / "model")
    edit_json(folder / "config.json", **{key: value})

    def body(about_to) -> list[str]:
        about_to(f"{key} = {value}")
        wrong, model = attempt(lambda: used_model(load_any(folder)), folder)
        return [wrong or "loaded"] if wrong or model is not None else []

    assert in_child(body, tmp_path) == []


def test_values_of_the_wrong_kind_are_named_with_the_one_that_belongs_there(folders, tmp_path):
    folder = copied(folders["etude"], tmp_path / "model")
    for key, value, words in [
        ("hidden_size", "8", "hidden_size is '8', not int"),
        ("hidden_size", True, "hidden_size is True, not int"),
        ("rms_norm_eps", None, "rms_norm_eps is None, not float"),
        ("rope_scaling", 3, "rope_scaling is 3, not dict or null"),
        ("rope_theta", math.nan, "rope_theta is nan, not a finite number"),
        ("num_hidden_layers", 99, "config.json says 99 layers"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "attention_factor": math.inf}, "rotary settings give no angles"),
    ]:
        edit_json(folder / "config.json", **{**json.loads((folders["etude"] / "config.json").read_text()), key: value})
        with pytest.raises(MismatchError, match=words):
            load_model(folder)


def test_weights_that_are_no_floating_point_numbers_are_refused(folders, tmp_path):
    """F32 read as I32 has the right size and loads with the right shapes, but every weight would be in the millions."""
    folder = copied(folders["etude"], tmp_path / "model")
    header, body = split((folder / "model.safetensors").read_bytes())
    header["model.norm.weight"]["dtype"] = "I32"
    (folder / "model.safetensors").write_bytes(joined(header, body))
    with pytest.raises(MismatchError, match=r"model\.norm\.weight holds torch\.int32"):
        load_model(folder)


def test_a_weight_that_is_there_under_two_names_is_refused(folders, tmp_path):
    folder = copied(folders["etude"], tmp_path / "model")
    header, body = split((folder / "model.safetensors").read_bytes())
    header["norm.weight"] = {"dtype": "F32", "shape": [8], "data_offsets": [len(body), len(body) + 32]}
    (folder / "model.safetensors").write_bytes(joined(header, body + bytes(32)))
    with pytest.raises(MismatchError, match=r"norm\.weight"):
        load_model(folder)


def test_token_ids_far_beyond_the_vocabulary_are_refused_and_a_gap_is_counted(folders, tmp_path):
    folder = copied(folders["etude"], tmp_path / "model")
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    token = "<|reserved_4|>"
    for number in (400, 10**9):
        values["model"]["vocab"][token] = number
        next(added for added in values["added_tokens"] if added["content"] == token)["id"] = number
        (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
        if number == 400:
            assert len(Tokenizer(folder)) == 401  # what an embedding needs, though it has fewer tokens
            with pytest.raises(MismatchError, match="the tokenizer has 401 tokens"):
                load_text(folder, "cpu")
    with pytest.raises(DataError, match=r"tokenizer\.json: \d+ tokens with ids up to 1,000,000,000"):
        Tokenizer(folder)


HUGE = {
    "config.json": (load_any, "llama", 2**30),
    "model.safetensors.index.json": (load_any, "sharded", 2**30),
    "tokenizer.json": (Tokenizer, "etude", 2**33),
    "tokenizer_config.json": (Tokenizer, "etude", 2**33),
    "chat_template.jinja": (Tokenizer, "etude", 2**33),
}


@pytest.mark.parametrize("file", HUGE)
def test_a_file_larger_than_any_of_its_kind_is_refused_without_being_read(folders, tmp_path, file):
    load, form, size = HUGE[file]
    folder = copied(folders[form], tmp_path / "model")
    (folder / file).touch()
    os.truncate(folder / file, size)  # sparse: it takes no room on the disk

    def body(about_to) -> list[str]:
        about_to(file)
        wrong, found = attempt(lambda: load(folder), folder)
        return [wrong or "loaded"] if wrong or found is not None else []

    assert in_child(body, tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_refused_rather_than_waited_for(folders, tmp_path, file):
    for make in (os.mkfifo, os.mkdir):
        folder = copied(folders["etude"], tmp_path / make.__name__)
        (folder / file).unlink()
        make(folder / file)

        def body(about_to, folder=folder) -> list[str]:
            about_to(file)
            wrong, found = attempt(lambda: load_text(folder, "cpu"), folder)
            return [wrong or "loaded"] if wrong or found is not None else []

        assert in_child(body, tmp_path) == []


# ---- code that a folder brings along --------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self):
        return (exec, (f"open({self.canary!r}, 'w').close()",))


def script(path: str):
    """A script as a module, to be called without the seconds that a process takes to start."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(path: str, *arguments: str) -> None:
    module, before = script(path), sys.argv
    sys.argv = [path, *arguments]
    try:
        module.main()
    finally:
        sys.argv = before


def chat_with_transformers(folder: Path) -> None:
    module = script("inference/hf.py")
    module.ensure_exported(folder)
    module.HFModel(module.HFConfig(model=str(folder), device="cpu")).chat("x")


def convert(folder: Path) -> None:
    run_script("tool/convert_hf.py", "--input", str(folder), "--output", str(folder.with_name("converted")))


def evaluate(folder: Path) -> None:
    text = folder.with_name("text.txt")
    text.write_text("one two three\n" * 20)
    cache = str(folder.with_name("cache"))
    run_script("tool/evaluate.py", "--model", str(folder), "--text", str(text), "--token_cache", cache, "--device", "cpu")


USERS = {
    "load_any": load_any,
    "text": lambda folder: load_text(folder, "cpu"),
    "verified": lambda folder: load_text(folder, "cpu", verify=True),
    "inference/hf.py": chat_with_transformers,
    "tool/convert_hf.py": convert,
    "tool/evaluate.py": evaluate,
}


def users(form: str) -> list[tuple[str, Callable[[Path], object]]]:
    """Whoever takes a folder of this form: hf.py takes exports only, convert_hf.py nothing but Etude's own."""
    refusing = {"etude": "inference/hf.py", "llama": "tool/convert_hf.py"}[form]
    return [(name, use) for name, use in USERS.items() if name != refusing]


@pytest.fixture
def booby_trapped(folders, tmp_path):
    """Makes a folder whose code, once imported, writes the canary; and says where that is."""
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()\nraise SystemExit('ran')\n"

    def make(form: str) -> tuple[Path, Path]:
        folder = copied(folders[form], tmp_path / form)
        for name in ("modeling_evil.py", "tokenization_evil.py", "custom_generate/generate.py", "__init__.py", "conftest.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(code)
        return folder, canary

    return make


MODEL_CODE = {
    "AutoConfig": "modeling_evil.EvilConfig",
    "AutoModel": "modeling_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", None],
}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("form", ["etude", "llama"])
def test_a_folder_that_asks_for_its_own_code_is_refused_and_nothing_of_it_runs(booby_trapped, monkeypatch, form, file):
    folder, canary = booby_trapped(form)
    edit_json(folder / file, auto_map=MODEL_CODE)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks whoever sits at the terminal
    for name, use in users(form):
        if (name, file) == ("load_any", "tokenizer_config.json"):
            continue  # it reads no tokenizer
        with pytest.raises(MismatchError, match=rf"{file}: .*auto_map .*code of .+ own, which Etude never runs"):
            use(folder)
        assert not canary.exists(), name
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(SystemExit, match="ran"):
        importlib.import_module("modeling_evil")
    assert canary.exists()  # the trap does work


@pytest.mark.parametrize("form", ["etude", "llama"])
def test_code_that_lies_in_a_folder_unasked_for_is_not_run(booby_trapped, monkeypatch, form, capsys):
    folder, canary = booby_trapped(form)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for name, use in users(form):
        use(folder)
        assert not canary.exists(), name


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_from_the_hub_is_not_fetched_because_a_config_names_one(folders, tmp_path, key):
    folder = copied(folders["llama"], tmp_path / "model")
    edit_json(folder / "config.json", **{key: "somebody/kernel:evil"})
    with pytest.raises(MismatchError, match=f"{key} names code of the model's own"):
        load_transformers(folder, torch.float32)


def test_transformers_is_asked_to_trust_no_code_and_to_read_no_pickle(folders, monkeypatch):
    import transformers

    asked, found = {}, transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.update(k) or found(*a, **k))
    load_transformers(folders["llama"], torch.float32)
    assert asked["trust_remote_code"] is False and asked["use_safetensors"] is True and asked["local_files_only"] is True


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{% include 'config.json' %}",
)
FAILURES = (
    "{{ 1 / 0 }}",
    "{{ messages[0].content + 1 }}",
    "{% for",
    "{{ range(10 ** 9) | list }}",
    "{{ nobody.knows }}",
    "{{ 3 () }}",
)


@pytest.mark.parametrize("template", [*ESCAPES, *FAILURES])
def test_a_chat_template_can_do_nothing_but_render(folders, tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    folder = copied(folders["etude"], tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(DataError, match=f"{folder}: the chat template refuses"):
        Tokenizer(folder).render((("user", "x"),))
    assert not (tmp_path / "CANARY").exists()


# ---- pickles --------------------------------------------------------------------------------------------------------------

PICKLES = ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "weights.pkl",
           "training_args.bin", "optimizer.pt", ".metadata", "__0_0.distcp", "rng_state.pth", "tokenizer.pkl")  # fmt: skip


def plant_pickles(folder: Path, canary: Path) -> None:
    for number, name in enumerate(PICKLES):
        with open(folder / name, "wb") as file:
            torch.save({"x": Bomb(canary)}, file) if number % 2 else pickle.dump(Bomb(canary), file)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["etude", "llama"])
def test_pickles_beside_or_instead_of_safetensors_are_never_opened(folders, tmp_path, form, capsys):
    canary = tmp_path / "canary"
    folder = copied(folders[form], tmp_path / form)
    plant_pickles(folder, canary)
    for name, use in users(form):
        use(folder)
        assert not canary.exists(), name
    (folder / "model.safetensors").unlink()
    for name, use in users(form):
        with pytest.raises(EtudeError, match="safetensors") as refusal:
            use(folder)
        assert refusal.value.exit_code in {*REFUSALS, VerificationError.exit_code} and not canary.exists(), name
    index = folder / "model.safetensors.index.json"
    index.write_text((folder / "pytorch_model.bin.index.json").read_text())  # an index that names a pickle as a shard
    with pytest.raises(EtudeError, match="safetensors"):
        load_any(folder)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary)))  # noqa: S301
    assert canary.exists()  # the bomb does work


def test_pickles_in_a_checkpoint_are_never_opened(folders, tmp_path):
    canary = tmp_path / "canary"
    run = copied(folders["run"], tmp_path / "run")
    step = run / "checkpoints" / "step-00000001"
    plant_pickles(step, canary)
    plant_pickles(run, canary)
    assert checkpoint.newest_good(run).step == 1
    for path in step.iterdir():
        if path.suffix in (".safetensors", ".json"):
            path.unlink()  # what torch.distributed.checkpoint writes is left
    with pytest.raises(DataError, match=checkpoint.MANIFEST):
        checkpoint.load(step)
    assert not canary.exists()


# ---- transformers' own way in ---------------------------------------------------------------------------------------------


def test_transformers_never_makes_up_weights_that_are_missing(folders, tmp_path):
    """It would draw them at random, with a warning, and a chat would answer with noise."""
    from safetensors.torch import load_file, save_file

    folder = copied(folders["llama"], tmp_path / "model")
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"1 of transformers' weights are in no file, model\.norm\.weight"):
        load_transformers(folder, torch.float32)


def test_a_damaged_generation_config_is_refused_or_read(folders, tmp_path):
    folder = copied(folders["llama"], tmp_path / "model")
    file = folder / "generation_config.json"
    sound = json.dumps({"eos_token_id": 2, "do_sample": True, "temperature": 0.8, "top_k": 50, "max_length": 20}).encode()
    accepted = 0
    for number in range(60):
        what, damaged = mutated_json(sound, random.Random(f"{SEED}:generation:{number}"))
        file.write_bytes(damaged)
        try:
            load_transformers(folder, torch.float32)
            accepted += 1
        except VerificationError as error:
            assert str(error).startswith(f"transformers cannot load {folder}: ") and str(error).isprintable(), what
    assert accepted < 60


def test_a_damaged_record_of_an_export_is_no_record(tmp_path):
    for content in (b"[" * 100_000, b"\xff", b"3", b'{"dtype": ["float32"]}', b'{"license": {}}', b'{"source": 3}'):
        (tmp_path / RECORD).write_bytes(content)
        assert export_record(tmp_path) == {}, content[:20]


# ---- the package's own text -----------------------------------------------------------------------------------------------

# tests/test_checkpoint.py bans unpickling, eval and code from a model's folder; these run commands, or write where they like.
UNSAFE_CALLS = {
    "os.system", "os.popen", "pty.spawn", "runpy.run_path", "runpy.run_module", "__import__", "compile", "builtins.exec",
    "builtins.eval", "jinja2.Template", "jinja2.Environment", "shutil.unpack_archive", "pandas.read_pickle", "torch.package",
    "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all",
}  # fmt: skip
UNSAFE_METHODS = {"extractall", "from_file_unsafe", "unsafe_load"}


def unsafe(text: str) -> list[str]:
    """What in a Python file could run what it reads, each as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_CALLS or called.rpartition(".")[2] in UNSAFE_METHODS:
                found.append(f"{node.lineno}: {called}")
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if given.get("shell", "False") != "False":
                found.append(f"{node.lineno}: shell={given['shell']}")
            for name, safe in (("trust_remote_code", "False"), ("weights_only", "True"), ("allow_pickle", "False")):
                if given.get(name, safe) != safe:
                    found.append(f"{node.lineno}: {name}={given[name]}")
        if isinstance(node, ast.Dict):
            keys = {ast.unparse(key): ast.unparse(value) for key, value in zip(node.keys, node.values, strict=True) if key}
            if keys.get("'trust_remote_code'", "False") != "False":
                found.append(f"{node.lineno}: trust_remote_code in a dictionary")
    return found


def test_nothing_in_the_package_runs_commands_or_trusts_code():
    found = []
    for path in sorted(file for folder in ("etude", "train", "tool", "inference") for file in (ROOT / folder).rglob("*.py")):
        found += [f"{path}:{problem}" for problem in unsafe(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    ["os.system('ls')", "subprocess.run('ls', shell=True)", "subprocess.run(c, shell=flag)", "archive.extractall(folder)",
     "load(folder, trust_remote_code=True)", "load(folder, trust_remote_code=flag)", "load(folder, **{'trust_remote_code': True})",
     "torch.load(p, weights_only=0)", "np.load(p, allow_pickle=True)", "jinja2.Template(text)", "yaml.full_load(text)"],
)  # fmt: skip
def test_what_is_unsafe_is_found(text):
    assert unsafe(text)
