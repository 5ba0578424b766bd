"""Datasets from the Hugging Face Hub and from ModelScope, by their own libraries, which go on where they were interrupted.

A file is checked against the Hub's checksum before it takes its name; until then it is in a folder NAME.part beside.
"""

import contextlib
import hashlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from etude import paths
from etude.cli import STORAGE_ERRORS, option
from etude.corpus.fetch.download import WAIT_SECONDS, check_room, hash_of, is_there, put, unreachable
from etude.corpus.output import tell
from etude.errors import DataError, StorageError, UsageError


class MiniMindFile(NamedTuple):
    folder: str  # of training_data
    size: str  # about
    revision: str  # of the Hub's repository: files were renamed there, and an older revision keeps them


MINIMIND_REPO = {"huggingface": "jingyaogong/minimind_dataset", "modelscope": "gongjy/minimind_dataset"}
MINIMIND_LICENCE = "Apache-2.0 by its page, made from other datasets: see there"
_2025 = "9f9f5d75020d4e36f9af87d303a3690ceba6d5c6"
MINIMIND = {
    "pretrain_hq.jsonl": MiniMindFile("pretrain", "1.6 GB", _2025),
    "sft_mini_512.jsonl": MiniMindFile("sft", "1.2 GB", _2025),
    "lora_identity.jsonl": MiniMindFile("sft", "23 kB", _2025),
    "lora_medical.jsonl": MiniMindFile("sft", "34 MB", _2025),
    "pretrain_t2t_mini.jsonl": MiniMindFile("pretrain", "1.2 GB", "main"),
    "pretrain_t2t.jsonl": MiniMindFile("pretrain", "10 GB", "main"),
    "sft_t2t_mini.jsonl": MiniMindFile("sft", "1.6 GB", "main"),
    "sft_t2t.jsonl": MiniMindFile("sft", "14 GB", "main"),
}
_MIRROR_HELP = "address of a mirror, such as https://hf-mirror.com (empty: $HF_ENDPOINT, else the source itself)"
_SOURCE_HELP = "modelscope needs: pip install modelscope"


@dataclass(frozen=True)
class MiniMindConfig:
    files: tuple[str, ...] = option(
        ("pretrain_hq.jsonl", "sft_mini_512.jsonl"),
        "which: " + ", ".join(f"{name} ({file.size})" for name, file in MINIMIND.items()),
    )
    output: str = option(lambda: paths.training_data("").rstrip("/\\"), "folder to put pretrain/ and sft/ into")
    source: Literal["huggingface", "modelscope"] = option("huggingface", _SOURCE_HELP)
    mirror: str = option("", _MIRROR_HELP)
    revision: str = option("", "branch, tag or commit of the repository (empty: the one known to have the file)")
    force: bool = option(False, "download again what is there")

    def __post_init__(self) -> None:
        for name in self.files:
            if name not in MINIMIND:
                raise UsageError(f"files ({name}) is not among {', '.join(MINIMIND)}; others come by the command file")


@dataclass(frozen=True)
class FileConfig:
    repo: str = option("", "dataset repository, as owner/name")
    file: tuple[str, ...] = option((), "files in it, with their folders")
    output: str = option(lambda: paths.training_data("pretrain"), "folder to put them into, by their own names")
    source: Literal["huggingface", "modelscope"] = option("huggingface", _SOURCE_HELP)
    mirror: str = option("", _MIRROR_HELP)
    revision: str = option("", "branch, tag or commit of the repository (empty: its main one)")
    force: bool = option(False, "download again what is there")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repo):
            raise UsageError(f"repo ({self.repo}) must be a repository's owner/name")
        if not self.file:
            raise UsageError("name a --file of the repository, such as data/train.jsonl")
        for name in self.file:
            if name.startswith("/") or "\\" in name or ".." in name.split("/") or name.endswith("/"):
                raise UsageError(f"file ({name}) must be the path of a file within the repository")


def download_minimind(config: MiniMindConfig) -> None:
    """The data of the MiniMind project, most of it Chinese, under the names that the stages look for."""
    tell(f"licence   {MINIMIND_LICENCE}")
    for name in config.files:
        known = MINIMIND[name]
        revision = config.revision or (known.revision if config.source == "huggingface" else "")
        target = Path(config.output) / known.folder / name
        _from_hub(config.source, MINIMIND_REPO[config.source], name, revision, target, config.mirror, config.force)


def download_file(config: FileConfig) -> None:
    """Any file of any dataset repository."""
    for name in config.file:
        target = Path(config.output) / name.rpartition("/")[2]
        _from_hub(config.source, config.repo, name, config.revision, target, config.mirror, config.force)


def _from_hub(source: str, repo: str, name: str, revision: str, target: Path, mirror: str, force: bool) -> None:
    if is_there(target, force):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")  # a folder: the libraries keep notes beside the file
    part.mkdir(exist_ok=True)
    try:
        found, checked = (_hugging_face if source == "huggingface" else _modelscope)(
            repo, name, revision, target, part, mirror.rstrip("/") or None
        )
    except KeyboardInterrupt:
        tell(f"kept      {paths.typed(part)}; the same command goes on from there")
        raise
    finally:
        with contextlib.suppress(OSError):
            part.rmdir()  # if nothing has arrived yet
    put(found, target, checked)
    shutil.rmtree(part, ignore_errors=True)


def _hugging_face(repo: str, name: str, revision: str, target: Path, part: Path, mirror: str | None) -> tuple[Path, str]:
    """(The file, how it was checked), downloaded by huggingface_hub, which goes on from what is there."""
    if mirror:  # mirrors have the files, but not the Hub's store of their pieces
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    revision = revision or "main"
    url = huggingface_hub.hf_hub_url(repo, name, repo_type="dataset", revision=revision, endpoint=mirror)
    try:
        metadata = huggingface_hub.get_hf_file_metadata(url)
        check_room(target, metadata.size or 0)
        found = _persistently(
            part,
            huggingface_hub.hf_hub_download,
            repo,
            name,
            repo_type="dataset",
            revision=revision,
            local_dir=part,
            endpoint=mirror,
        )
    except GatedRepoError:
        raise DataError(f"{url}: needs consent on its page and a login (hf auth login)") from None
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        if type(error).__name__ == "LocalEntryNotFoundError":  # says that the network gave out
            raise unreachable(url, error, target) from None
        raise DataError(
            f"{url}: there is no such file; look at the repository's page: names change (--revision main?)"
        ) from None
    except Exception as error:  # the library's HTTP clients have error classes of their own, and change
        if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in STORAGE_ERRORS):
            raise
        raise unreachable(url, error, target, " with --mirror https://hf-mirror.com or --source modelscope") from None
    return Path(found), _check_etag(Path(found), metadata.etag or "", url)


def _check_etag(file: Path, etag: str, url: str) -> str:
    """How ``file`` was checked. The Hub's etag is a large file's SHA-256, and a small one's SHA-1 as git counts it."""
    if re.fullmatch("[0-9a-f]{64}", etag):
        name, digest = "SHA-256", hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", etag):
        name, digest = "SHA-1", hashlib.sha1(b"blob %d\0" % file.stat().st_size)
    else:
        return "its size is right"
    if (found := hash_of(file, digest)) != etag:
        shutil.rmtree(next(parent for parent in file.parents if parent.name.endswith(".part")))
        raise DataError(
            f"{url}: what arrived has {name} {found}, expected {etag}; it was removed: try again, or another mirror"
        )
    return f"{name} is right"


def _modelscope(repo: str, name: str, revision: str, target: Path, part: Path, mirror: str | None) -> tuple[Path, str]:
    """(The file, how it was checked), downloaded by modelscope, which goes on from what is there and checks it."""
    try:
        from modelscope.hub.file_download import dataset_file_download
    except ImportError:
        raise UsageError("--source modelscope needs a package: pip install modelscope") from None
    url = f"{mirror or 'https://modelscope.cn'}/datasets/{repo}/resolve/{revision or 'master'}/{name}"
    try:
        found = _persistently(
            part, dataset_file_download, repo, name, local_dir=str(part), revision=revision or None, endpoint=mirror
        )
    except Exception as error:  # of several libraries
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            raise
        if "404" in str(error) or "not exist" in str(error).lower() or "not found" in str(error).lower():
            raise DataError(f"{url}: there is no such file; look at the repository's page: names change") from None
        raise unreachable(url, error, target, " with --source huggingface") from None
    return Path(found), "by modelscope"


def _persistently(part: Path, download: Any, *arguments: Any, **keywords: Any) -> Any:
    """Call ``download`` again when the network fails it on the way; each call goes on from what the one before left."""
    while True:
        before = _bytes_below(part)
        try:
            return download(*arguments, **keywords)
        except Exception as error:
            if _bytes_below(part) <= before or (isinstance(error, OSError) and error.errno in STORAGE_ERRORS):
                raise
            time.sleep(WAIT_SECONDS)


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
