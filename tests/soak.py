"""A soak: tokenizer, pretraining and SFT, each killed again and again at random moments, must end as if they never had been.

    python tests/soak.py --kills 100

First the three stages run undisturbed, then the same commands in another workspace, where each is started, killed at a random
moment of its life and started again, until so many signals have met a living process; then it runs to its end. Every file that
counts is compared with the undisturbed run's, bit for bit, and each step's numbers must stand in metrics.jsonl once.

Most starts are forks of this process, which has imported torch: the scripts run as they are, only the seconds of importing are
spared. A share of them (--fresh) starts as a person does, and is killed while it imports, too. Half of the kills come by the clock,
at any moment of a start: how late they may come follows from what the last ones left, later after one that was killed before it
had saved anything, earlier after one that had. The other half waits until a start is past its preparations.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = {signal.SIGKILL: 12, signal.SIGTERM: 4, signal.SIGINT: 3, signal.SIGHUP: 1}  # how often each, of twenty
STEPS_PER_KILL = 15  # so that a stage is not long done before its last kill
SECONDS_TO_LEAVE = 10.0  # after a signal that lets a run save
SECONDS_TO_FINISH = 900.0
SECONDS_PREPARED = 1.0  # in which the half of the kills comes that waits until a start is past its preparations
EARLIER, LATER = (
    0.85,
    1.15,
)  # what the latest moment of a kill is multiplied with after a start that saved something, or nothing
HEAVY = (
    "jsonargparse", "yaml", "matplotlib.pyplot", "transformers.models.auto.tokenization_auto", "etude.data.pretrain",
    "etude.data.sft", "etude.training.start", "etude.training.tokenizer", "etude.training.trainer",
)  # fmt: skip
TIMES = ("seconds", "tokens_per_second")  # in metrics.jsonl and state.json: no two runs take the same


class Failed(Exception):
    """Something that must not happen did."""


@dataclass(frozen=True)
class Stage:
    name: str
    script: str
    options: tuple[object, ...]
    run: str = ""  # the folder of its checkpoints, in the workspace
    steps: int = 0

    def newest(self, home: Path) -> int:
        """The step of the newest checkpoint, 0 without one."""
        folders = (home / self.run / "checkpoints").glob("step-*") if self.run else ()
        return max((int(folder.name[5:]) for folder in folders), default=0)

    def recorded(self, home: Path) -> list[dict]:
        """What metrics.jsonl holds; a kill may have cut its last line short."""
        records, path = [], home / self.run / "metrics.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if self.run and path.is_file() else ():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def last_step(self, home: Path) -> int:
        return max((record["step"] for record in self.recorded(home)), default=0)


def stages(data: Path, kills: dict[str, int]) -> list[Stage]:
    """The three of a pipeline, tiny: dropout, two micro-batches a step, and now and then all that a run does besides."""
    text, chats = data / "text.jsonl", data / "chats.jsonl"
    training = (
        "--batch_size", 4, "--micro_batch_size", 2, "--dropout", 0.1, "--threads", 1, "--device", "cpu", "--precision", "fp32",
        "--log_every", 1, "--save_every", 7, "--eval_every", 19, "--max_eval_tokens", 2048, "--sample_every", 31,
        "--learning_rate", 3e-3,
    )  # fmt: skip
    shape = ("--hidden_size", 32, "--num_hidden_layers", 2, "--num_attention_heads", 2, "--max_position_embeddings", 256)
    steps = {name: max(40, STEPS_PER_KILL * count) for name, count in kills.items()}
    pretrain = ("--data", text, *shape, "--block_size", 64, *training, "--max_steps", steps["pretrain"])
    sft = ("--data", chats, "--block_size", 128, *training, "--max_steps", steps["sft"])
    return [
        Stage("tokenizer", "train/train_tokenizer.py", ("all", "--data", text, chats, "--vocab_size", 1000)),
        Stage("pretrain", "train/train_pretrain.py", pretrain, "weight/etude_pretrained_model", steps["pretrain"]),
        Stage("sft", "train/train_sft.py", sft, "weight/etude_sft_model", steps["sft"]),
    ]


def write_data(folder: Path) -> None:
    """A part of the built-in sample: enough that learning a vocabulary and tokenising take a moment."""
    from etude.corpus.jsonl import write_records
    from etude.corpus.sample.world import conversations, pretraining_documents

    write_records(folder / "text.jsonl", pretraining_documents(count=6000))
    write_records(folder / "chats.jsonl", conversations(count=3000))


def shares(kills: int) -> dict[str, int]:
    """How many kills each stage gets."""
    tokenizer = max(1, round(kills * 0.15))
    sft = max(1, round(kills * 0.35))
    return {"tokenizer": tokenizer, "pretrain": max(1, kills - tokenizer - sft), "sft": sft}


# ---- processes ------------------------------------------------------------------------------------------------------------


def import_heavily() -> None:
    """What the stages import, so that forks of this process need not."""
    for name in HEAVY:
        importlib.import_module(name)


class Process:
    """A stage's script at work, in a session of its own. Its output goes to a file."""

    def __init__(self, stage: Stage, home: Path, fresh: bool):
        self.stage, self.home, self.fresh = stage, home, fresh
        self.output = home / "output.txt"
        self.started_at = time.monotonic()
        self.output.unlink(missing_ok=True)  # the one before's must not be read for this one's
        words = [str(ROOT / stage.script), *map(str, stage.options)]
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._become(words)
            except KeyboardInterrupt:  # before the script has begun
                os._exit(130)
            finally:
                os._exit(99)
        self.code: int | None = None

    def _become(self, words: list[str]) -> None:
        os.setsid()
        # What runs in the background of a shell, or under nohup, ignores these, and so would all that it starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.environ |= {"ETUDE_HOME": str(self.home), "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        os.chdir(self.home)
        file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        if self.fresh:
            os.execv(sys.executable, [sys.executable, *words])
        sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
        sys.argv = words
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            os._exit(end.code or 0)

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        end = time.monotonic() + seconds
        while self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= end:
                return False
            else:
                time.sleep(0.002)
        return True

    def prepared(self) -> bool:
        """Wait until it has printed what it is about to do. False if it ends before that."""
        while not self.wait(0.005):
            if ("\nrun  " if self.stage.run else "\noutput ") in self.told():
                return True
            if time.monotonic() - self.started_at > SECONDS_TO_FINISH:
                raise Failed(f"{self.stage.name}: not prepared after {SECONDS_TO_FINISH:.0f} s\n{self.told()}")
        return False

    def end(self) -> None:
        """Whatever happened: nothing of it goes on."""
        if self.code is None:
            self.send(signal.SIGKILL, True)
            self.wait(SECONDS_TO_LEAVE)

    def send(self, number: int, to_group: bool) -> None:
        # The child is not waited for yet, so its id cannot be anybody else's.
        try:
            (os.killpg if to_group else os.kill)(self.pid, number)
        except ProcessLookupError:  # it has not got as far as making its group
            os.kill(self.pid, number)

    def told(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def require_nobody_left(self) -> None:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.01)
        raise Failed(f"{self.stage.name}: a process of its group outlived it")


def finished(stage: Stage, home: Path, fresh: bool = True) -> float:
    """Run a stage to its end. Returns the seconds it took."""
    process = Process(stage, home, fresh)
    try:
        if not process.wait(SECONDS_TO_FINISH):
            raise Failed(f"{stage.name}: not done after {SECONDS_TO_FINISH:.0f} s\n{process.told()}")
        if process.code or not clean(process.told()):
            raise Failed(f"{stage.name}: exit code {process.code}\n{process.told()}")
        process.require_nobody_left()
    finally:
        process.end()
    return time.monotonic() - process.started_at


def clean(output: str) -> bool:
    return "Traceback" not in output and "\nwarning:" not in f"\n{output}" and "Error" not in output


# ---- killing --------------------------------------------------------------------------------------------------------------


class Killer:
    """Kills a stage at random moments, and judges each end."""

    def __init__(self, home: Path, seed: int, fresh: float):
        self.home, self.fresh, self.source = home, fresh, random.Random(seed)
        self.kills: dict[str, Counter] = defaultdict(Counter)  # stage → signal → how many
        self.phases: dict[str, Counter] = defaultdict(Counter)  # stage → what it was doing
        self.starts: Counter = Counter()
        self.repeated: Counter = Counter()  # steps taken once more
        self.seconds: Counter = Counter()
        self.slowest = 0.0  # seconds from a signal to a run's end
        self.latest: dict[tuple[bool, bool], float] = {}  # (fresh, already at its last step) → seconds after the start

    def soak(self, stage: Stage, kills: int, life: float, total: int, whole: Path) -> None:
        """Start and kill ``stage``, whose life is ``life`` seconds, until ``kills`` signals have met it alive, and finish it.

        A run that comes to its end before that is compared, and mostly begun anew.
        """
        began = time.monotonic()
        # Of the stage without checkpoints a start makes progress by coming to its end only.
        self.latest = {
            (fresh, done): life * 1.1 if not stage.run else 5.0 if fresh else 1.5
            for fresh in (True, False)
            for done in (True, False)
        }
        while self.kills[stage.name].total() < kills:
            ended = self._once(stage, total)
            if ended and stage.run and self.source.random() < 0.7:
                compare(stage, whole, self.home)
                shutil.rmtree(self.home / stage.run)
                print(f"again        {stage.name:<9}  came to its end, the same; begun anew", flush=True)
        self.starts[stage.name] += 1
        finished(stage, self.home, fresh=self.source.random() < self.fresh)
        self.seconds[stage.name] += time.monotonic() - began

    def _once(self, stage: Stage, total: int) -> bool:
        """One start and, if it lives so long, one signal. Whether it came to its end."""
        fresh, to_group, by_the_clock = (self.source.random() < share for share in (self.fresh, 0.5, 0.5))
        number = self.source.choices(list(SIGNALS), list(SIGNALS.values()))[0]
        before, recorded = stage.newest(self.home), stage.last_step(self.home)
        kind = fresh, bool(stage.run) and before == stage.steps
        latest = self.latest[kind]
        seconds = self.source.triangular(0, latest, latest) if by_the_clock else self.source.uniform(0, SECONDS_PREPARED)
        process = Process(stage, self.home, fresh)
        self.starts[stage.name] += 1
        try:
            alive = (by_the_clock or process.prepared()) and not process.wait(seconds)
            sent_at = time.monotonic()
            if alive:
                process.send(number, to_group)
            answered = process.wait(SECONDS_TO_LEAVE)
        finally:
            process.end()
        how = f"{number.name} to its {'group' if to_group else 'process'}" if alive else "no signal"
        how += f" after {sent_at - process.started_at:.2f} s of a {'fresh' if fresh else 'forked'} start"
        if not answered:
            raise Failed(f"{stage.name}: {how}: still there {SECONDS_TO_LEAVE:.0f} s later\n{process.told()}")
        after = stage.newest(self.home)
        self._judge(stage, process, number if alive else None, before, after, how)
        process.require_nobody_left()

        self.slowest = max(self.slowest, time.monotonic() - sent_at)
        if by_the_clock:
            self.latest[kind] *= EARLIER if process.code == 0 or after > before else LATER
        if "\nrun  " in process.told():
            self.repeated[stage.name] += max(0, min(recorded, stage.last_step(self.home)) - before)
        if process.code != 0:
            phase = self._phase(stage, process)
            self.kills[stage.name][number.name] += 1
            self.phases[stage.name][phase] += 1
            count = sum(counter.total() for counter in self.kills.values())
            at = f", checkpoint {after} of {stage.steps}" if stage.steps else ""
            print(f"kill {count:>4}/{total}  {stage.name:<9}  {how}, {phase}{at}: exit code {process.code}", flush=True)
        return process.code == 0

    def _judge(self, stage: Stage, process: Process, number: int | None, before: int, after: int, how: str) -> None:
        told = process.told()

        def fail(why: str) -> Failed:
            return Failed(f"{stage.name}: {how}: exit code {process.code}: {why}\n{told}")

        noted = "finishing this step" in told
        allowed = {0}
        if number == signal.SIGKILL:
            allowed |= {-signal.SIGKILL}
        elif number:
            # Before there is anything to save, SIGTERM and SIGHUP end a process by themselves, and Ctrl-C gives 130.
            allowed |= {75} if noted else {130} if number == signal.SIGINT else {-number}
        if process.code not in allowed and not (number == signal.SIGINT and process.fresh and outside_the_script(process)):
            raise fail(f"not among {sorted(allowed)}")
        if not clean(told) and not outside_the_script(process):
            raise fail("a traceback or a warning")
        if after < before:
            raise fail(f"the newest checkpoint was of step {before}, and now is of {after}")
        if process.code == 75:
            saved = re.search(r"error: stopped after step (\d+) of \d+, and saved", told)
            if not saved or int(saved[1]) != after:
                raise fail(f"told to have saved, but the newest checkpoint is of step {after}")

    def _phase(self, stage: Stage, process: Process) -> str:
        """What it was doing when the signal came, as far as that can be told from outside."""
        told = process.told()
        if not stage.run:
            return "verifying" if "\ntokenizer " in told else "learning" if "\noutput " in told else "starting"
        if "\nrun  " not in told:
            return "preparing" if "data  " in told else "starting"
        if list((self.home / stage.run / "checkpoints").glob("*.tmp")):
            return "saving"
        return "ending" if stage.last_step(self.home) >= stage.steps else "in steps"


def outside_the_script(process: Process) -> bool:
    """Ctrl-C before Python has come to the script's main function, or while it leaves: its own KeyboardInterrupt."""
    told = process.told()
    return process.code == -signal.SIGINT and "KeyboardInterrupt" in told and " in main" not in told


# ---- comparing ------------------------------------------------------------------------------------------------------------


def compare(stage: Stage, whole: Path, killed: Path) -> None:
    """Raises :class:`Failed` unless a stage left the same in both workspaces."""
    if not stage.run:
        same_files(whole / "weight/tokenizer", killed / "weight/tokenizer")
        return
    old, new = whole / stage.run, killed / stage.run
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "best/model.safetensors"):
        same_file(old / name, new / name)
    same_checkpoints(old, new)
    records = [
        [{k: v for k, v in record.items() if k not in TIMES} for record in stage.recorded(home)] for home in (whole, killed)
    ]
    if records[0] != records[1]:
        raise Failed(f"{new / 'metrics.jsonl'}: other records than {old / 'metrics.jsonl'}")
    steps = [record["step"] for record in records[1] if "loss" in record]
    if steps != list(range(1, stage.steps + 1)):
        raise Failed(f"{new / 'metrics.jsonl'}: not every step's loss stands there once")


def same_files(old: Path, new: Path) -> None:
    found = [
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
        for folder in (old, new)
    ]
    if found[0] != found[1] or not found[0]:
        raise Failed(f"{new}: other files than in {old}: {sorted(set(found[0]) ^ set(found[1]))}")
    for path in found[0]:
        same_file(old / path, new / path)


def same_file(old: Path, new: Path) -> None:
    if old.read_bytes() != new.read_bytes():
        raise Failed(f"{new}: differs from {old}")


def same_checkpoints(old: Path, new: Path) -> None:
    from etude.training import checkpoint

    names = [[path.name for path in checkpoint.found_in(run)] for run in (old, new)]
    if names[0][0] != names[1][0]:
        raise Failed(f"{new}: its last checkpoint is {names[1][0]}, not {names[0][0]}")
    first, second = (checkpoint.load(run / "checkpoints" / names[0][0]) for run in (old, new))  # verified by their manifests
    for kind in ("model", "optimizer", "rng"):
        tensors, others = getattr(first, kind), getattr(second, kind)
        if tensors.keys() != others.keys():
            raise Failed(f"{second.path}: {kind} holds other tensors than {first.path}")
        for name, tensor in tensors.items():
            if tensor.dtype != others[name].dtype or tensor.numpy().tobytes() != others[name].numpy().tobytes():
                raise Failed(f"{second.path}: {name} differs from {first.path}")
    states = [{k: v for k, v in found.state.items() if k not in TIMES} for found in (first, second)]
    if states[0] != states[1]:
        raise Failed(f"{second.path}/state.json: differs from {first.path}")


def require_no_strays(home: Path) -> None:
    strays = [path for path in home.rglob("*") if re.search(r"\.tmp\b|^\.(?!locks?$)", path.name)]
    if strays:
        raise Failed(f"left behind: {', '.join(map(str, strays))}")


# ---- all of it ------------------------------------------------------------------------------------------------------------


def soak(kills: int, seed: int, fresh: float, workspace: Path) -> Killer:
    began = time.monotonic()
    write_data(workspace / "data")
    whole, killed = workspace / "whole", workspace / "killed"
    lives = {}
    for home in (whole, killed):
        home.mkdir()
    planned = shares(kills)
    pipeline = stages(workspace / "data", planned)
    for stage in pipeline:
        lives[stage.name] = finished(stage, whole)
        print(f"undisturbed  {stage.name:<9}  {lives[stage.name]:.1f} s", flush=True)
    import_heavily()
    killer = Killer(killed, seed, fresh)
    for stage in pipeline:
        killer.soak(stage, planned[stage.name], lives[stage.name], kills, whole)
        compare(stage, whole, killed)
        print(f"finished     {stage.name:<9}  {killer.seconds[stage.name]:.1f} s; the same, bit for bit", flush=True)
    same_files(whole / "training_data/tokenized", killed / "training_data/tokenized")
    require_no_strays(killed)
    print(table(killer, pipeline, time.monotonic() - began), flush=True)
    return killer


def table(killer: Killer, pipeline: list[Stage], seconds: float) -> str:
    columns = [*(number.name for number in SIGNALS), "kills", "starts", "steps", "repeated", "seconds"]
    lines = [f"{'stage':<10}" + "".join(f"{name:>10}" for name in columns) + "  killed while"]
    for stage in pipeline:
        counted = killer.kills[stage.name]
        values = [*(counted[number.name] for number in SIGNALS), counted.total(), killer.starts[stage.name], stage.steps or "-"]
        values += [killer.repeated[stage.name] if stage.run else "-", round(killer.seconds[stage.name])]
        phases = ", ".join(f"{phase} {count}" for phase, count in killer.phases[stage.name].most_common())
        lines.append(f"{stage.name:<10}" + "".join(f"{value:>10}" for value in values) + f"  {phases}")
    kills = sum(counted.total() for counted in killer.kills.values())
    lines.append(
        f"passed: {kills} kills, {seconds:.0f} s; the longest from a signal to the end {killer.slowest:.1f} s; "
        "no traceback, no stray file, no process left; every file as if nothing had been"
    )
    return "\n" + "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="signals that must meet a living process (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals (default: 0)")
    parser.add_argument("--fresh", type=float, default=0.2, help="share of starts that import torch themselves (default: 0.2)")
    parser.add_argument("--workspace", type=Path, help="an empty folder to work in, kept (default: one that goes at the end)")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    workspace = (options.workspace or Path(tempfile.mkdtemp(prefix="etude-soak-"))).resolve()
    print(f"seed {options.seed}, workspace {workspace}", flush=True)
    try:
        soak(options.kills, options.seed, options.fresh, workspace)
    except Failed as error:
        print(f"FAILED (seed {options.seed}, workspace {workspace}): {error}", file=sys.stderr)
        return 1
    if not options.workspace:
        shutil.rmtree(workspace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
