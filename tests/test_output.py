"""Where corpus tools write: nothing that was there is lost, and what is rejected is no data."""

import os
from pathlib import Path

import pytest

from etude.corpus.inputs import find_files
from etude.corpus.jsonl import Rejects, read_rows
from etude.corpus.output import check_output, output_to
from etude.corpus.rows.documents import rows_of
from etude.errors import DataError, StorageError, UsageError


def write(path: Path, text: str = '{"text": "a"}\n') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_input_is_safe_under_the_name_of_the_rejected_rows(tmp_path):
    source = write(tmp_path / "a.jsonl.rejected.jsonl")
    for force in (False, True):
        with pytest.raises(UsageError, match="is an input as well"), output_to(str(tmp_path / "a.jsonl"), [source], force):
            pass
    assert os.listdir(tmp_path) == [source.name]


def test_rejected_rows_of_another_run_go_only_by_force(tmp_path):
    old = write(tmp_path / "a.jsonl.rejected.jsonl", "mine\n")
    with pytest.raises(UsageError, match="exists already"), output_to(str(tmp_path / "a.jsonl")):
        pass
    assert old.read_text() == "mine\n"
    with output_to(str(tmp_path / "a.jsonl"), force=True) as output:
        output.write_line(b"{}")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    write(tmp_path / "keep/notes.md", "precious")
    with pytest.raises(UsageError, match=r"holds other things than shards \(notes.md\)"):
        check_output(str(tmp_path / "keep"), force=True, folder=True)
    write(tmp_path / "shards/00000.jsonl")
    check_output(str(tmp_path / "shards"), force=True, folder=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_ordinary_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "no ordinary file"),
        (Path(os.devnull), "no ordinary file"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(UsageError, match=why):
            check_output(str(path), force=True)
    write(tmp_path / "file")
    with pytest.raises(StorageError, match="this folder cannot be made"):
        check_output(str(tmp_path / "file/below/out.jsonl"))


def test_rejected_rows_and_hidden_files_are_no_data_of_a_folder(tmp_path):
    data = write(tmp_path / "a.jsonl")
    rejected = write(tmp_path / "b.jsonl.rejected.jsonl")
    write(tmp_path / ".ipynb_checkpoints/a-checkpoint.jsonl")
    assert find_files([tmp_path]) == [data] == find_files([tmp_path / "*.jsonl"])
    assert find_files([rejected]) == [rejected]  # named, it is meant


def test_a_row_nested_too_deeply_is_a_bad_row(tmp_path):
    path = write(tmp_path / "deep.jsonl", '{"text": "ok", "x": ' + "[" * 100_000 + "]" * 100_000 + '}\n{"text": "b"}\n')
    rejects = Rejects(1)
    assert [row.record["text"] for row in read_rows(path, rejects)] == ["b"]
    assert "nested too deeply" in rejects.reasons[0]


def test_an_input_without_a_row_is_a_mistake(tmp_path):
    with pytest.raises(DataError, match=r"empty.jsonl: no row in it"):
        list(rows_of([write(tmp_path / "empty.jsonl", "\n")], Rejects()))


@pytest.mark.parametrize(
    "shards, names", [(10, ("0.jsonl", "9.jsonl")), (11, ("00.jsonl", "10.jsonl")), (101, ("000.jsonl", "100.jsonl"))]
)
def test_names_of_shards_sort_as_their_numbers_however_many_there_are(tmp_path, monkeypatch, shards, names):
    monkeypatch.setattr("etude.corpus.output.SHARD_DIGITS", 1)
    with output_to(str(tmp_path / "parts"), shard_bytes=1) as output:
        for number in range(shards):
            output.write({"number": number})
    files = find_files([tmp_path / "parts"])
    assert (files[0].name, files[-1].name) == names
    assert [row.record["number"] for row in rows_of(files, Rejects())] == list(range(shards))


def test_an_input_of_bad_rows_only_is_a_mistake(tmp_path):
    empty, bad = write(tmp_path / "empty.jsonl", ""), write(tmp_path / "bad.jsonl", "{\n[]\n")
    with pytest.raises(DataError, match=r"bad.jsonl:1: not valid JSON .*; no row of the input is good \(2 bad\)"):
        list(rows_of([empty, bad], Rejects(5)))
    good = write(tmp_path / "good.jsonl")
    assert len(list(rows_of([empty, bad, good], Rejects(5)))) == 1


def test_without_a_file_for_them_the_first_rejected_rows_are_told(capfd):
    from etude.corpus.output import summary

    with output_to("-") as output:
        output.reject("a.jsonl:3", "too short", b"{}")
    summary(output, "-")
    assert "a.jsonl:3: too short" in capfd.readouterr().err
