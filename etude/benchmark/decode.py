"""Measure greedy generation beside Hugging Face's ``generate``: same weights, precision and prompts, in turns in one run.

What a program generates is checked before it is timed. A token is right if a plain forward pass of Hugging Face's model over
the whole row, in fp32 and without a cache, finds it the likeliest; its *gap* is by how many standard deviations of the
logits it falls short of that.
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from etude.benchmark.report import in_turns, lively_std, tell, wait, with_memory
from etude.benchmark.train import shape_of
from etude.cli import option
from etude.errors import UsageError, VerificationError

Rows = list[list[int]]  # token ids of each row of a batch
MAX_GAP = 1e-3  # of any token, in fp32: a tie that was broken otherwise
# Of the tokens on average, in 16 bits. Rounding gives up to 0.006 on a CPU and 0.04 on a GPU; one cached token lost, 0.1 and more.
MAX_MEAN_GAP = 0.07


@dataclass(frozen=True)
class DecodeBenchmark:
    model: str = option("", "model folder, Etude's or a Llama; left out: a preset with random weights")
    preset: Literal["nano", "small", "base", "medium"] = option("small", "named shape")
    num_hidden_layers: int | None = option(None, "layers (default: the preset's)")
    vocab_size: int = option(16_384, "tokens in the vocabulary")
    prompt_tokens: int = option(64, "tokens of a prompt")
    new_tokens: int = option(256, "tokens to generate; nothing stops a row earlier")
    batch_sizes: tuple[int, ...] = option((1, 32), "how many prompts at once")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto", "of the weights and all that is computed; auto: what the hardware multiplies"
    )
    rounds: int = option(3, "rounds in which the programs take turns; the medians count")
    quick: bool = option(False, "a small shape and fewer tokens: a minute on two CPU cores")
    output: str = option("", "also write the figures to this .json file")

    def __post_init__(self) -> None:
        for name in ("vocab_size", "prompt_tokens", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} ({getattr(self, name)}) must be at least 1")
        if min(self.batch_sizes) < 1:
            raise UsageError(f"batch_sizes ({min(self.batch_sizes)}) must be at least 1")


def decode(config: DecodeBenchmark) -> None:
    """Compare, and print the figures."""
    if config.quick:
        quick = {"preset": "nano", "vocab_size": 4_096, "prompt_tokens": 32, "new_tokens": 64}
        config = dataclasses.replace(config, **quick)
    tell(compare(config), config.output)


def compare(config: DecodeBenchmark) -> dict[str, object]:
    import torch

    from etude.device import PRECISIONS, describe, pick_device, pick_precision

    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    dtype = PRECISIONS[precision]
    model = starting_model(config).to(dtype).to(device)
    oracle = huggingface_twin(model, torch.float32)  # of the weights as rounded
    figures: dict[str, object] = {
        "machine": describe(device),
        "torch": torch.__version__,
        "model": f"{config.model or config.preset}, {model.config.num_parameters()['total']:,} parameters",
        "precision": precision,
        "tokens": f"{config.prompt_tokens} + {config.new_tokens} new, greedy",
        "tokens in fp32": require_same_tokens(config, model, oracle),
    }
    bandwidth = copy_bandwidth(device)
    figures["copy GB/s"] = round(bandwidth / 1e9, 1)
    for size in config.batch_sizes:
        found = compare_batch(config, model, oracle, random_prompts(config, model, size))
        bound = bandwidth_bound(config, model, size, bandwidth)
        figures |= {f"batch {size}, {name}": figure for name, figure in summary(found, bound, model).items()}
    return figures


def starting_model(config: DecodeBenchmark):
    """The model to measure, in fp32 on the CPU."""
    import torch

    from etude.llama import load_any
    from etude.model.config import EtudeConfig
    from etude.model.transformer import Etude

    length = config.prompt_tokens + config.new_tokens
    if not config.model:
        shape = shape_of(config)
        torch.manual_seed(0)
        return Etude(
            EtudeConfig(
                vocab_size=config.vocab_size,
                max_position_embeddings=length,
                initializer_range=lively_std(shape["hidden_size"]),
                **shape,
            )
        ).eval()
    model = load_any(config.model)
    if length > model.config.max_position_embeddings:
        raise UsageError(
            f"prompt_tokens + new_tokens ({length}) is more than the context of {config.model} "
            f"({model.config.max_position_embeddings}); lower one of them"
        )
    return model


def random_prompts(config: DecodeBenchmark, model, count: int) -> Rows:
    import torch

    source = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (count, config.prompt_tokens), generator=source).tolist()


# --- the programs: each continues the prompts ------------------------------------------------------------------------


def etude_program(config: DecodeBenchmark, model, prompts: Rows) -> Callable[[], Rows]:
    from etude.generation.plain import generate
    from etude.generation.settings import SamplingSettings

    settings = SamplingSettings(max_new_tokens=config.new_tokens, temperature=0)

    def run() -> Rows:
        steps = [step.tokens for step in generate(model, prompts, settings)]
        return [list(row) for row in zip(*steps, strict=True)]

    return run


def huggingface_program(config: DecodeBenchmark, twin, prompts: Rows, cache: str) -> Callable[[], Rows]:
    """transformers' ``generate``; with a static cache on CUDA it compiles the step and replays it as a CUDA graph."""
    import torch

    ids = torch.tensor(prompts, device=twin.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": config.new_tokens}
    if cache != "dynamic":  # transformers' default
        options["cache_implementation"] = cache

    def run() -> Rows:
        return twin.generate(ids, **options)[:, config.prompt_tokens :].tolist()

    return run


def huggingface_twin(model, dtype):
    """transformers' model of the same shape and weights as ``model``, on its device; no token ends its answers."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from etude.llama import config_to_hf
    from etude.weights import to_disk_name

    logging.set_verbosity_error()  # its advice is about transformers, not about this model
    values = config_to_hf(model.config) | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    twin = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    weights = {to_disk_name(name): tensor for name, tensor in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # the head is missing where it is the embedding
        raise VerificationError(f"transformers names the weights otherwise: {[*unexpected, *missing][0]}")
    return twin.to(device=model.head_weight.device, dtype=dtype).eval()


# --- what they generate ----------------------------------------------------------------------------------------------


def gaps(oracle, prompts: Rows, rows: Rows):
    """The gap of each generated token, (rows, new tokens); 0 where it is the likeliest."""
    import torch

    found = []
    with torch.inference_mode():
        for prompt, new in zip(prompts, rows, strict=True):  # row by row: all logits at once may be many GB
            ids = torch.tensor([prompt + new[:-1]], device=oracle.device)
            logits = oracle(ids, use_cache=False).logits[0, len(prompt) - 1 :].float()  # (new tokens, V)
            chosen = logits.gather(1, torch.tensor(new, device=logits.device)[:, None])[:, 0]
            found.append((logits.amax(1) - chosen) / logits.std(1))
    return torch.stack(found)


def require_same_tokens(config: DecodeBenchmark, model, oracle) -> str:
    """In fp32 Etude is to choose what Hugging Face's ``generate`` chooses, ties aside."""
    prompts = random_prompts(config, model, min(4, max(config.batch_sizes)))
    ours = etude_program(config, copy.deepcopy(model).float(), prompts)()
    theirs = huggingface_program(config, oracle, prompts, "dynamic")()
    worst = {name: gaps(oracle, prompts, rows).max().item() for name, rows in (("etude", ours), ("huggingface", theirs))}
    for name, gap in worst.items():
        if not gap <= MAX_GAP:  # so put, NaN is refused as well
            raise VerificationError(
                f"{name} generates a token that is not the likeliest: {gap:.2g} standard deviations of the logits below it"
            )
    same = sum(a == b for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True))
    distinct = len({token for row in ours for token in row})
    return f"{same:,} of {len(ours) * config.new_tokens:,} the same, {distinct:,} distinct"


def require_likely(name: str, oracle, prompts: Rows, rows: Rows) -> float:
    """The mean gap of tokens that were generated in the precision that is measured: a fast wrong program is worth nothing."""
    gap = gaps(oracle, prompts, rows).mean().item()
    if not gap <= MAX_MEAN_GAP:
        raise VerificationError(
            f"{name} generates unlikely tokens: on average {gap:.2g} standard deviations of the logits below the likeliest"
        )
    return gap


# --- what they cost --------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    rates: list[float]  # tokens per second, over all rows
    gap: float  # mean
    peak: int | None  # bytes taken on CUDA beyond the weights


def compare_batch(config: DecodeBenchmark, model, oracle, prompts: Rows) -> dict[str, Measured | str]:
    """Each program's figures, or why it does not work here."""
    import torch

    torch.compiler.reset()  # else what was compiled for one batch size would be widened for the next
    device, twin = model.head_weight.device, huggingface_twin(model, model.head_weight.dtype)
    programs = {"etude": etude_program(config, model, prompts)}
    for cache in ("dynamic", "static") if device.type == "cuda" else ("dynamic",):
        programs[f"huggingface {cache}"] = huggingface_program(config, twin, prompts, cache)

    found: dict[str, Measured | str] = {}
    for name, program in programs.items():  # the first call: it compiles, and takes all memory it will ever take
        try:
            rows, peak = with_memory(program, device)
        except Exception as error:  # whatever a library has against this machine: it is no peer here
            if name == "etude":
                raise
            found[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            continue
        found[name] = Measured([], require_likely(name, oracle, prompts, rows), peak)

    def rate(program: Callable[[], Rows]) -> float:
        wait(device)
        started = time.perf_counter()
        program()  # ends with the tokens on the CPU
        return len(prompts) * config.new_tokens / (time.perf_counter() - started)

    working = {name: lambda name=name: rate(programs[name]) for name in programs if isinstance(found[name], Measured)}
    for name, rates in in_turns(working, config.rounds).items():
        found[name].rates = rates
    return found


def summary(found: dict[str, Measured | str], bound: float, model) -> dict[str, object]:
    """The figures of one batch size by name."""
    works = {name: it for name, it in found.items() if isinstance(it, Measured)}
    medians = {name: statistics.median(it.rates) for name, it in works.items()}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {
        **{f"{name} tokens/s": round(rate, 1) for name, rate in medians.items()},
        **{f"{name} fails": reason for name, reason in found.items() if isinstance(reason, str)},
        **{f"etude / {name}": round(medians["etude"] / rate, 3) for name, rate in medians.items() if name != "etude"},
        "bound tokens/s": round(bound, 1),
        "etude / bound": round(medians["etude"] / bound, 4),
        **{f"{name} mean gap": round(it.gap, 5) for name, it in works.items()},
        **{f"{name} peak MiB": round((weights + it.peak) / 2**20, 1) for name, it in works.items() if it.peak is not None},
        **{f"all {name}": [round(rate, 1) for rate in it.rates] for name, it in works.items()},
    }


def bandwidth_bound(config: DecodeBenchmark, model, batch_size: int, bandwidth: float) -> float:
    """Tokens per second if a step did nothing but read, once, the weights of its products and the filled part of the cache."""
    shape, item = model.config, model.head_weight.itemsize
    weights = shape.num_parameters()["matmul"] * item
    cached = config.prompt_tokens + config.new_tokens / 2  # tokens of a row, on average
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * item * cached * batch_size
    return batch_size * bandwidth / (weights + cache)


def copy_bandwidth(device) -> float:
    """Bytes per second that a large copy reads and writes."""
    import torch

    size = 2**30 if device.type == "cuda" else 2**28  # far more than caches hold
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, rates, copies = torch.empty_like(source), [], 4
    for _ in range(3):
        wait(device)
        started = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        wait(device)
        rates.append(copies * 2 * size / (time.perf_counter() - started))
    return statistics.median(rates)
