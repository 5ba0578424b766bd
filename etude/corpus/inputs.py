"""Which files ``--input`` and ``--data`` name."""

import glob
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from etude.corpus.streams import COMPRESSED_SUFFIXES, PIPE, STANDARD_INPUT
from etude.errors import DataError, UsageError

TEXT_SUFFIXES = {".jsonl", ".txt"}
REJECTED = ".rejected.jsonl"  # ends the name of the file that keeps what a tool left out, beside its output


def kind_of(path: Path) -> str:
    """.jsonl or .txt, below any compression suffix; other names are taken as they end. A pipe carries .jsonl."""
    if path == PIPE:
        return ".jsonl"
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def inputs_of(names: Sequence[str], suffixes: Collection[str] = TEXT_SUFFIXES) -> list[Path]:
    """The files that ``--input`` names; naming none is a mistake."""
    if not names:
        raise UsageError("name an --input: files, folders, globs, or - for standard input")
    return find_files(names, suffixes)


def find_files(inputs: Sequence[str | Path], suffixes: Collection[str] = TEXT_SUFFIXES) -> list[Path]:
    """The data files that ``inputs`` name: files, folders (searched through), glob patterns and ``-``, in a stable order."""
    expected = " or ".join(sorted(suffixes))
    found: list[Path] = []
    for path in map(input_path, inputs):
        if path == PIPE:
            found.append(path)
        elif path.is_dir():
            below = sorted(file for file in path.rglob("*") if _is_data(file, path, suffixes))
            if not below:
                raise DataError(f"{path}: no {expected} file in this folder; name the files, or another folder")
            found += below
        elif path.is_file():
            if kind_of(path) not in suffixes:
                raise DataError(f"{path}: expected {expected} (also .gz .bz2 .xz .zst); convert or rename it")
            found.append(path)
        else:
            matches = [match for match in matching(path) if not match.name.endswith(REJECTED)]
            if not matches:
                raise DataError(f"{path}: no such file or folder; check the path")
            found += find_files(matches, suffixes)
    return distinct(found)


def input_path(name: str | Path) -> Path:
    """The path that the name of an input stands for; ``-`` for standard input under any name.

    Raises :class:`UsageError` for a pipe or device: many jobs read their input twice, and all want its kind from its name.
    """
    path = Path(name).expanduser()
    if str(path) in STANDARD_INPUT:
        return PIPE
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(f"{path}: is a pipe or device; send its data to standard input, and name that by -")
    return path


def matching(pattern: Path) -> list[Path]:
    """The files that a glob pattern matches, sorted. Leading folders that exist as they are written, such as "[x]", are none."""
    there, parts = Path(pattern.anchor), list(pattern.relative_to(pattern.anchor).parts)
    while parts and (there / parts[0]).exists():
        there /= parts.pop(0)
    found = map(Path, glob.glob(os.path.join(glob.escape(str(there)), *parts), recursive=True))
    return sorted(file for file in found if file.is_file())


def distinct(files: Iterable[Path]) -> list[Path]:
    """Each file once, by the first of its names: ``a.jsonl``, ``./folder/../a.jsonl`` and a link to it are one."""
    first_names: dict[Path, Path] = {}
    for file in files:
        first_names.setdefault(file if file == PIPE else file.resolve(), file)
    return list(first_names.values())


def _is_data(file: Path, folder: Path, suffixes: Collection[str]) -> bool:
    """Whether a file found in a folder is meant: no hidden one, and none of the rows that a tool rejected."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and kind_of(file) in suffixes and not hidden and not file.name.endswith(REJECTED)
