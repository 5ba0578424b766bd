"""What is known of a model beside its files: the settings of its run, its last checkpoint, and the data."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from etude.doctor.config import DoctorConfig
from etude.doctor.curve import Origin
from etude.doctor.data import DataSet, Reading, held_out, look_at_encoding, look_at_rows, look_for_leakage, read_data
from etude.doctor.report import Report
from etude.doctor.run import shape_of
from etude.errors import DataError, EtudeError, MismatchError
from etude.model.config import EtudeConfig
from etude.tokenizer import Tokenizer
from etude.training.checkpoint import Checkpoint
from etude.training.config import PretrainConfig, SFTConfig, TrainingConfig
from etude.weights import read_config_json

USUAL_BLOCK = 512


@dataclass(frozen=True)
class Known:
    """What is known of what is looked at, beside the data."""

    tokenizer: Tokenizer | None = None
    block_size: int = 0
    settings: TrainingConfig | None = None  # of the run
    newest: Checkpoint | None = None  # its newest good checkpoint
    last_loss: float | None = None

    @property
    def is_sft(self) -> bool | None:
        """Whether replies were learnt, rather than text; None where nobody knows."""
        if self.settings is not None:
            return isinstance(self.settings, SFTConfig)
        # A setting that pretraining alone has is part of what its checkpoints remember.
        return "separate_documents" not in self.newest.state["identity"] if self.newest is not None else None


def look_at_data(known: Known, config: DoctorConfig, report: Report) -> list[DataSet]:
    """Examine training and validation data, as far as they are named and still there; what was read, training data first."""
    settings = known.settings
    how = Reading(config.text_key, config.text_unit, None, config.max_rows)
    if settings is not None:
        text_key, text_unit = getattr(settings, "text_key", how.text_key), getattr(settings, "text_unit", how.text_unit)
        how = Reading(text_key, text_unit, known.is_sft, config.max_rows, settings.max_bad)
        if config.data:  # what is named by hand may be of another kind
            how = dataclasses.replace(how, conversations=None)
    sets = []
    for name in ("data", "val_data"):
        sources = getattr(config, name) or (getattr(settings, name) if settings and not config.data else ())
        found = _read(name, sources, how, given=bool(getattr(config, name)), report=report) if sources else None
        if found is not None:
            sets.append(found)
            look_at_rows(found, how.max_bad, report)
            if known.tokenizer is not None and found.rows:
                with report.examining(f"{name}: tokens"):
                    look_at_encoding(found, known.tokenizer, known.block_size or USUAL_BLOCK, report)
            elif found.rows:
                report.not_looked(f"{name}: tokens", "no tokenizer is known; name one with --tokenizer")
        elif name == "data" and not sources:
            report.not_looked("data", "none is named; name some with --data")
    if len(sets) == 2 and sets[0].conversations != sets[1].conversations and all(found.rows for found in sets):
        one, other = ("conversations" if found.conversations else "text" for found in sets)
        report.bad(
            "val_data", f"{other}, where data are {one}: no stage learns from one and validates on the other; name one kind"
        )
    with report.examining("leakage"):
        _look_for_leakage(sets, settings, config, report)
    return sets if sets and sets[0].name == "data" else []


def _read(name: str, sources: Sequence[str], how: Reading, given: bool, report: Report) -> DataSet | None:
    try:
        return read_data(name, sources, how)
    except MismatchError as error:
        report.bad(name, str(error))
    except (EtudeError, OSError) as error:
        if given:
            report.bad(name, str(error))
        else:
            report.not_looked(name, f"run.yaml's {name} is not here any more ({error}); name it with --{name}")
    return None


def _look_for_leakage(sets: list[DataSet], settings: TrainingConfig | None, config: DoctorConfig, report: Report) -> None:
    if len(sets) == 2:
        look_for_leakage(*sets, report)
    elif sets and sets[0].name == "data" and settings is not None and not config.data and not settings.val_data:
        look_for_leakage(*held_out(sets[0], settings.val_fraction, settings.seed), report)
    elif sets:
        report.not_looked("leakage", "no validation data is named; name it with --val_data")


def run_settings(path: Path) -> TrainingConfig:
    """The settings in a run.yaml. Raises :class:`DataError` where they are none."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = PretrainConfig if "text_key" in values else SFTConfig  # conversations have no such key
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, EtudeError, RecursionError) as error:
        raise DataError(
            f"{path}: not the settings of a run ({error}); restore it from the command that began the run"
        ) from None


def origin_of(run: Path, settings: TrainingConfig | None, newest: Checkpoint | None) -> Origin:
    """What a run began with, for its loss curve: its shape is in its checkpoints, else beside its model."""
    from_scratch = isinstance(settings, PretrainConfig) and not settings.init_from
    if newest is not None:
        shape = shape_of(newest)
    elif (run / "config.json").is_file():
        shape = EtudeConfig.from_dict(read_config_json(run))
    else:
        return Origin(None, from_scratch)
    head_is_zero = from_scratch and settings.initializer == "fan_in" and not shape.tie_word_embeddings
    head_std = 0.0 if head_is_zero else shape.initializer_range
    return Origin(shape.vocab_size, from_scratch, head_std * shape.hidden_size**0.5)
