"""The corpus workbench as a person uses it: sub-commands, pipes, problems listed with their places, figures, rows shown."""

import importlib
import json
import os
import random
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TEXTS, write_jsonl

from etude import cli
from etude.corpus.rows import convert, quality, show, survey
from etude.corpus.rows.convert import ConvertConfig
from etude.corpus.rows.quality import FilterConfig
from etude.corpus.rows.show import ShowConfig
from etude.corpus.rows.survey import CheckConfig, StatsConfig
from etude.errors import DataError, UsageError

SCRIPT = [sys.executable, str(ROOT / "tool/process_jsonl.py")]
CHAT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
COMMANDS = ("check", "stats", "convert", "filter", "dedup", "shuffle", "split", "merge", "sample", "show")


def execute(*arguments: object, **keywords) -> subprocess.CompletedProcess:
    keywords = {"timeout": 120, "stdin": None if "input" in keywords else subprocess.DEVNULL, **keywords}
    if "input" in keywords:
        del keywords["stdin"]
    return subprocess.run([*SCRIPT, *map(str, arguments)], capture_output=True, **keywords)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def problems(path: Path, **options) -> list[dict]:
    """What check says of a file, by its report."""
    report = path.parent / "problems.jsonl"
    config = CheckConfig(input=(str(path),), output=str(report), force=True, **{"workers": 1, **options})
    try:
        survey.check(config)
    except DataError as error:
        assert error.exit_code == 65 and "\n" not in str(error)
        found = [json.loads(line) for line in report.read_text("utf-8").splitlines()]
        assert found and str(error).startswith(f"{len(found):,} problems in ")
        return found
    assert report.read_bytes() == b""
    return []


# --- the script ------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands_and_each_explains_its_options():
    done = execute("--help", text=True)
    assert done.returncode == 0 and all(f"\n  {name} " in done.stdout for name in COMMANDS)
    for name in ("filter", "show"):
        done = execute(name, "--help", text=True)
        assert done.returncode == 0 and "--input" in done.stdout and "--max_bad" in done.stdout


def test_help_loads_nothing_heavy():
    code = f"""
import runpy, sys
sys.argv = [{SCRIPT[1]!r}, "filter", "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
heavy = {{"torch", "numpy", "tokenizers", "pyarrow", "py3langid", "etude.corpus.rows.dedup"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, code, piece",
    [
        (["chekc"], 2, "did you mean check?"),
        (["filter", "--min_word", "1"], 2, "did you mean --min_words?"),
        (["check"], 2, "name an --input"),
        (["check", "--input", "missing.jsonl"], 65, "missing.jsonl: no such file"),
        (["filter", "--input", SCRIPT[1], "--min_chars", "1", "--output", "-"], 65, "expected .jsonl or .txt"),
        (["show", "--input", "-", "--rows", "0"], 2, "rows (0) must be at least 1"),
    ],
)
def test_mistakes_are_one_line_with_the_right_code(tmp_path, arguments, code, piece):
    done = execute(*arguments, cwd=tmp_path, text=True)
    assert done.returncode == code and piece in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and os.listdir(tmp_path) == []


def test_commands_work_in_a_pipe(text_file):
    """Standard output carries records and nothing else; a pipe's end in the middle is no error."""
    command = f'"{SCRIPT[0]}" "{SCRIPT[1]}"'
    line = f'set -o pipefail; {command} filter --input "{text_file}" --output - --min_chars 60 --workers 1 | '
    done = subprocess.run(["bash", "-c", f"{line}{command} check --input - --workers 1"], capture_output=True, text=True)
    kept = sum(len(json.loads(row)["text"]) >= 60 for row in text_file.read_text("utf-8").splitlines())
    assert done.returncode == 0 and f"kept      {kept} rows" in done.stderr and 0 < kept < 120, done.stderr
    assert re.search(rf"^rows +{kept}$", done.stdout, re.MULTILINE)
    done = subprocess.run(["bash", "-c", f"{line}{command} show --input - --rows 1"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "── -:1" in done.stdout


ROW_JOBS = {
    "check": ["--workers", "1"],
    "stats": ["--workers", "1", "--max_bad", "5"],
    "convert": ["--output", "-", "--max_bad", "5"],
    "filter": ["--output", "-", "--min_chars", "1", "--workers", "1", "--max_bad", "5"],
    "dedup": ["--output", "-", "--workers", "1", "--max_bad", "5"],
    "shuffle": ["--output", "-", "--max_bad", "5"],
    "split": ["--output", "parts", "--rows", "5", "--max_bad", "5"],
    "merge": ["--output", "-", "--max_bad", "5"],
    "sample": ["--output", "-", "--rows", "1", "--max_bad", "5"],
    "show": ["--max_bad", "5"],
}
SPLIT_SHARES = ("split", ["--output", "a.jsonl", "b.jsonl", "--ratios", "1,1", "--workers", "1", "--max_bad", "5"])
SPLIT_NEAR = ("split", [*SPLIT_SHARES[1], "--near"])
SAMPLE_RATIO = ("sample", ["--output", "-", "--ratio", "1", "--max_bad", "5"])


def called(command: str, options: list[str]) -> None:
    """The command in this process, as the script calls it."""
    name, config = cli.parse_commands(COMMANDS_OF_SCRIPT, "", [command, *options])
    getattr(importlib.import_module(type(config).__module__), name)(config)


COMMANDS_OF_SCRIPT = runpy.run_path(SCRIPT[1])["COMMANDS"]


@pytest.mark.parametrize("command, options", [*ROW_JOBS.items(), SPLIT_SHARES, SPLIT_NEAR, SAMPLE_RATIO])
def test_an_input_without_a_good_row_is_a_mistake_to_every_tool(tmp_path, monkeypatch, command, options):
    if "--near" in options:
        pytest.importorskip("rensa")
    monkeypatch.chdir(tmp_path)
    empty, bad = write(tmp_path / "empty.jsonl", b"\n"), write(tmp_path / "bad.jsonl", b"{\n")
    with pytest.raises(DataError, match=r"^\S*empty.jsonl: no row in it; check the input$"):
        called(command, ["--input", str(empty), *options])
    with pytest.raises(DataError, match="problems in 1 rows" if command == "check" else r"bad.jsonl:1: .*no row of the input"):
        called(command, ["--input", *([] if command == "merge" else [str(empty)]), str(bad), *options])
    if command in ("stats", "convert", "filter", "dedup") or "--ratios" in options:  # those that look for a text
        bad.write_text('{"other": 1}\n')
        with pytest.raises(DataError, match=r"bad.jsonl:1: no key 'text' .*no row of the input is good \(1 bad\)"):
            called(command, ["--input", str(bad), *options])
    assert sorted(os.listdir(tmp_path)) == ["bad.jsonl", "empty.jsonl"]


@pytest.mark.parametrize("command, options", [*ROW_JOBS.items(), SPLIT_NEAR])
def test_negative_counts_are_refused_by_every_tool(command, options):
    for name in ("max_bad", "workers"):
        if f"--{name}" in options:
            changed = [*options, f"--{name}", "-1"]
            with pytest.raises(UsageError, match=rf"{name} \(-1\) must be at least 0"):
                called(command, ["--input", "a.jsonl", *changed])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["check", "stats", "show", "merge"])
def test_what_cannot_be_told_is_an_error(text_file, command):
    """Python, left alone, would print two lines of its own and end with 120."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        arguments = [*SCRIPT, command, "--input", str(text_file), *ROW_JOBS[command]]
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment)
    assert done.returncode == 74 and done.stderr.startswith("error: the disk: No space left"), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_killed_filter_leaves_the_whole_output_or_none(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, ({"text": f"{number} {TEXTS[number % 6]}"} for number in range(60_000)))
    options = ["--input", source, "--output", target, "--min_words", "17", "--workers", "2"]
    assert execute("filter", *options).returncode == 0
    whole = target.read_bytes()
    assert 0 < len(whole) < source.stat().st_size
    for tenths in range(1, 9, 2):
        target.unlink(missing_ok=True)
        process = subprocess.Popen([*SCRIPT, "filter", *map(str, options)], stderr=subprocess.DEVNULL)
        time.sleep(tenths / 10)
        process.kill()
        process.wait()
        assert not target.exists() or target.read_bytes() == whole


# --- check -----------------------------------------------------------------------------------------------------------

BAD = {
    b'{"text": "cut': "not valid JSON",
    b'{"text": "a", "text": "b"}': "a key occurs twice",
    b'["a"]': "expected a JSON object, found list",
    b'{"text": "\xb4\xba"}': "not UTF-8 (byte 0xb4 at offset 28)",
    b'{"body": "a"}': "neither text nor conversation (keys: 'body'); name one with --text_key",
    b'{"text": 5}': "'text' is int, not text",
    b'{"text": " "}': "'text' is empty",
    rb'{"text": "\ud83d"}': "holds half of a character (U+D83D)",
    b'{"messages": []}': "the conversation is empty",
    b'{"text": "a", "messages": []}': "the conversation is empty",
    b'{"messages": [{"role": "robot", "content": "a"}]}': "turn 1: unknown role 'robot'",
    json.dumps({"messages": [*CHAT, *CHAT[1:]]}).encode(): "turn 3 is by 'assistant' where 'user' was expected",
    json.dumps({"messages": CHAT[:1]}).encode(): "there is no assistant reply",
    json.dumps({"conversations": [CHAT[0], {"role": "assistant", "content": "\ud83d"}]}).encode(): "holds half of a character",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_check_names_each_problem_with_its_line(tmp_path, line):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line + b"\n" + json.dumps({"messages": CHAT}).encode())
    (problem,) = problems(path)
    assert problem["place"] == f"{path}:3" and BAD[line] in problem["reason"]


def test_check_lists_all_and_counts_by_kind(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", b"\n".join([b'{"text": "good"}', *BAD] * 3))
    capsys.readouterr()
    found = problems(path, show=4)
    out, err = capsys.readouterr()
    assert err == ""  # what it finds is what it is for
    assert len(found) == 3 * len(BAD)
    assert [row["place"] for row in found] == [f"{path}:{n}" for n in range(1, 46) if n % 15 != 1]
    assert sum(line.startswith(str(path)) for line in out.splitlines()) == 4
    assert re.search(r"^problem +6  holds half of a character$", out, re.MULTILINE)
    assert re.search(r"^problem +3  turn N is by 'assistant' where 'user' was expected$", out, re.MULTILINE)
    assert re.search(r"^problem +3  not UTF-8$", out, re.MULTILINE)
    assert problems(path, workers=2) == found


def test_check_goes_on_after_a_file_that_breaks_off(tmp_path, monkeypatch):
    monkeypatch.setattr("etude.corpus.jsonl.MAX_LINE_BYTES", 1000)
    write(tmp_path / "a.jsonl", b'{"text": "a"}\n' + b"x" * 1001)
    write(tmp_path / "b.jsonl", b'{"text": ""}\n')
    write(tmp_path / "c.jsonl.gz", b"no archive")
    found = problems(tmp_path / "*.json*")
    assert [row["place"] for row in found] == [f"{tmp_path}/{name}" for name in ("a.jsonl:2", "b.jsonl:1", "c.jsonl.gz:1")]
    assert "the line is longer than 0 MiB" in found[0]["reason"] and "damaged or cut short" in found[2]["reason"]


def test_a_byte_order_mark_is_accepted_and_other_encodings_are_named(tmp_path):
    line = '{"text": "春"}\n'
    assert problems(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line.encode())) == []
    for encoding, offset in (("utf-16", 0), ("gb18030", 10)):
        (problem, *_) = problems(write(tmp_path / "a.jsonl", line.encode(encoding)))
        assert problem["place"] == f"{tmp_path}/a.jsonl:1" and f"at offset {offset})" in problem["reason"]


def test_no_row_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\n \n")
    for job, config in ((survey.check, CheckConfig), (survey.stats, StatsConfig), (show.show, ShowConfig)):
        with pytest.raises(DataError, match=r"a.jsonl: no row in it; check the input"):
            job(config(input=(str(path),)))


def mutated(line: bytes, source: random.Random) -> bytes:
    """``line`` with an accident or three; it stays one line."""
    snippets = [
        b"\x00",
        b"\xff",
        rb"\ud800",
        b"NaN",
        b"1e999",
        b"[" * 3000,
        b'"text": 1',
        b'"text": null,',
        b'"',
        b"{",
        b"}",
        b",",
        b" ",
    ]
    for _ in range(source.randrange(1, 4)):
        at, length = source.randrange(len(line) + 1), source.randrange(4)
        match source.randrange(4):
            case 0:
                line = line[:at] + line[at + length :]
            case 1:
                line = line[:at] + source.choice(snippets) + line[at:]
            case 2:
                line = line[:at] + bytes(source.randrange(1, 256) for _ in range(length)) + line[at + length :]
            case 3:
                line = line[:at] + line[at : at + 9] * 2 + line[at:]
    return line.replace(b"\n", b"").replace(b"\r", b"")


def test_of_ten_thousand_mutated_lines_none_is_lost(tmp_path):
    """What check calls good, filter keeps and convert converts; the rest is rejected with its place, and all adds up."""
    source = random.Random(26)
    good = [json.dumps({"text": text, "n": number}, ensure_ascii=False).encode() for number, text in enumerate(TEXTS)]
    good += [json.dumps({key: CHAT}).encode() for key in ("conversations", "messages")]
    lines = [mutated(source.choice(good), source) for _ in range(10_000)]
    path, kept = write(tmp_path / "in.jsonl", b"\n".join(lines) + b"\n"), tmp_path / "out.jsonl"
    total = sum(bool(line.strip()) for line in lines)
    bad = problems(path)
    bad_places = [row["place"] for row in bad]
    assert 1000 < len(set(bad_places)) == len(bad) < 9000

    for job, config in ((quality.filter, FilterConfig), (convert.convert, ConvertConfig)):
        options = {"input": (str(path),), "output": str(kept), "force": True}
        options |= {"min_chars": 1, "workers": 1} if config is FilterConfig else {}
        with pytest.raises(DataError, match=r"in.jsonl:\d+: ") as error:
            job(config(**options))
        assert error.value.exit_code == 65 and not kept.exists()
        job(config(**options, max_bad=total))
        rejected = [json.loads(line) for line in Path(f"{kept}.rejected.jsonl").read_text("utf-8").splitlines()]
        survivors = kept.read_bytes().splitlines()
        assert len(survivors) + len(rejected) == total
        places = [row["place"] for row in rejected]
        assert len(set(places)) == len(places) and all(re.fullmatch(rf"{path}:\d+", place) for place in places)
        if config is FilterConfig:
            numbers = {int(place.rpartition(":")[2]) for place in places}
            assert survivors == [line for number, line in enumerate(lines, 1) if line.strip() and number not in numbers]
            assert set(places) <= set(bad_places)  # filter takes conversations in any order
        kept.unlink()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the unit of ru_maxrss")
@pytest.mark.parametrize("command", ["check", "filter"])
def test_a_line_of_200_mb_is_refused_in_bounded_memory(tmp_path, command):
    options = ["--output", tmp_path / "out.jsonl", "--min_chars", "1"] if command == "filter" else []
    peaks = []
    for size in (10, 200 * 10**6):
        with open(tmp_path / "a.jsonl", "wb") as file:
            file.truncate(size)
        process = subprocess.Popen(
            [*SCRIPT, command, "--input", tmp_path / "a.jsonl", "--workers", "1", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        err = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        peaks.append(usage.ru_maxrss / 1024)  # MiB
        assert process.returncode == 65 and "a.jsonl:1: " in err, err
    assert "the line is longer than 64 MiB" in err and not (tmp_path / "out.jsonl").exists()
    assert peaks[1] - peaks[0] < 150


# --- stats -----------------------------------------------------------------------------------------------------------


def test_stats_are_what_plain_counting_finds(tmp_path, capsys):
    texts = [*TEXTS, *TEXTS[:2], "x" * 100]
    chats = [{"conversations": CHAT}, {"messages": CHAT * 2}, {"instruction": "1 + 1?", "output": "2"}]
    chats += [{"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}]
    path, report = write_jsonl(tmp_path / "a.jsonl", [*({"text": text} for text in texts), *chats]), tmp_path / "found.json"
    whole = survey.stats(StatsConfig(input=(str(path),), output=str(report), workers=1))
    said = [*texts, "1 + 1?\n2", "1 + 1?\n2\n1 + 1?\n2", "1 + 1?\n2", "1 + 1?\n2"]
    assert whole.totals == {
        "rows": 13, "bytes of rows": path.stat().st_size, "bytes of text": sum(len(text.encode()) for text in said),
        "characters": sum(map(len, said)), "left out, bad": 0, "exact repeats": 4,
    }  # fmt: skip
    found = json.loads(report.read_text("utf-8"))
    assert found["dialects"] == {
        "text": 9, "conversations: role, content": 1, "messages: role, content": 1, "instruction, output": 1,
        "conversations: from, value": 1,
    }  # fmt: skip
    assert found["turns"] == {"2": 3, "4": 1} and sum(found["characters of a row"].values()) == 13
    assert found["characters of a row"]["below 16"] == 3
    assert found["scripts"]["simplified"] == 2 and sum(found["scripts"].values()) == 13
    out = capsys.readouterr().out
    assert "█" in out and re.search(r"^rows +13$", out, re.MULTILINE)


def test_stats_in_parallel_are_the_same(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ({"text": f"{number % 700} {TEXTS[number % 6]}"} for number in range(5000)))
    one, two = (survey.stats(StatsConfig(input=(str(path),), workers=workers)) for workers in (1, 2))
    assert one == two and one.totals["exact repeats"] == 5000 - len({(n % 700, n % 6) for n in range(5000)})


def test_stats_of_bad_rows_need_leave(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": 1}\nbad\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: 'text' is int, not text; .*--max_bad N"):
        survey.stats(StatsConfig(input=(str(path),), workers=1))
    assert survey.stats(StatsConfig(input=(str(path),), workers=1, max_bad=2)).totals["left out, bad"] == 2


def test_tokens_and_languages_are_counted(text_file, tokenizer, tokenizer_folder, tmp_path):
    pytest.importorskip("py3langid")
    report = tmp_path / "found.json"
    done = execute("stats", "--input", text_file, "--tokenizer", tokenizer_folder, "--languages", "--output", report, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    rows = [json.loads(line)["text"] for line in text_file.read_text("utf-8").splitlines()]
    assert found["tokens"] == sum(map(len, tokenizer.encode_batch(rows))) and "bytes a token" in done.stdout
    assert sum(found["languages"].values()) == 120 and found["languages"]["zh"] >= 40


# --- show ------------------------------------------------------------------------------------------------------------


def shown(capsys, path, *tools, **options) -> str:
    show.show(ShowConfig(input=(str(path),), **options), *tools)
    return capsys.readouterr().out


def test_rows_are_shown_wrapped_and_harmless(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    rows = [
        {"text": "春眠不觉晓处处闻啼鸟夜来"},
        {"text": "some words\n\nthat go on and on", "id": 7},
        {"text": "\x1b[31mred\x07"},
    ]
    out = shown(capsys, write_jsonl(tmp_path / "a.jsonl", rows))
    assert "\n春眠不觉晓处处闻啼鸟\n夜来\n" in out and "\nsome words\n\nthat go on and on\n{'id': 7}\n" in out
    assert "\x1b" not in out and "\\x1b[31mred\\x07" in out


def test_start_seed_and_max_chars_choose(text_file, capsys):
    places = lambda out: [int(number) for number in re.findall(r"^── .*:(\d+)$", out, re.MULTILINE)]  # noqa: E731
    assert places(shown(capsys, text_file)) == [1, 2, 3]
    assert places(shown(capsys, text_file, start=119, rows=5)) == [119, 120]
    drawn = [places(shown(capsys, text_file, seed=seed, rows=4)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and all(len(set(one)) == 4 and one == sorted(one) for one in drawn)
    assert "… (" in shown(capsys, text_file, max_chars=5)
    with pytest.raises(DataError, match="there is no row 121"):
        shown(capsys, text_file, start=121)


def test_every_row_is_as_likely_to_be_drawn(text_file):
    from etude.corpus.jsonl import Rejects
    from etude.corpus.rows.documents import rows_of

    rows = list(rows_of([text_file], Rejects()))[:10]
    counts = dict.fromkeys((row.place for row in rows), 0)
    for seed in range(2000):
        for row in show.chosen(iter(rows), 3, 1, seed):
            counts[row.place] += 1
    assert all(510 < count < 690 for count in counts.values()), counts  # 600 are expected, 4.4 deviations either way


def test_conversations_are_shown_by_turns_and_as_tokens_with_their_mask(tmp_path, tokenizer_folder, tokenizer):
    from etude.chat import ChatFormat

    path = write_jsonl(tmp_path / "a.jsonl", [{"conversations": CHAT, "skill": "sums"}])
    done = execute("show", "--input", path, text=True)
    assert done.returncode == 0 and "user:\n  1 + 1?\nassistant:\n  2\n{'skill': 'sums'}" in done.stdout, done.stderr
    done = execute("show", "--input", path, "--tokenizer", tokenizer_folder, text=True)
    assert done.returncode == 0, done.stderr
    encoded = ChatFormat(tokenizer).encode(CHAT)
    table = re.findall(r"^ *(\d+) +(\d+)  (yes|-) +'(.*)'$", done.stdout, re.MULTILINE)
    assert [int(row[1]) for row in table] == encoded.ids and [row[2] == "yes" for row in table] == encoded.mask
    assert f"{len(encoded.ids)} tokens, {sum(encoded.mask)} learnt" in done.stdout
    assert "\x1b" not in done.stdout and any("im_end" in row[3] for row in table if row[2] == "yes")


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert show.painted("a", "user") == "a"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert show.painted("a", "user") == "\x1b[36ma\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert show.painted("a", "user") == "a"


def test_configs_refuse_what_cannot_work():
    for config, options in (
        (CheckConfig, {"show": -1}),
        (StatsConfig, {"max_bad": -1}),
        (ShowConfig, {"rows": 0}),
        (ConvertConfig, {"max_bad": -1}),
    ):
        with pytest.raises(UsageError, match="at least"):
            config(**options)
