"""Files and folders that appear whole or not at all: after success, after an exception, over an older one, and in an order
that a power cut respects.
"""

import os
import stat
from pathlib import Path

import pytest

from etude.files import sync, whole_file, whole_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- files --------------------------------------------------------------------------------------------------------------


def test_a_file_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "er" / "file.txt"
    with whole_file(target) as temporary:
        assert temporary.parent.parent == target.parent  # another file system could not be renamed across
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new" and names(target.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failed_file_leaves_what_was_there(tmp_path, error, old):
    target = tmp_path / "file.txt"
    if old:
        target.write_text(old)
    with pytest.raises(error), whole_file(target) as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == (["file.txt"] if old else [])
    assert not old or target.read_text() == old


def test_a_file_replaces_the_older_one_in_one_step(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with whole_file(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and names(tmp_path) == ["file.txt"]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(target):
        pass
    assert target.read_text() == "old"


def test_a_file_is_readable_as_any_other(tmp_path):
    with whole_file(tmp_path / "whole.txt") as temporary:
        temporary.write_text("")
    (tmp_path / "plain.txt").write_text("")
    assert (tmp_path / "whole.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode


# ---- folders ------------------------------------------------------------------------------------------------------------


def test_a_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "folder"
    with whole_folder(target) as temporary:
        assert temporary.parent == target.parent
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("new")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "new" and names(target.parent) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failed_folder_leaves_what_was_there(tmp_path, error, old):
    target = tmp_path / "folder"
    if old:
        target.mkdir()
        (target / "file").write_text(old)
    with pytest.raises(error), whole_folder(target) as temporary:
        (temporary / "file").write_text("half")
        raise error
    assert names(tmp_path) == (["folder"] if old else [])
    assert not old or (target / "file").read_text() == old


def test_a_folder_replaces_the_older_one_without_mixing(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "stale.bin").write_text("old")
    with whole_folder(target) as temporary:
        (temporary / "file").write_text("new")
        assert names(target) == ["stale.bin"]
    assert names(target) == ["file"] and names(tmp_path) == ["folder"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_older_folder_in_place(tmp_path, monkeypatch, failing):
    """Two renames swap the folders; whichever fails, the old one must be back under its name."""
    target, calls, replace = tmp_path / "folder", [], os.replace
    target.mkdir()
    (target / "file").write_text("old")

    def sometimes(source, destination):
        calls.append(source)
        if len(calls) == failing:
            raise OSError("the disk is gone")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", sometimes)
    with pytest.raises(OSError, match="the disk is gone"), whole_folder(target) as temporary:
        (temporary / "file").write_text("new")
    assert (target / "file").read_text() == "old" and names(tmp_path) == ["folder"]


def test_a_folder_can_be_read_by_whoever_may_read_its_parent(tmp_path):
    with whole_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("")
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


def test_two_folders_may_be_made_at_once(tmp_path):
    with whole_folder(tmp_path / "folder") as one, whole_folder(tmp_path / "folder") as other:
        assert one != other
        (one / "file").write_text("one")
        (other / "file").write_text("other")
    assert (tmp_path / "folder" / "file").read_text() == "one" and names(tmp_path) == ["folder"]


# ---- what a power cut would find ----------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The order of fsync and rename calls, files told apart by inode: ("sync", inode) and ("rename", inode)."""
    order, fsync, replace = [], os.fsync, os.replace

    def noting_sync(descriptor):
        order.append(("sync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def noting_replace(source, destination):
        order.append(("rename", os.stat(source).st_ino))
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(os, "replace", noting_replace)
    return order


def test_a_file_is_on_the_disk_before_its_name_is_and_the_name_before_we_go_on(tmp_path, calls):
    with whole_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    file, folder = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("sync", file), ("rename", file), ("sync", folder)]


def test_all_of_a_folder_is_on_the_disk_before_its_name_is_and_the_name_before_we_go_on(tmp_path, calls):
    with whole_folder(tmp_path / "folder") as temporary:
        (temporary / "sub").mkdir()
        for name in ("a", "b", "sub/c"):
            (temporary / name).write_text(name)
    target = tmp_path / "folder"
    inodes = {path.stat().st_ino for path in [target, *target.rglob("*")]}
    renamed = calls.index(("rename", target.stat().st_ino))
    assert {inode for kind, inode in calls[:renamed] if kind == "sync"} == inodes
    assert calls[renamed + 1 :] == [("sync", tmp_path.stat().st_ino)]


def test_sync_takes_files_and_folders_and_leaks_no_descriptor(tmp_path):
    (tmp_path / "file").write_text("x")
    before = os.open(tmp_path / "file", os.O_RDONLY)
    os.close(before)
    sync(tmp_path / "file")
    sync(tmp_path)
    after = os.open(tmp_path / "file", os.O_RDONLY)
    os.close(after)
    assert after == before
