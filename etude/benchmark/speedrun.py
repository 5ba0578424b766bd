"""How good a model gets in a fixed time: trained from scratch for some seconds of steps, then measured in bits per byte.

Compiling and the first steps are not counted; the learning rate follows the time that has passed. The validation text is read in
windows of ``block_size``, each token predicted from those before it in its window.
"""

import dataclasses
import gc
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etude.benchmark.data import sized, trained, write
from etude.benchmark.report import mfu_of, peaks_of, tell, wait, with_memory
from etude.cli import option
from etude.errors import UsageError

# Beside what pretraining does by default (docs/performance.md).
RECIPE: dict[str, Any] = {"warmup_fraction": 0.01, "block_size": 512, "batch_size": 128, "micro_batch_size": 128}
WARMUP_STEPS, TIMED_STEPS = 5, 15  # before the run: to compile, and to see how long a step takes
GIVEN = {"preset", "device", "output", "max_steps"}  # settings that this benchmark decides or has options for
REVISED_EVERY = 20  # steps after which the rest of the run is estimated anew


@dataclass(frozen=True)
class SpeedrunBenchmark:
    data: tuple[str, ...] = option((), "text to train on: .jsonl or .txt files (default: the sample corpus's)")
    val_data: tuple[str, ...] = option((), "text to measure on (default: a hundredth of data)")
    tokenizer: str = option("", "tokenizer folder (default: one of 16,384 tokens, trained on the text)")
    token_cache: str = option("", "folder that keeps data once tokenised (default: none)")
    seconds: float = option(80.0, "time to train for")
    preset: Literal["nano", "small", "base", "medium"] = option("small", "named shape")
    settings: dict | None = option(None, "settings of train_pretrain.py that differ from the recipe's, as JSON")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    quick: bool = option(False, "a small shape, ten seconds, not compiled: a minute on two CPU cores")
    output: str = option("", "also write the figures to this .json file")

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise UsageError(f"seconds ({self.seconds}) must be greater than 0")


def speedrun(config: SpeedrunBenchmark) -> None:
    """Train, measure, and print the figures."""
    if config.quick:
        small = {"batch_size": 16, "micro_batch_size": 16, "block_size": 256, "compile": "off"}
        config = dataclasses.replace(config, preset="nano", seconds=10.0, settings={**small, **(config.settings or {})})
    with tempfile.TemporaryDirectory(prefix="etude_benchmark_") as folder:
        tell(measure(config, Path(folder)), config.output)


def measure(config: SpeedrunBenchmark, folder: Path) -> dict[str, object]:
    import torch

    from etude.data.batches import Batches
    from etude.data.pretrain import PretrainBlocks, prepare_pretrain
    from etude.device import describe
    from etude.evaluation import evaluate_loss
    from etude.losses import causal_lm_loss
    from etude.tokenizer import Tokenizer
    from etude.training.config import PretrainConfig
    from etude.training.start import pretraining_model
    from etude.training.trainer import Trainer

    allowed = {field.name for field in dataclasses.fields(PretrainConfig)} - GIVEN
    for name in config.settings or {}:
        if name not in allowed:
            raise UsageError(
                f"settings: {name} cannot be set here; train_pretrain.py --help names settings, of which not {', '.join(sorted(GIVEN))}"
            )
    data = list(config.data)
    if not data:
        write(sized((), 4_000_000 if config.quick else 20_000_000), folder / "texts.jsonl")
        data = [str(folder / "texts.jsonl")]
    tokenizer = Tokenizer(config.tokenizer or trained(folder, data, 4_096 if config.quick else 16_384))
    settings = PretrainConfig(
        **{**RECIPE, **(config.settings or {})},
        preset=config.preset,
        device=config.device,
        output=str(folder / "run"),
        max_steps=10**6,
    )
    cache = config.token_cache or folder / "cache"
    train, val = prepare_pretrain(data, tokenizer, cache, config.val_data, 0.0 if config.val_data else 0.01, workers=0)
    blocks = PretrainBlocks(train, settings.block_size, tokenizer.pad_id, settings.separate_documents)
    windows = PretrainBlocks(val, settings.block_size, tokenizer.pad_id)
    if not len(windows):
        raise UsageError(
            "there is no text to measure on: none of data's documents was held out, or val_data is empty; name --val_data"
        )

    def fresh() -> Trainer:
        batches = Batches(blocks, settings.batch_size, settings.seed)
        return Trainer(settings, pretraining_model(settings, tokenizer), tokenizer, batches, causal_lm_loss, val=windows)

    trainer = fresh()
    started = time.perf_counter()
    trainer.model.train()
    for step in range(WARMUP_STEPS + TIMED_STEPS):
        if step == WARMUP_STEPS:
            wait(trainer.device)
            timed = time.perf_counter()
        trainer.optimizer_step(trainer.batches.at(step))
    wait(trainer.device)
    rate = TIMED_STEPS / (time.perf_counter() - timed)
    warmup = time.perf_counter() - started
    _start_over(trainer, fresh())
    gc.collect()  # the other trainer: what goes later would be missing from the peak
    seconds, peak = with_memory(lambda: _train(trainer, config.seconds, rate), trainer.device)
    result = evaluate_loss(
        trainer.model,
        windows,
        trainer.device,
        trainer.precision,
        causal_lm_loss,
        batch_size=trainer.eval_batch_size,
        max_tokens=0,
    )
    tokens = trainer.step * trainer.tokens_per_step
    flops = trainer.model.config.training_flops_per_token(settings.block_size)
    return {
        "machine": describe(trainer.device),
        "torch": torch.__version__,
        "precision": trainer.precision + (", compiled" if trainer.compiled else ""),
        "exports as": "Qwen3" if trainer.model.config.qk_norm else "Llama",
        "settings that differ": config.settings or "none",
        "val bits per byte": round(trainer.bits_per_byte(result), 4),
        "val loss": round(result.loss, 4),
        "seconds of steps": round(seconds, 1),
        "seconds before, not counted": round(warmup, 1),
        "steps": trainer.step,
        "tokens": tokens,
        "epochs": round(trainer.step / trainer.batches.steps_per_epoch, 2),
        "tokens/s": round(tokens / seconds),
        **mfu_of(tokens / seconds * flops, trainer.device, trainer.precision),
        **peaks_of({"etude": peak}, sum(parameter.nbytes for parameter in trainer.model.parameters())),
    }


def _start_over(trainer, other) -> None:
    """Give a trainer whose code has been compiled the weights and the optimizers of a new one."""
    trainer.model.load_state_dict(other.model.state_dict())
    trainer.optimizers = trainer._make_optimizers()
    trainer.step = 0


def _train(trainer, budget: float, rate: float) -> float:
    """Steps until the time is used up, about ``rate`` a second; the schedule ends with the last. Returns the seconds they took."""
    with ThreadPoolExecutor(1) as loader:
        upcoming = [loader.submit(trainer.batches.at, step) for step in range(2)]
        wait(trainer.device)
        started = time.perf_counter()
        first: tuple[float, int] | None = None  # when the rate began to be measured, and at which step
        trainer.steps = max(1, round(budget * rate))
        while trainer.step < trainer.steps:
            if trainer.step and trainer.step % REVISED_EVERY == 0:
                wait(trainer.device)  # else what has been launched would pass for done
                passed = time.perf_counter() - started
                first = first or (passed, trainer.step)
                if trainer.step > first[1]:
                    rate = (trainer.step - first[1]) / (passed - first[0])
                    trainer.steps = trainer.step + max(1, round((budget - passed) * rate))
            upcoming.append(loader.submit(trainer.batches.at, trainer.step + 2))
            trainer.optimizer_step(upcoming.pop(0).result())
            trainer.step += 1
        wait(trainer.device)
        return time.perf_counter() - started
