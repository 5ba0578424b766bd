"""Bytes in and out: files compressed by their suffix (.gz .bz2 .xz .zst), and "-" for a pipe."""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from etude.errors import UsageError

COMPRESSED_SUFFIXES = {".gz", ".bz2", ".xz", ".zst"}
PIPE = Path("-")  # standard input or output
STANDARD_INPUT = {"-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"}  # its names
READ_BYTES = 2**18  # read from the disk at once


class _Metered(io.FileIO):
    """A file that tells a progress bar how much of it was read, compressed as it lies there."""

    def __init__(self, path: Path, bar: Any):
        super().__init__(path)
        self._bar = bar

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self._bar.update(count)
        return count


def open_binary(path: Path, bar: Any = None) -> IO[bytes]:
    """Open a file for reading, decompressed by its suffix; ``-`` is standard input.

    ``bar``, if given, is a progress bar that counts the bytes as they lie on the disk.
    """
    if path == PIPE:
        if sys.stdin is None:
            raise UsageError("there is no standard input to read; name the files")
        return io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False), READ_BYTES)
    raw = io.BufferedReader(_Metered(path, bar) if bar is not None else io.FileIO(path), READ_BYTES)
    try:
        return _decompressing(raw, path)
    except BaseException:
        raw.close()
        raise


def _decompressing(raw: IO[bytes], path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            import gzip

            return _closing(gzip.GzipFile(fileobj=raw, mode="rb"), raw)
        case ".bz2":
            import bz2

            return _closing(bz2.BZ2File(raw, "rb"), raw)
        case ".xz":
            import lzma

            return _closing(lzma.LZMAFile(raw, "rb"), raw)
        case ".zst":
            return _closing(_zstd(path).ZstdFile(raw, "rb"), raw)
    return raw


class _closing(io.BufferedReader):
    """A decompressing file that closes the file below it as well."""

    def __init__(self, unpacked: IO[bytes], raw: IO[bytes]):
        super().__init__(unpacked, READ_BYTES)
        self._below = raw

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._below.close()


def create_binary(path: Path, like: Path) -> IO[bytes]:
    """Create ``path`` for writing, compressed by the suffix of ``like``, the name that it will have in the end.

    Equal contents give equal bytes: no time of writing is stored.
    """
    match like.suffix.lower():
        case ".gz":
            import gzip

            return gzip.GzipFile(filename="", mode="wb", fileobj=open(path, "wb"), mtime=0)
        case ".bz2":
            import bz2

            return bz2.open(path, "wb")
        case ".xz":
            import lzma

            return lzma.open(path, "wb")
        case ".zst":
            return _zstd(like).open(path, "wb")
    return open(path, "wb", buffering=READ_BYTES)


@contextlib.contextmanager
def standard_output() -> Iterator[None]:
    """At the end of the block all that was written to standard output is out, or its error is raised.

    What cannot be written is dropped then: the interpreter would try once more as it ends, and leave with a code of its own.
    """
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
            raise


def _zstd(path: Path):
    try:
        return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError:
        raise UsageError(f"{path}: .zst needs a package: pip install backports.zstd") from None
