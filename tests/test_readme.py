"""The documentation against the code: its commands run; its options, defaults, sizes, paths and links are the real ones; and
the README says the same in both languages.

Bash and python blocks are run as they stand, in order, but for those after a comment ``<!-- not run: why -->``.
"""

import dataclasses
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

from etude import cli, errors
from etude.model.config import PRESETS, EtudeConfig

READMES = ["README.md", "README_CN.md"]
PAGES = [*READMES, "docs/architecture.md", "docs/corpus.md", "docs/performance.md"]
FOREIGN_OPTIONS = {
    "repo-type",
    "local-dir",
    "dataset",
    "local_dir",
    "standalone",
    "nproc_per_node",
    "max_restarts",
}  # of hf, modelscope, torchrun
OWN_OPTIONS = {"help", "config", "print_config"}  # of every script
SCRIPT_FOLDERS = ("train", "tool", "inference")
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for folder in SCRIPT_FOLDERS for path in (ROOT / folder).glob("*.py"))


class Block(NamedTuple):
    language: str
    code: str
    comment: str  # the HTML comment on the line before it, or ""

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and not self.comment.startswith("<!-- not run: ")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    found = re.finditer(r"(?:^(<!--[^\n]*-->)\n)?^```(\w*)\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)
    return [Block(match[2], match[3], match[1] or "") for match in found]


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def headings(page: str) -> list[str]:
    return re.findall(r"^#+ .+$", prose(page), re.MULTILINE)


def table_after(page: str, mark: str) -> list[list[str]]:
    """The rows of the first table after ``mark``, as cells; the first row is the table's head."""
    lines = read(page).partition(mark)[2].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    last = next((number for number, line in enumerate(lines) if number > first and not line.startswith("|")), len(lines))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:last]]
    assert set("".join(rows.pop(1))) == {"-"}
    return rows


# ---- the commands -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="the commands are written for bash")
def test_the_commands_of_the_readme_run_as_they_stand(tmp_path):
    for folder in SCRIPT_FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "ETUDE_HOME": str(tmp_path), "PATH": path}
    told = []
    for block in (block for block in blocks("README.md") if block.runs):
        command = ["bash", "-euo", "pipefail", "-c", block.code] if block.language == "bash" else ["python", "-c", block.code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{block.code}\n{done.stdout}\n{done.stderr}"
        told.append(done.stdout)
    out = "".join(told)
    for promised in ("come back byte for byte", "steps 20 → 30", "replies closed with their end token", "all identical"):
        assert promised in out
    for written in ("try_more/config.json", "try_chat/loss.png", "try_chat_llama_format/README.md"):
        assert (tmp_path / "weight" / written).is_file()
    assert len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 24


class Parsed(Exception):
    """What a script made of its arguments."""


def settings(script: str, *arguments: str) -> object:
    """The config that ``script`` makes of ``arguments``; the script goes no further. None where it only prints."""
    real = cli.parse

    def parse_only(*args, **keywords):
        raise Parsed(real(*args, **keywords))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "parse", parse_only)
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises((Parsed, SystemExit)) as caught:
            runpy.run_path(str(ROOT / script))["main"]()
    if isinstance(caught.value, SystemExit):
        assert not caught.value.code
        return None
    made = caught.value.args[0]
    return made[1] if isinstance(made, tuple) else made


def commands(page: str) -> list[list[str]]:
    """Every call of one of Etude's scripts, in blocks (those that are not run, too) and in the text."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.code.splitlines()]
    lines += re.findall(r"`(python [^`]+)`", prose(page))
    calls = []
    for line in lines:
        words = shlex.split(line, comments=True)
        words = words[: words.index(">")] if ">" in words else words
        if "python" in words and words[words.index("python") + 1] in SCRIPTS:
            calls.append(words[words.index("python") + 1 :])
    return calls


@pytest.mark.parametrize("page", READMES)
def test_every_command_is_one_that_its_script_accepts(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("preset: base\n", encoding="utf-8")
    found = commands(page)
    assert len(found) > 20 and {script for script, *_ in found} == set(SCRIPTS)
    for script, *arguments in found:
        settings(script, *arguments)


def test_the_walkthrough_s_commands_are_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = "".join(block.code for block in blocks("docs/corpus.md") if block.language == "console").replace("\\\n", " ")
    calls = [shlex.split(line)[2:] for line in shown.splitlines() if line.startswith("$ python ")]
    assert len(calls) > 8
    for script, *arguments in calls:
        assert settings(script, *arguments) is not None


# ---- options ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty workspace, so that default paths are known."""
    monkeypatch.setenv("ETUDE_HOME", str(tmp_path.resolve()))
    return tmp_path.resolve()


def option_names(script: str) -> set[str]:
    """Every option of a script, of all its commands."""
    found: list[type] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse", "parse_commands"):
            patch.setattr(cli, name, lambda classes, *rest, **more: found.append(classes) or sys.exit())
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script))["main"]()
    classes = [cli.named_class(kind) for kind, _ in found[0].values()] if isinstance(found[0], dict) else found
    return {field.name for kind in classes for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_is_mentioned_exists(page):
    known = {name for script in SCRIPTS for name in option_names(script)} | OWN_OPTIONS | FOREIGN_OPTIONS
    mentioned = set(re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", re.sub(r"<!--|-->", "", read(page))))
    assert mentioned <= known, mentioned - known


def shown(default: object, home: Path) -> str | float | bool:
    if default in (None, "", ()):
        return "—"
    default = default[0] if isinstance(default, tuple) else default
    return default.removeprefix(f"{home}{os.sep}").replace(os.sep, "/") if isinstance(default, str) else default


def cell_value(cell: str) -> str | float | bool:
    cell = cell.strip("`")
    try:
        return {"true": True, "false": False}[cell] if cell in ("true", "false") else float(cell.replace(",", ""))
    except ValueError:
        return cell


@pytest.mark.parametrize("page", READMES)
def test_the_defaults_in_the_tables_are_those_of_the_code(page, home):
    marks = re.findall(r"^<!-- options of (.+?) -->$", read(page), re.MULTILINE)
    assert len(marks) == 4
    for mark in marks:
        configs = [settings(script) for script in mark.split(", ")]
        columns = [vars(config) for config in configs]
        # What follows from other settings: the table may leave it to the text.
        filled_in = [{field.name for field in dataclasses.fields(config) if field.default is None} for config in configs]
        for option, *cells, _meaning in table_after(page, f"<!-- options of {mark} -->")[1:]:
            name = option.strip("`").removeprefix("--")
            assert len(cells) == len(columns), option
            for cell, defaults, follows in zip(cells, columns, filled_in, strict=True):
                if cell == "—" and name in follows:
                    continue
                if cell:
                    found, expected = cell_value(cell), shown(defaults[name], home)
                    assert found == expected and isinstance(found, bool) == isinstance(expected, bool), (option, cell, expected)
                else:
                    assert name not in defaults, f"{option} is an option of this script, too"


# ---- facts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", READMES)
def test_the_sizes_of_the_presets(page):
    rows = table_after(page, "<!-- sizes -->")[1:]
    assert [row[0].strip("`") for row in rows] == list(PRESETS)
    for name, shape, heads, parameters, memory, flops in rows:
        config = EtudeConfig(vocab_size=16_384, tie_word_embeddings=False, **PRESETS[name.strip("`")])
        counts = config.num_parameters()
        total, matrices = counts["total"], counts["matmul"] - 16_384 * config.hidden_size
        assert shape == f"{config.hidden_size} × {config.num_hidden_layers}" and int(heads) == config.num_attention_heads
        assert parameters == f"{total:,}" and memory == f"{(16 * total - 4 * matrices) / 1e9:.2f} GB"
        assert flops == f"{config.training_flops_per_token(512) / 1e6:,.0f}"
    assert all(f"{math.log(size):.2f}" in read(page) for size in (16_384, 2_048))


@pytest.mark.parametrize("page", READMES)
def test_the_exit_codes(page):
    found = [int(code) for code, _ in table_after(page, "<!-- exit codes -->")[1:]]
    of_errors = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert set(found) == of_errors | {0, 130} and found == sorted(found)


@pytest.mark.parametrize("page", READMES)
def test_the_examples_of_data_are_read(page):
    from etude.corpus.conversations import check_order, to_messages

    examples = [block.code.splitlines() for block in blocks(page) if block.language == "json"]
    texts, talks = ([json.loads(line) for line in lines] for lines in examples)
    assert all(isinstance(record["text"], str) for record in texts)
    assert len(talks) == 4
    for record in talks:
        check_order(to_messages(record))


def test_the_tests_that_prove_reliability_exist():
    named = set(re.findall(r"`(test_\w+)`", read("docs/reliability.md")))
    real = {
        name for path in (ROOT / "tests").glob("*.py") for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.M)
    }
    assert len(named) > 40 and named <= real, named - real


# ---- two languages, one content ------------------------------------------------------------------------------------------


def test_both_languages_have_the_same_sections_and_tables():
    english, chinese = READMES
    levels = [[heading.split()[0] for heading in headings(page)] for page in READMES]
    assert levels[0] == levels[1]
    shapes = [[line.count("|") for line in prose(page).splitlines() if line.startswith("|")] for page in READMES]
    assert shapes[0] == shapes[1]
    marks = [re.findall(r"<!--.*?-->", read(page)) for page in READMES]
    assert marks[0] == marks[1]
    assert re.findall(r"!\[.*?\]\((.+?)\)", read(english)) == re.findall(r"!\[.*?\]\((.+?)\)", read(chinese))


def test_both_languages_have_the_same_code_but_for_comments():
    def bare(block: Block) -> Block:
        if block.language == "json":
            return block
        return block._replace(code=re.sub(r"(^|\s+)#.*$", "", block.code, flags=re.MULTILINE))

    english, chinese = ([bare(block) for block in blocks(page)] for page in READMES)
    assert english == chinese


@pytest.mark.parametrize("page", READMES)
def test_both_languages_name_the_same_options_and_numbers(page):
    other = READMES[1 - READMES.index(page)]
    for pattern in (r"--[a-z_]+", r"\d[\d,]*\.?\d+"):
        missing = set(re.findall(pattern, prose(page))) - set(re.findall(pattern, prose(other)))
        assert not missing, f"{other} lacks {missing}"


# ---- links and folders --------------------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    titles = (heading.split(" ", 1)[1] for heading in headings(page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if not link.startswith("https://")]
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = os.path.relpath((ROOT / page).parent / name, ROOT) if name else page
        assert (ROOT / target).exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    named = re.findall(r"(?<![\w/.-])((?:etude|train|tool|inference|tests|docs)/[\w/.-]*\w\.(?:py|sh|md|yaml))", read(page))
    for name in named:
        assert (ROOT / name).is_file(), name


def tree(page: str) -> list[tuple[Path, str]]:
    """(path, what is said of it) of each line of the page's picture of the folders."""
    (picture,) = (block.code for block in blocks(page) if block.language == "text" and block.code.startswith("etude/ "))
    found, parents = [], [ROOT]
    for line in picture.splitlines():
        name, _, remark = line.partition("#")
        depth = (len(name) - len(name.lstrip())) // 2
        path = parents[depth] / name.strip()
        parents[depth + 1 :] = [path]
        found.append((path, remark))
    return found


@pytest.mark.parametrize("page", [*READMES, "docs/architecture.md"])
def test_the_picture_of_the_folders_is_the_real_one(page):
    for path, remark in tree(page):
        assert path.exists(), path
        for file in re.findall(r"[\w/]+\.(?:py|sh)\b", remark):
            assert (path / file).is_file(), path / file


def test_the_architecture_names_every_file_of_the_package():
    real = {path for path in (ROOT / "etude").rglob("*.py") if path.name != "__init__.py"} | {ROOT / "etude/__init__.py"}
    assert real == {path for path, _ in tree("docs/architecture.md") if path.suffix == ".py"}
