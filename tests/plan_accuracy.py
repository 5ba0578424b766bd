"""How near a plan comes to the run it foretells: each case is planned in one fresh process, and then really run in another.

    python tests/plan_accuracy.py                          the cases for a CPU
    python tests/plan_accuracy.py --device cuda --gpus 8   those for a GPU, eight at a time, each on a GPU of its own
    python tests/plan_accuracy.py --only muon sft          those whose name has one of these words
    python tests/plan_accuracy.py --busy                   for a machine that is not alone (one thread): CPU time instead of the clock's
    python tests/plan_accuracy.py --list

Memory is the peak of the whole run with its validations and saves: of a GPU what torch has allocated, of a CPU the process's
resident memory. A step's time is the median over the run, its first steps left out. A case that does not fit is run with the
largest micro-batch that the plan names instead. Exit code 0: memory is within 10 % and time within 20 % everywhere, and all ran.

Not collected by pytest.
"""

import argparse
import dataclasses
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMORY_WITHIN, TIME_WITHIN = 0.10, 0.20
SECONDS = 900  # for one process
STEPS = {"cpu": 16, "cuda": 60}
WARM_UP = {"cpu": 2, "cuda": 20}  # steps that are left out
LOG_EVERY = {"cpu": 1, "cuda": 10}  # reading a GPU's numbers waits for it


@dataclass(frozen=True)
class Case:
    """A run. ``options`` are train_pretrain.py's, but for the vocabulary, which is that of random ids."""

    name: str
    vocab_size: int
    options: dict[str, object] = field(default_factory=dict)
    sft: bool = False  # packed conversations, of which a third is learnt, instead of text


def case(name: str, vocab_size: int, block: int, batch: int, micro: int, sft: bool = False, **options: object) -> Case:
    sizes = {"block_size": block, "batch_size": batch, "micro_batch_size": micro}
    plain = {"preset": "nano", "compile": "off", "optimizer": "adamw", "tie_word_embeddings": True}
    return Case(name, vocab_size, {**plain, **sizes, **options}, sft)


S = {"preset": "small"}  # 6 layers, 768 wide
M = {"preset": "base"}  # 12 layers, 768 wide
CASES = {
    "cpu": [
        case("nano", 16_384, 256, 8, 8),
        case("nano accumulating", 16_384, 256, 16, 4),
        case("nano uneven", 16_384, 128, 24, 10),
        case("nano one row", 16_384, 512, 4, 1),
        case("nano small vocabulary", 2_048, 128, 32, 32),
        case("nano fp32", 16_384, 256, 8, 8, precision="fp32"),
        case("nano muon", 16_384, 512, 8, 2, optimizer="muon"),
        case("nano dropout short", 8_192, 64, 64, 16, dropout=0.1),
        case("nano long GQA QK-norm", 16_384, 1024, 4, 2, num_key_value_heads=2, qk_norm=True),
        case("nano sft", 16_384, 256, 8, 8, sft=True),
        case("deep", 8_192, 256, 8, 4, hidden_size=128, num_hidden_layers=12),
        case("wide", 16_384, 128, 8, 8, hidden_size=768, num_hidden_layers=2, num_attention_heads=12),
        case("small", 16_384, 128, 4, 4, **S),
        case("small muon", 16_384, 128, 4, 1, optimizer="muon", **S),
        case("small untied", 8_192, 256, 4, 2, tie_word_embeddings=False, **S),
        case("nano compiled", 16_384, 256, 8, 8, compile="on"),
    ],
    "cuda": [
        case("S", 16_384, 512, 64, 64, **S),
        case("S compiled", 16_384, 512, 64, 64, compile="on", **S),
        case("S compiled accumulating", 16_384, 512, 256, 64, compile="on", **S),
        case("S compiled muon", 16_384, 512, 64, 64, compile="on", optimizer="muon", **S),
        case("S compiled sft", 16_384, 512, 64, 64, sft=True, compile="on", **S),
        case("S accumulating", 16_384, 512, 64, 16, **S),
        case("S uneven", 16_384, 512, 72, 32, **S),
        case("S muon", 16_384, 512, 64, 32, optimizer="muon", **S),
        case("S sft", 16_384, 512, 64, 64, sft=True, **S),
        case("S sft small", 16_384, 512, 8, 8, sft=True, **S),
        case("S dropout", 16_384, 512, 64, 64, dropout=0.1, **S),
        case("S fp32", 16_384, 512, 16, 16, precision="fp32", **S),
        case("S fp16", 16_384, 512, 64, 64, precision="fp16", **S),
        case("S short", 16_384, 128, 256, 256, **S),
        case("S long", 16_384, 4_096, 8, 4, **S),
        case("S large vocabulary", 65_536, 512, 32, 32, **S),
        case("S untied QK-norm", 16_384, 512, 64, 64, tie_word_embeddings=False, qk_norm=True, **S),
        case("S GQA", 16_384, 512, 64, 64, num_key_value_heads=2, **S),
        case("M", 32_768, 1_024, 64, 64, **M),
        case("M compiled", 32_768, 1_024, 64, 64, compile="on", **M),
        case("M accumulating", 32_768, 1_024, 64, 8, **M),
        case("M muon", 32_768, 1_024, 32, 32, optimizer="muon", **M),
        case("medium", 32_768, 1_024, 16, 16, preset="medium"),
        case("medium one row", 32_768, 1_024, 4, 1, preset="medium"),
        case("medium too large", 32_768, 2_048, 1_024, 1_024, preset="medium"),
        case("nano", 16_384, 512, 64, 64),
        case("nano small", 16_384, 512, 16, 16),
    ],
}


# ---- one process ----------------------------------------------------------------------------------------------------------


def make_trainer(of: Case, device: str, steps: int, folder: str):
    """The trainer as a script makes it, on random ids."""
    import numpy as np
    import torch

    from etude.data.batches import Batches
    from etude.data.pretrain import PretrainBlocks
    from etude.data.sft import SFTRows
    from etude.data.tokens import StoreWriter, TokenStore
    from etude.losses import causal_lm_loss
    from etude.model.config import EtudeConfig
    from etude.model.transformer import Etude
    from etude.tokenizer import Tokenizer, train_tokenizer
    from etude.training.config import PretrainConfig
    from etude.training.trainer import Trainer

    source = np.random.default_rng(0)
    config = PretrainConfig(
        output=f"{folder}/run", device=device, max_steps=steps, log_every=LOG_EVERY[device], eval_every=steps // 2,
        save_every=steps // 2, sample_every=0, **of.options,
    )  # fmt: skip
    stores = []
    for name, tokens in (("train", 2_000_000), ("val", 200_000)):
        writer = StoreWriter(Path(folder) / name, of.vocab_size, masked=of.sft)
        lengths = source.integers(20, 2 * config.block_size if not of.sft else config.block_size // 2, tokens)
        for length in lengths[: int(np.searchsorted(lengths.cumsum(), tokens))]:
            ids = source.integers(8, of.vocab_size, length)
            writer.add(ids, 4 * int(length), np.arange(length) > length * 2 // 3 if of.sft else None)
        writer.close()
        store = TokenStore(Path(folder) / name)
        stores.append(SFTRows(store, config.block_size, 0) if of.sft else PretrainBlocks(store, config.block_size, 0))
    train_tokenizer(["The quick brown fox jumps over the lazy dog."] * 3, f"{folder}/tokenizer", vocab_size=280)
    shape = config.model_shape(on_accelerator=device != "cpu") | {"vocab_size": of.vocab_size, "dropout": config.dropout or 0.0}
    torch.manual_seed(0)
    batches = Batches(stores[0], config.batch_size, config.seed)
    return Trainer(
        config, Etude(EtudeConfig(**shape)), Tokenizer(f"{folder}/tokenizer"), batches, causal_lm_loss, val=stores[1]
    )


def planned(of: Case, device: str) -> dict[str, float]:
    """What the plan says of a run."""
    from etude.training.plan import make_plan

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(of, device, STEPS[device], folder)
        started = time.perf_counter()
        plan = make_plan(trainer)
        names = ("fits", "taken", "largest", "peak", "step_seconds", "limit")
        return {name: getattr(plan, name) for name in names} | {"took": time.perf_counter() - started}


def run(of: Case, device: str) -> dict[str, float]:
    """What a run takes."""
    import torch

    from etude.memory import resident_peak
    from etude.runlog import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(of, device, STEPS[device], folder)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.run()
        records = [record for record in read_metrics(f"{folder}/run/metrics.jsonl") if "tokens_per_second" in record]
        rates = [record["tokens_per_second"] for record in records if record["step"] > WARM_UP[device]]
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak()
        return {"peak": peak, "step_seconds": trainer.tokens_per_step / statistics.median(rates)}


# ---- all of them ----------------------------------------------------------------------------------------------------------


def ask(what: str, of: Case, device: str, gpu: int = 0, busy: bool = False) -> dict[str, float]:
    """The answer of a fresh process. Raises :class:`RuntimeError` with its last words if it has none."""
    command = [sys.executable, __file__, "--device", device, "--child", what, json.dumps(dataclasses.asdict(of))]
    environment = dict(os.environ)
    if busy:
        command.append("--busy")
        environment["OMP_NUM_THREADS"] = "1"
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    return json.loads(lines[-1])


def compare(of: Case, device: str, gpu: int, busy: bool) -> tuple[str, float, float]:
    """A line of the table, and the two errors, as shares of what was measured."""
    plan = ask("plan", of, device, gpu, busy)
    if not plan["taken"]:
        raise RuntimeError("nothing fits")
    ran = dataclasses.replace(of, options={**of.options, "micro_batch_size": plan["taken"]})
    found = ask("run", ran, device, gpu, busy)
    memory, seconds = (plan[name] / found[name] - 1 for name in ("peak", "step_seconds"))
    largest = f"{plan['largest']:>8,}" if plan["fits"] else f"{plan['largest']:>7,}!"
    line = (
        f"{of.name:<26} {plan['peak'] / 2**20:>9,.0f} {found['peak'] / 2**20:>9,.0f} {memory:>+7.1%}  "
        f"{plan['step_seconds'] * 1000:>9,.1f} {found['step_seconds'] * 1000:>9,.1f} {seconds:>+7.1%}  {largest} {plan['took']:>7.1f}"
    )
    return line, abs(memory), abs(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(CASES), default="cpu")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name has one of these words")
    parser.add_argument("--gpus", type=int, default=1, help="cases at a time, each on a GPU of its own")
    parser.add_argument("--busy", action="store_true", help="measure the process's own CPU time, on one thread")
    parser.add_argument("--list", action="store_true", help="print the cases, and stop")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, text = arguments.child
        if arguments.busy:
            time.perf_counter = time.process_time  # everybody's
        answer = {"plan": planned, "run": run}[what](Case(**json.loads(text)), arguments.device)
        print(f"\n{json.dumps(answer)}")
        return 0
    words = arguments.only
    cases = [of for of in CASES[arguments.device] if not words or any(word in of.name for word in words)]
    if arguments.list:
        for of in cases:
            print(f"{of.name:<26} vocabulary {of.vocab_size:,}, {', '.join(f'{k} {v}' for k, v in of.options.items())}")
        return 0

    print(f"{'':<26} {'memory at the peak, MiB':^27}  {'seconds of a step × 1000':^27}  {'largest':>8} {'plan':>7}")
    print(
        f"{'case':<26} {'planned':>9} {'measured':>9} {'error':>7}  {'planned':>9} {'measured':>9} {'error':>7}  {'rows':>8} {'s':>7}"
    )
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for of in cases:
        waiting.put(of)
    errors: list[tuple[float, float]] = []

    def work(gpu: int) -> None:
        while not waiting.empty():
            try:
                of = waiting.get_nowait()
            except queue.Empty:  # another one had it
                return
            try:
                line, *both = compare(of, arguments.device, gpu, arguments.busy)
                errors.append((both[0], both[1]))
            except (RuntimeError, subprocess.TimeoutExpired, ValueError) as error:
                line = f"{of.name:<26} FAILED: {error}"
            print(line, flush=True)

    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in range(arguments.gpus if arguments.device == "cuda" else 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    good = 0
    for name, values in (("memory", [memory for memory, _ in errors]), ("time", [seconds for _, seconds in errors])):
        within = {limit: sum(value <= limit for value in values) for limit in (0.05, 0.10, 0.20)}
        counts = ", ".join(f"{count} within {limit:.0%}" for limit, count in within.items())
        print(f"{name:<10} {counts}, of {len(cases)}; the worst {max(values, default=0):.1%}")
        good += within[MEMORY_WITHIN if name == "memory" else TIME_WITHIN] == len(cases)
    return 0 if good == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
