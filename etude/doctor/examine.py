"""The doctor's round: what is it that was named, and which checks can be made of it with what there is."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from etude import paths
from etude.corpus.inputs import find_files
from etude.doctor.behaviour import Sample, look_at_behaviour, samples_of
from etude.doctor.config import DoctorConfig
from etude.doctor.curve import last_loss, look_at_curve
from etude.doctor.known import Known, look_at_data, origin_of, run_settings
from etude.doctor.learnt import Training, look_at_learnt
from etude.doctor.model import look_at_files
from etude.doctor.report import Report
from etude.doctor.run import look_at_checkpoint, look_at_checkpoints, look_at_fingerprint, look_at_outcome, model_of
from etude.doctor.tokenizer import look_at_tokenizer
from etude.errors import DataError
from etude.model.transformer import Etude
from etude.tokenizer import Tokenizer
from etude.training.checkpoint import NAME
from etude.training.config import SFTConfig
from etude.training.start import weights_fingerprint

# Names that nobody gives to data.
PARTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "state.json", "manifest.json", "run.yaml",
    "metrics.jsonl",
)  # fmt: skip


def examine(config: DoctorConfig, tell: Callable[[str], None] = print) -> Report:
    """Look at all that ``config.input`` names. Raises :class:`DataError` for a path that is nothing the doctor knows."""
    kinds = {name: kind_of(name) for name in dict.fromkeys(config.input)}
    report = Report(tell)
    subjects = {"run": look_at_run, "model": look_at_model, "checkpoint": look_at_one_checkpoint}
    data = [name for name, kind in kinds.items() if kind == "data"]
    config = dataclasses.replace(config, data=(*config.data, *data))
    folders = [name for name, kind in kinds.items() if kind == "tokenizer"]
    tokenizer = None
    for folder in [*folders, *([config.tokenizer] if config.tokenizer else [])]:
        report.heading(f"{paths.typed(folder)}: a tokenizer")
        tokenizer = look_at_tokenizer(folder, report) or tokenizer
    for name, kind in kinds.items():
        if kind in subjects:
            report.heading(f"{paths.typed(name)}: a {kind}")
            subjects[kind](Path(name).expanduser(), config, tokenizer, report)
    if config.data and not set(kinds.values()) & set(subjects):
        report.heading(f"{', '.join(map(paths.typed, config.data))}: data")
        look_at_data(Known(tokenizer, config.block_size), config, report)
    return report


def kind_of(name: str) -> str:
    """run, model, checkpoint, tokenizer or data: by what lies in a folder, never by its name."""
    path = Path(name).expanduser()

    def holds(*patterns: str) -> bool:
        return any(any(path.glob(pattern)) for pattern in patterns)

    if path.is_dir():
        if NAME.fullmatch(path.name) or (holds("state.json", "manifest.json") and holds("*.safetensors")):
            return "checkpoint"
        if holds("checkpoints", "metrics.jsonl", "run.yaml"):
            return "run"
        if holds("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin"):
            return "model"
        if holds("tokenizer.json", "tokenizer_config.json"):
            return "tokenizer"
    if path.is_dir() and path.name == "checkpoints" and any(NAME.fullmatch(folder.name) for folder in path.iterdir()):
        raise DataError(f"{path}: a run's checkpoints; name the folder it lies in, or one of them")
    if path.is_file() and (path.suffix in (".safetensors", ".bin") or path.name in PARTS):
        raise DataError(f"{path}: a part of a run, model, checkpoint or tokenizer; name the folder it lies in")
    try:
        find_files([name])
    except DataError as error:
        raise DataError(f"{error} (the doctor knows runs, models, checkpoints, tokenizers and data)") from None
    return "data"


# --- the kinds -------------------------------------------------------------------------------------------------------


def look_at_run(run: Path, config: DoctorConfig, other: Tokenizer | None, report: Report) -> None:
    settings = None
    if (run / "run.yaml").is_file():
        with report.examining("run.yaml"):
            settings = run_settings(run / "run.yaml")
            report.ok("run.yaml", "an SFT run" if isinstance(settings, SFTConfig) else "a pretraining run")
    else:
        report.not_looked("run.yaml", "there is none, so the run's data and settings are not known")
    newest = None
    with report.examining("checkpoints"):
        newest = look_at_checkpoints(run, report)
    last = None
    if (run / "metrics.jsonl").is_file():
        with report.examining("loss curve"):
            look_at_curve(run / "metrics.jsonl", origin_of(run, settings, newest), report)
            last = last_loss(run / "metrics.jsonl")
    else:
        report.not_looked("loss curve", "there is no metrics.jsonl")
    if newest is not None:
        with report.examining("final model"):
            look_at_outcome(run, newest, report)
    known = Known(None, config.block_size or (settings.block_size if settings else 0), settings, newest, last)
    if (run / "config.json").is_file() or (run / "model.safetensors").is_file():
        look_at_model(run, config, other, report, known)
    elif newest is not None:
        look_at_unfinished(run, config, other, report, known)
    else:
        look_at_data(dataclasses.replace(known, tokenizer=other), config, report)
    if (run / "best").is_dir():
        report.heading(f"{paths.typed(run / 'best')}: the model of the best validation")
        with report.examining("tokenizer"):
            tokenizer = Tokenizer(run / "best")
            look_at_files(run / "best", tokenizer, report)
            if newest is not None:
                look_at_fingerprint(newest, tokenizer, report)
            elif (run / "tokenizer.json").is_file():
                _compare(tokenizer, Tokenizer(run), report)


def look_at_model(
    folder: Path, config: DoctorConfig, other: Tokenizer | None, report: Report, known: Known | None = None
) -> None:
    """A model folder, and all it does. ``other`` is a tokenizer to compare its own with."""
    known = known or Known(block_size=config.block_size)
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = look_at_tokenizer(folder, report)
    elif other is None:
        report.bad("tokenizer", f"{folder}: there is no tokenizer.json beside the model; copy the one it was trained with")
    if tokenizer is not None and other is not None and known.newest is None:
        _compare(other, tokenizer, report)
    model = look_at_files(folder, tokenizer or other, report)
    _look_further(model, [t for t in (tokenizer, other) if t is not None], known, config, report)


def _compare(tokenizer: Tokenizer, own: Tokenizer, report: Report) -> None:
    """A tokenizer against the model's own."""
    if tokenizer.fingerprint != own.fingerprint:
        report.bad(
            "trained tokenizer",
            f"{tokenizer.folder} has another vocabulary or chat template than the one in {own.folder}; a model understands only the "
            "one that it was trained with",
        )
    else:
        report.ok("trained tokenizer", f"{tokenizer.folder} is the model's")


def look_at_unfinished(run: Path, config: DoctorConfig, other: Tokenizer | None, report: Report, known: Known) -> None:
    """A run that has not written its model yet: the newest checkpoint's, with the tokenizer that the run names."""
    model, tokenizers = None, []
    with report.examining("model"):
        model = model_of(known.newest)
        report.ok("model", f"made of {known.newest.path.name}, as the run has not written its own yet")
    settings = known.settings
    named = (getattr(settings, "tokenizer", "") or settings.init_from) if settings else ""
    for folder in (run / "best", Path(named) if named else None, Path(paths.weight("tokenizer"))):
        if not tokenizers and folder is not None and (folder / "tokenizer.json").is_file():
            tokenizers = [found] if (found := look_at_tokenizer(folder, report)) else []
    _look_further(model, [*tokenizers, *([other] if other else [])], known, config, report)


def look_at_one_checkpoint(path: Path, config: DoctorConfig, other: Tokenizer | None, report: Report) -> None:
    found = look_at_checkpoint(path, report)
    if found is None:
        return
    report.ok(path.name, f"whole, of step {found.step}")
    found = dataclasses.replace(found, optimizer={}, rng={})  # twice the model, and looked at already
    with report.examining("model"):
        known = Known(block_size=config.block_size, newest=found)
        _look_further(model_of(found), [other] if other else [], known, config, report)


def _look_further(model: Etude | None, tokenizers: list[Tokenizer], known: Known, config: DoctorConfig, report: Report) -> None:
    """What model, tokenizer and data tell together."""
    for tokenizer in tokenizers if known.newest is not None else []:
        with report.examining("trained tokenizer"):
            look_at_fingerprint(known.newest, tokenizer, report)
    tokenizer = tokenizers[0] if tokenizers else None
    context = model.config.max_position_embeddings if model is not None else 0
    known = dataclasses.replace(known, tokenizer=tokenizer, block_size=known.block_size or context)
    sets = look_at_data(known, config, report)
    if model is None:
        report.not_looked("behaviour", "the model cannot be loaded")
        return
    samples: list[Sample] = []
    if sets and tokenizer is not None:
        with report.examining("samples"):
            samples = samples_of(sets[0], tokenizer, context, config.samples)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        report.not_looked("behaviour", "weights that are not finite make everything so")
    elif look_at_behaviour(model, samples, report) and samples:
        base = known.settings.init_from if known.settings is not None else ""
        if (
            base
            and known.newest is not None
            and known.newest.state["identity"].get("init_from", "") not in ("", weights_fingerprint(base))
        ):
            report.warn(
                "init_from", f"{base} does not hold the weights any more that the run began with; it could not be repeated"
            )
            base = ""
        last = None if config.data else known.last_loss  # of other data nothing was recorded
        with report.examining("loss"):
            look_at_learnt(model, samples, Training(known.is_sft, base, last), report)
