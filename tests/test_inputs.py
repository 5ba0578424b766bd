"""Which files an input names: each once, under whatever name, and nothing that cannot be read like a file."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, write_jsonl

from etude.corpus.inputs import find_files, matching
from etude.corpus.streams import PIPE
from etude.corpus.texts import split_text
from etude.corpus.wiki.extract import find_dumps
from etude.errors import DataError, UsageError

FINDERS = {
    "rows": (find_files, "a.jsonl"),
    "texts": (lambda names: split_text._find(names)[0], "a.txt"),
    "dumps": (find_dumps, "a.xml"),
}


@pytest.fixture(params=FINDERS)
def finder(request):
    """(function that finds, name of a file that it takes)."""
    return FINDERS[request.param]


@pytest.mark.parametrize("folder", ["[x]", "a*b", "what?", "[!a]/[0-9]"])
def test_what_exists_is_no_pattern(tmp_path, finder, folder):
    """A folder is meant by its name, also before a pattern; another that the name would match as a pattern is not."""
    find, name = finder
    for other in ("x", "aab", "whats", "b/1", folder):
        (tmp_path / other).mkdir(parents=True)
        (tmp_path / other / name).write_text("{}")
    file = tmp_path / folder / name
    for named in (file.parent, file, file.parent / f"*{file.suffix}", file.parent / f"[{name[0]}]{name[1:]}"):
        assert find([str(named)]) == [file]
    assert find([str(tmp_path / "?" / name)]) == [tmp_path / "x" / name]
    with pytest.raises(DataError, match="no such file or folder"):
        find([str(file.parent / "b*")])


def test_patterns_search_folders_to_any_depth(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "one/two/a.jsonl", [{}])
    monkeypatch.chdir(tmp_path)
    assert [str(file) for file in matching(find_files(["one"])[0].parent.parent / "**/*.jsonl")] == ["one/two/a.jsonl"]
    assert [str(file) for file in find_files(["**/*.jsonl", "./one", "*/two/*"])] == ["one/two/a.jsonl"]


def test_one_file_is_one_however_it_is_named(tmp_path, finder, monkeypatch):
    find, name = finder
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / name).write_text("{}")
    (tmp_path / f"link{name}").symlink_to(tmp_path / "deep" / name)
    monkeypatch.chdir(tmp_path)
    spellings = [f"deep/{name}", f"./deep/../deep/{name}", str(tmp_path / "deep" / name), f"link{name}", "deep", f"*/{name}"]
    assert [str(file) for file in find(spellings)] == [f"deep/{name}"]
    assert [str(file) for file in find(spellings[::-1])] == [f"deep/{name}"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_refused_but_standard_input_has_many_names(tmp_path, finder):
    find, _ = finder
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in (tmp_path / "pipe.jsonl", os.devnull):
        with pytest.raises(UsageError, match="is a pipe or device; send its data to standard input, and name that by -"):
            find([str(name)])
    assert find(["-", "/dev/stdin", "/dev/fd/0"]) == [PIPE]


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="needs /dev/stdin")
def test_standard_input_by_its_path_and_a_process_in_a_file_s_place(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    check = f'"{sys.executable}" "{ROOT / "tool/process_jsonl.py"}" show --rows 5 --input'
    for command, code, told in (
        (f"cat a.jsonl | {check} /dev/stdin", 0, "── -:2"),
        (f"{check} /dev/stdin < a.jsonl", 0, "── -:2"),
        (f"{check} <(cat a.jsonl)", 2, "is a pipe or device"),
    ):
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == code and told in done.stdout + done.stderr, done.stderr
        assert code == 0 or done.stderr.count("\n") == 1
