"""Files that appear whole or not at all."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path in a temporary folder beside ``path``; when the block ends well it is synced and takes ``path``'s name, else it goes.

    The folder is for what a library writes beside the path it was given: safetensors first writes a file with a random name,
    which nobody would know for a leftover after a kill.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir(exist_ok=True)
    try:
        temporary = folder / path.name
        yield temporary
        _make_readable(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``path``; when the block ends well it is synced and replaces ``path``, else it goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}.", suffix=".tmp", dir=path.parent))
    os.chmod(temporary, 0o755)  # mkdtemp gives 0700; a model is to be readable by whoever may read its parent
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _make_readable(file)
            sync(file)
        sync(temporary)
        if path.exists():
            # No system call swaps two folders everywhere; the old one steps aside for the instant between two renames.
            aside = temporary.with_suffix(".old.tmp")
            os.replace(path, aside)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(aside, path)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(path: str | Path) -> None:
    """Remove the temporary files and folders of processes that were writing ``path`` and are no more: killed, they could not."""
    path = Path(path)
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)(\.\w+)?\.tmp")
    for found in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        match = pattern.fullmatch(found.name)
        if match and not _runs(int(match[1])):
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found, ignore_errors=True)
            else:
                with suppress(OSError):
                    found.unlink()


def _runs(pid: int) -> bool:
    if pid == os.getpid():
        return True
    if os.name == "nt":  # Windows has no harmless question of this kind, but refuses to delete what a process has open
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _make_readable(path: Path) -> None:
    """Let all read it: safetensors makes its files readable by their owner alone, whatever the umask says."""
    if os.name != "nt":
        os.chmod(path, path.stat().st_mode | 0o444 | (0o111 if path.is_dir() else 0))


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, onto the disk (fsync). Windows has no such call for folders."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
