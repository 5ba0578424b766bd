"""Wikipedia's dumps, by plain HTTP: resumed after an interruption, checked against their checksums, whole or not at all.

What has arrived so far waits beside the target, as NAME.part, and the same command goes on from there.
"""

import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude import paths
from etude.cli import option
from etude.corpus.output import tell
from etude.errors import DataError, StorageError, UsageError
from etude.files import sync
from etude.runlog import progress_bar

ATTEMPTS = 5  # without a single byte in between
WAIT_SECONDS = 2.0  # before a further attempt, times its number
TIMEOUT_SECONDS = 30.0  # of silence
BLOCK_BYTES = 2**18
HEADERS = {"User-Agent": "etude-download/1 (training data)"}  # Wikimedia answers no client without a name


@dataclass(frozen=True)
class WikipediaConfig:
    language: str = option("zh", "which Wikipedia: zh, en, zh-yue, simple, …")
    date: str = option("latest", "day of the dump, as 20250101, or latest; dumps are kept for some months")
    output: str = option(lambda: paths.training_data("wiki"), "folder to put the dump into")
    dumps_mirror: str = option("https://dumps.wikimedia.org", "address of the dumps, or of a mirror of them")
    checksum: bool = option(True, "check the dump against its published SHA-1 (false: for mirrors that publish none)")
    force: bool = option(False, "download again what is there")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*", self.language):
            raise UsageError(f"language ({self.language}) must be a Wikipedia's code, such as zh or zh-yue")
        if self.date != "latest" and not re.fullmatch(r"\d{8}", self.date):
            raise UsageError(f"date ({self.date}) must be a day such as 20250101, or latest")


def download_wikipedia(config: WikipediaConfig) -> None:
    """The dump of all articles. ``latest`` is looked up in its list of checksums first, so that a download that goes on
    another day goes on with the same dump.
    """
    wiki = config.language.replace("-", "_") + "wiki"
    base = f"{config.dumps_mirror.rstrip('/')}/{wiki}"
    ending = "pages-articles-multistream.xml.bz2"
    target = Path(config.output) / f"{wiki}-{config.date}-{ending}"
    if is_there(target, config.force):
        return
    date, digest = config.date, ""
    if config.checksum:
        url = f"{base}/{date}/{wiki}-{date}-sha1sums.txt"
        lines = _read(url, target).decode("utf-8", "backslashreplace").splitlines()
        found = [re.fullmatch(rf"([0-9a-f]{{40}}) [ *]({wiki}-(\d{{8}})-{re.escape(ending)})", line) for line in lines]
        match = next(filter(None, found), None)
        if match is None:
            raise DataError(f"{url}: does not list {ending}, so this dump is not finished; try another --date")
        digest, date = match[1], match[3]
    tell(f"dump      {wiki} of {date}; text under CC BY-SA 4.0 and GFDL, by Wikipedia's authors")
    fetch(f"{base}/{date}/{wiki}-{date}-{ending}", target, digest)
    tell(f"next      python tool/extract_xml.py --input {paths.typed(target)} --output {wiki}.jsonl")


def fetch(url: str, target: Path, sha1: str = "") -> None:
    """Download ``url`` to ``target``, going on from what a former attempt left, and check its SHA-1 if given.

    Raises :class:`StorageError` (exit code 74, as ``sysexits.h`` has it for input and output) when the network gives out,
    keeping what has arrived; :class:`DataError` when there is no such file, or not the right one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    failures = 0
    try:
        while True:
            before = _size(part)
            try:
                complete, problem = _append(url, part, target), "the connection ended early"
            except _NetworkError as error:
                complete, problem = False, str(error)
            if complete:
                break
            failures = 1 if _size(part) > before else failures + 1
            if failures >= ATTEMPTS or not _size(part):
                raise unreachable(url, problem, target)
            time.sleep(WAIT_SECONDS * failures)
    except KeyboardInterrupt:
        tell(f"kept      {paths.typed(part)}; the same command goes on from there")
        raise
    if sha1 and (found := hash_of(part, hashlib.sha1())) != sha1:
        part.unlink()
        raise DataError(f"{url}: what arrived has SHA-1 {found}, expected {sha1}; it was removed: try again, or another mirror")
    put(part, target, "SHA-1 is right" if sha1 else "unchecked")


class _NetworkError(Exception):
    """The network, rather than the disk, is at fault."""


def _open(url: str, target: Path, start: int = 0) -> http.client.HTTPResponse:
    headers = HEADERS | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return error  # nothing is left to send
        if error.code in (429, 500, 502, 503, 504):
            raise _NetworkError(f"HTTP {error.code}") from None
        raise DataError(f"{url}: the server answers HTTP {error.code} ({error.reason}); check the name and the date") from None
    except ValueError as error:
        raise UsageError(f"{url}: is no address ({error})") from None
    except (OSError, http.client.HTTPException) as error:
        raise _NetworkError(getattr(error, "reason", error) or type(error).__name__) from None


def _read(url: str, target: Path) -> bytes:
    """A small file."""
    try:
        with _open(url, target) as response:
            return response.read(2**20)
    except (OSError, http.client.HTTPException, _NetworkError) as error:
        raise unreachable(url, error, target) from None


def _append(url: str, part: Path, target: Path) -> bool:
    """Ask for what is missing of ``part``; whether it is whole then. A server that sends all again begins anew."""
    with _open(url, target, start=_size(part)) as response:
        have, total = _size(part), response.headers.get("Content-Length")
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
        if response.status == 416:
            if span and int(span[2]) == have:
                return True
            part.unlink()  # it is longer than the file, thus of another one
            return _append(url, part, target)
        if response.status == 206 and span and int(span[1] or 0) == have:
            total = span[2]
        else:
            have = 0
        total = int(total) if total is not None else None
        check_room(target, (total or 0) - have)
        with open(part, "ab" if have else "wb") as file, progress_bar(target.name, total or 0, "B") as bar:
            bar.update(have)
            while True:
                try:
                    block = response.read(BLOCK_BYTES)
                except http.client.IncompleteRead as error:
                    block = error.partial
                    file.write(block)
                    return False
                except (OSError, http.client.HTTPException) as error:
                    raise _NetworkError(error) from None
                if not block:
                    break
                file.write(block)
                have += len(block)
                bar.update(len(block))
    return total is None or have == total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise StorageError(
            f"{target.parent}: has {free / 1e9:.1f} GB free, {target.name} needs {needed / 1e9:.1f} more; make room"
        )


def unreachable(url: str, reason: object, target: Path, hint: str = "") -> StorageError:
    reason = " ".join(str(reason).split())[:200]
    return StorageError(
        f"{url}: cannot be reached ({reason}); try again{hint}, or get it by other means and put it at {paths.typed(target)}"
    )


def hash_of(path: Path, digest: Any) -> str:
    with open(path, "rb") as file, progress_bar("check", path.stat().st_size, "B") as bar:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def is_there(target: Path, force: bool) -> bool:
    if target.exists() and not force:
        tell(f"there     {paths.typed(target)} ({target.stat().st_size:,} bytes); --force downloads it again")
        return True
    return False


def put(part: Path, target: Path, checked: str) -> None:
    sync(part)
    os.replace(part, target)
    sync(target.parent)
    tell(f"written   {paths.typed(target)} ({target.stat().st_size:,} bytes, {checked})")
