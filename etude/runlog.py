"""What a run tells: its header, its progress, metrics.jsonl, loss.png, and a tracker if one is asked for."""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from etude.errors import UsageError


def progress_bar(what: str, total: float, unit: str):
    """A tqdm bar on stderr; where that is no terminal, a line now and then instead of a redrawn one."""
    from tqdm import tqdm

    interactive = sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total or None,
        unit=unit,
        unit_scale=True,
        mininterval=0.2 if interactive else 10,
        ascii=not interactive,
        leave=interactive,
        delay=0 if interactive else 5,
    )


def duration(seconds: float) -> str:
    """A length of time for people: 47s, 3m05s, 2h10m."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


class RunLog:
    """Writes a run's metrics as they come. One JSON object a line: ``{"step": 10, "loss": 3.2, …}``."""

    LINE_EVERY = 10.0  # seconds between progress lines where no terminal redraws them

    def __init__(self, folder: str | Path, tracker: str = "none", config: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self.tracker = _tracker(tracker, self.folder, config or {})
        self._interactive = sys.stdout.isatty()
        self._last_line = -math.inf
        self._open_line = False

    def resume_from(self, step: int, revalidate: bool = False) -> None:
        """Forget metrics of steps after ``step``: the run is about to make them again. With ``revalidate``, also the
        validation of ``step`` itself.
        """
        records = read_metrics(self.path) if self.path.exists() else []
        if bad := damaged_lines(self.path):
            kept_at = self.path.with_name(f"{self.path.name}.damaged")
            shutil.copyfile(self.path, kept_at)
            print(
                f"warning: {self.path}:{bad[0]}: {len(bad)} damaged lines are left out; the file as it was is kept as {kept_at}",
                file=sys.stderr,
                flush=True,
            )
        kept = [r for r in records if r["step"] < step or (r["step"] == step and not (revalidate and "val_loss" in r))]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def metrics(self, step: int, **values: float) -> None:
        """Record numbers of a step, in the file and with the tracker."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tracker:
            self.tracker(step, values)

    def progress(self, text: str, last: bool = False) -> None:
        """Show where the run is: redrawn in place on a terminal, a line now and then elsewhere."""
        now = time.monotonic()
        if self._interactive:
            print(f"\r\x1b[K{text}", end="\n" if last else "", flush=True)
            self._open_line = not last
        elif last or now - self._last_line >= self.LINE_EVERY:
            print(text, flush=True)
            self._last_line = now

    def line(self, text: str) -> None:
        """Print something to keep."""
        print(f"\n{text}" if self._open_line else text, flush=True)
        self._open_line = False

    def draw(self, title: str = "") -> None:
        """Draw loss.png from metrics.jsonl."""
        draw_losses(self.path, self.folder / "loss.png", title)

    def close(self) -> None:
        if self.tracker:
            self.tracker(None, {})


class SilentLog:
    """A run's log in the processes that leave writing to the first."""

    def metrics(self, step: int, **values: float) -> None: ...

    def progress(self, text: str, last: bool = False) -> None: ...

    def line(self, text: str) -> None: ...

    def resume_from(self, step: int, revalidate: bool = False) -> None: ...

    def draw(self, title: str = "") -> None: ...

    def close(self) -> None: ...


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; lines that are damaged, or a last one that a crash cut short, are left out."""
    return [record for record in _metrics_lines(path) if record is not None]


def damaged_lines(path: str | Path) -> list[int]:
    """The numbers of lines (from 1) that are no records, but for a last one that a crash cut short."""
    records = _metrics_lines(path) if Path(path).exists() else []
    return [number for number, record in enumerate(records, 1) if record is None]


def _metrics_lines(path: str | Path) -> list[dict[str, Any] | None]:
    records: list[dict[str, Any] | None] = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        is_one = isinstance(record, dict) and isinstance(record.get("step"), int)
        records.append(record if is_one else None)
    return records[:-1] if records and records[-1] is None else records


def draw_losses(metrics: str | Path, picture: str | Path, title: str = "") -> None:
    """Training loss (each point, and smoothed) and validation loss over steps."""
    import matplotlib

    matplotlib.use("Agg")  # no window, on any machine
    from matplotlib import pyplot

    records = read_metrics(metrics)
    train = [(record["step"], record["loss"]) for record in records if "loss" in record]
    val = [(record["step"], record["val_loss"]) for record in records if "val_loss" in record]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, each record")
        axes.plot(steps, _smoothed(losses), color="#08519c", linewidth=1.6, label="training, smoothed")
    if val:
        axes.plot(*zip(*val, strict=True), color="#d94801", marker="o", markersize=3, linewidth=1.4, label="validation")
    if train or val:
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    temporary = Path(picture).with_suffix(".tmp.png")
    figure.savefig(temporary)
    pyplot.close(figure)
    os.replace(temporary, picture)


def _smoothed(values: tuple[float, ...]) -> list[float]:
    """An exponential moving average over about a fiftieth of the run, corrected for its start."""
    decay = 1 - 1 / max(1.0, len(values) / 50)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(average / weight if weight else value)
    return smoothed


def _tracker(name: str, folder: Path, config: dict[str, Any]):
    """A function (step, values) that passes metrics on, called with step None at the end; None for "none"."""
    if name == "none":
        return None
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))

            def to_tensorboard(step: int | None, values: dict[str, float]) -> None:
                if step is None:
                    writer.close()
                for key, value in values.items():
                    writer.add_scalar(key, value, step)

            return to_tensorboard
        if name in ("wandb", "trackio"):
            import importlib

            library = importlib.import_module(name)
            library.init(project="etude", name=folder.name, config=config)

            def to_service(step: int | None, values: dict[str, float]) -> None:
                if step is None:
                    library.finish()
                else:
                    library.log(values, step=step)

            return to_service
    except ImportError:
        raise UsageError(f"tracker ({name}) needs a package: pip install {name}") from None
    raise UsageError(f"tracker ({name}) must be none, tensorboard, wandb or trackio")
