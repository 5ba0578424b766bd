"""Every input form becomes the same rows, whole and unchanged; what cannot become one is named."""

import csv
import gzip
import json
import math

import pytest
from conftest import TEXTS

from etude.corpus.rows import convert as module
from etude.corpus.rows.convert import ConvertConfig, convert
from etude.errors import DataError, UsageError

CHAT = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2，对吗"}]


def converted(tmp_path, name: str, data: bytes | str, **options) -> list[dict]:
    """The rows that a file of this name and content becomes."""
    source, target = tmp_path / name, tmp_path / "out.jsonl"
    source.write_bytes(data.encode() if isinstance(data, str) else data)
    convert(ConvertConfig(input=(str(source),), output=str(target), force=True, **options))
    return [json.loads(line) for line in target.read_text("utf-8").splitlines()]


def refusal(tmp_path, name: str, data: bytes | str, **options) -> str:
    with pytest.raises(DataError) as error:
        converted(tmp_path, name, data, **options)
    assert not (tmp_path / "out.jsonl").exists() and "\n" not in str(error.value)
    return str(error.value)


def texts(rows: list[dict]) -> list[str]:
    return [row["text"] for row in rows]


# --- text files ------------------------------------------------------------------------------------------------------

TEXT = "\ufeffone \r\n two\n\n\n三\n \n\t\nfour\nfive"


@pytest.mark.parametrize(
    "unit, expected",
    [
        ("line", ["one ", " two", "三", "four", "five"]),
        ("paragraph", ["one \n two", "三", "four\nfive"]),
        ("file", ["one \n two\n\n\n三\n \n\t\nfour\nfive"]),
    ],
)
def test_text_files_by_unit(tmp_path, unit, expected):
    assert texts(converted(tmp_path, "a.txt", TEXT, text_unit=unit)) == expected
    assert texts(converted(tmp_path, "a.txt.gz", gzip.compress(TEXT.encode()), text_unit=unit)) == expected


def test_markdown_is_a_row_a_file_and_folders_are_searched(tmp_path):
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "a.md").write_text("# One\n\nText\n")
    (tmp_path / "notes" / "deep" / "b.txt").write_text("two\nthree\n")
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG")
    target = tmp_path / "out.jsonl"
    assert convert(ConvertConfig(input=(str(tmp_path / "notes"),), output=str(target))) == 3
    assert texts(map(json.loads, target.read_text().splitlines())) == ["# One\n\nText", "two", "three"]
    assert texts(converted(tmp_path, "a.md", "# One\n\nText\n", text_unit="paragraph")) == ["# One", "Text"]


@pytest.mark.parametrize("encoding", ["utf-16", "gb18030"])
def test_another_encoding_is_refused_with_its_offset_and_the_way_out(tmp_path, encoding):
    message = refusal(tmp_path, "a.txt", "ab\n春".encode(encoding))
    offset = 0 if encoding == "utf-16" else 3
    assert f"a.txt:{1 if encoding == 'utf-16' else 2}: not UTF-8 (byte 0x" in message and f"at offset {offset})" in message
    assert "tool/split_text.py" in message
    assert "a.txt:1: holds a zero byte" in refusal(tmp_path, "a.txt", "ab".encode("utf-16-le"))


def test_a_unit_that_memory_should_not_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("etude.corpus.jsonl.MAX_LINE_BYTES", 1000)
    assert "the file is longer than" in refusal(tmp_path, "a.txt", "0123456789\n" * 200, text_unit="file")
    assert len(converted(tmp_path, "a.txt", "0123456789\n" * 200)) == 200


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": CHAT},
        {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT]},
        {"messages": CHAT},
        {"instruction": CHAT[0]["content"], "input": "", "output": CHAT[1]["content"]},
    ],
    ids=["ours", "ShareGPT", "OpenAI", "Alpaca"],
)
def test_every_dialect_becomes_one(tmp_path, record):
    rows = converted(tmp_path, "a.jsonl", json.dumps({**record, "skill": "sums", "score": 0.5}))
    assert rows == [{"conversations": CHAT, "skill": "sums", "score": 0.5}]
    assert converted(tmp_path, "a.jsonl", json.dumps({**record, "skill": "sums"}), drop_keys=True) == [{"conversations": CHAT}]


def test_a_system_turn_and_an_input_are_kept(tmp_path):
    record = {"instruction": "Add", "input": "1 + 1", "output": "2", "system": "Be brief."}
    expected = [("system", "Be brief."), ("user", "Add\n1 + 1"), ("assistant", "2")]
    rows = converted(tmp_path, "a.jsonl", json.dumps(record))
    assert rows == [{"conversations": [{"role": role, "content": content} for role, content in expected]}]


def test_another_key_becomes_text(tmp_path):
    assert converted(tmp_path, "a.jsonl", '{"id": 1, "body": "b"}', text_key="body") == [{"text": "b", "id": 1}]
    both = '{"id": 1, "body": "b", "text": "lost?"}'
    with pytest.raises(DataError, match="has both 'body' and 'text'"):
        converted(tmp_path, "a.jsonl", both, text_key="body")
    assert converted(tmp_path, "a.jsonl", both, text_key="body", drop_keys=True) == [{"text": "b"}]
    assert converted(tmp_path, "a.jsonl", '{"id": 1, "text": "b"}', drop_keys=True) == [{"text": "b"}]


TURNS = [{"role": "user", "content": "q", "name": "bob"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "record, key",
    [
        ({"messages": TURNS}, "name"),
        ({"messages": CHAT, "input": "more"}, "input"),
        ({"instruction": "i", "output": "o", "history": [["a", "b"]]}, "history"),
    ],
)
def test_what_a_conversation_cannot_keep_is_told_and_dropped_only_when_asked(tmp_path, record, key):
    with pytest.raises(DataError, match=rf"has keys that a conversation here does not keep \({key}\)"):
        converted(tmp_path, "a.jsonl", json.dumps(record))
    (row,) = converted(tmp_path, "a.jsonl", json.dumps(record), drop_keys=True)
    assert set(row) == {"conversations"} and set(row["conversations"][0]) == {"role", "content"}


def test_parquet_keeps_keys_that_the_first_row_lacks_or_refuses(tmp_path):
    pytest.importorskip("pyarrow")
    rows = [{"text": "a"}, {"text": "b", "id": 5}, {"conversations": CHAT}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert(ConvertConfig(input=(str(tmp_path / "a.jsonl"),), output=str(tmp_path / "a.parquet")))
    convert(ConvertConfig(input=(str(tmp_path / "a.parquet"),), output=str(tmp_path / "b.jsonl")))
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == rows
    inner = [{"text": "a", "meta": {"a": 1}}] * 1000 + [{"text": "b", "meta": {"a": 1, "b": 2}}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in inner))
    with pytest.raises(DataError, match="row 1,001 does not fit the columns"):
        convert(ConvertConfig(input=(str(tmp_path / "c.jsonl"),), output=str(tmp_path / "c.parquet")))
    assert not (tmp_path / "c.parquet").exists()


def test_rows_that_have_the_form_are_copied_byte_for_byte(tmp_path):
    lines = [rb'{"text" : "caf\u00e9",  "n": 1.0}', json.dumps({"conversations": CHAT}, indent=None).encode()]
    converted(tmp_path, "a.jsonl", b"\n".join(lines))
    assert (tmp_path / "out.jsonl").read_bytes() == b"\n".join(lines) + b"\n"


NUMBERS = (
    '"a": 1.0, "b": 1e5, "c": 1E+05, "d": 123456789012345678901234567890, "e": 0.12345678901234567890123, "f": -0.0, "g": 1e999,'
    ' "h": [1.50, {"i":2.0e-3}], "j": "caf\\u00e9 {k: 1.0}", "l": null'
)


@pytest.mark.parametrize("gap", ["", " ", "\t", " \r "])
def test_numbers_and_all_else_that_stays_keep_their_spelling(tmp_path, gap):
    """Renamed or made conversations, rows are written anew, but not the values that stay."""
    others = NUMBERS.replace('": ', f'"{gap}:{gap}')
    for form, anew in (('"body": "春"', '"text": "春"'), ('"instruction": "q", "output": "r"', "")):
        (row,) = converted(tmp_path, "a.jsonl", f"{gap}{{{gap}{others}{gap},{gap}{form}{gap}}}{gap}", text_key="body")
        line = (tmp_path / "out.jsonl").read_text("utf-8").strip()
        assert next(iter(row)) == ("text" if anew else "conversations") and anew in line
        kept = {name: json.loads(line, parse_float=str, parse_int=str)[name] for name in "abcdefhjl"}
        assert kept == {name: json.loads(f"{{{NUMBERS}}}", parse_float=str, parse_int=str)[name] for name in "abcdefhjl"}
        assert "caf\\u00e9" in line and '"g": 1e999' in line


def test_a_number_that_parquet_would_change_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    source, target = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    for number, message in (
        ("0.12345678901234567890123", "row 2 holds a number that Parquet's 64 bits would change"),
        ("1e999", "row 2 holds a number"),
        ("123456789012345678901234567890", "fit no columns"),
    ):
        source.write_text(f'{{"text": "a", "n": 1.10}}\n{{"text": "b", "n": {number}}}\n')
        with pytest.raises(DataError, match=message):
            convert(ConvertConfig(input=(str(source),), output=str(target)))
        assert not target.exists()


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"body": "b"}', "no key 'text' (found: 'body')"),
        ('{"text": 1}', "'text' is int, not text"),
        ('{"conversations": []}', "the conversation is empty"),
        (json.dumps({"messages": CHAT[::-1]}), "turn 1 is by 'assistant' where 'user' was expected"),
        (json.dumps({"messages": CHAT[:1]}), "there is no assistant reply"),
        (json.dumps({"messages": [CHAT[0], {"role": "assistant", "content": "\ud83d"}]}), "holds half of a character"),
        (json.dumps({"\ud83d": 1, "messages": CHAT}), "cannot be written as JSON"),
    ],
)
def test_what_is_no_row_is_named_and_can_be_set_aside(tmp_path, line, reason):
    data = f'{{"text": "good", "x": 1}}\n{line}\n'
    message = refusal(tmp_path, "a.jsonl", data)
    assert message.startswith(f"{tmp_path}/a.jsonl:2: ") and reason in message
    assert converted(tmp_path, "a.jsonl", data, max_bad=1) == [{"text": "good", "x": 1}]
    rejected = json.loads((tmp_path / "out.jsonl.rejected.jsonl").read_text())
    assert rejected["line"] == line and rejected["place"] == f"{tmp_path}/a.jsonl:2"


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, delimiter", [("csv", ","), ("tsv", "\t")])
def test_tables_come_through_whatever_is_in_their_fields(tmp_path, kind, delimiter):
    rows = [["1", text] for text in (*TEXTS, 'say "hi", now', "two\nlines\n\n", "tab\there", " kept ")]
    with open(tmp_path / "made", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", "story"], *rows])
    found = converted(tmp_path, f"a.{kind}", (tmp_path / "made").read_bytes(), text_key="story")
    assert found == [{"text": text, "id": "1"} for _, text in rows]


def test_a_table_of_instructions_becomes_conversations(tmp_path):
    assert converted(tmp_path, "a.csv", 'instruction,output\n"1 + 1?","2，对吗"\n') == [{"conversations": CHAT}]


@pytest.mark.parametrize(
    "data, message",
    [
        ("id,text\n1,a\n2\n", "a.csv:3: 1 columns, where the first line names 2"),
        ('id,text\n1,"a\nb"\n2,\n', "a.csv:4: 'text' is empty"),
        ('id,text\n1,"never closed\n', "a.csv:2: no CSV (unexpected end of data); check its quotes"),
        ("id,id\n1,2\n", "a.csv:1: a column's name occurs twice"),
        ("id,story\n1,a\n", "a.csv:2: no key 'text' (found: 'id', 'story'); name the right one with --text_key"),
    ],
)
def test_a_bad_table_is_named_by_line(tmp_path, data, message):
    assert message in refusal(tmp_path, "a.csv", data)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_parquet_and_back(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(module, "PARQUET_ROWS", 7)  # more than one batch
    rows = [{"text": text, "n": number, "meta": {"at": "2020-01-01"}} for number, text in enumerate(TEXTS * 5)]
    rows += [{"text": "no number", "meta": {"at": "x"}}]
    source, table, back = tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "back.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert convert(ConvertConfig(input=(str(source),), output=str(table))) == len(rows)
    assert table.read_bytes()[:4] == b"PAR1"
    assert convert(ConvertConfig(input=(str(table),), output=str(back))) == len(rows)
    assert [json.loads(line) for line in back.read_text("utf-8").splitlines()] == rows


def test_conversations_through_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    for source, target in (("a.jsonl", "a.parquet"), ("a.parquet", "b.jsonl")):
        convert(ConvertConfig(input=(str(tmp_path / source),), output=str(tmp_path / target)))
    assert json.loads((tmp_path / "b.jsonl").read_text()) == {"conversations": CHAT}


def test_parquet_that_json_cannot_hold_is_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": ["one", "two"], "score": [1.0, math.nan]})
    parquet.write_table(table, tmp_path / "made.parquet")
    data = (tmp_path / "made.parquet").read_bytes()
    message = refusal(tmp_path, "a.parquet", data)
    assert "a.parquet:2: cannot be written as JSON" in message and "--drop_keys" in message
    assert converted(tmp_path, "a.parquet", data, drop_keys=True) == [{"text": "one"}, {"text": "two"}]
    (tmp_path / "out.jsonl").unlink()
    for damaged in (data[:50], b"no parquet", data[:10] + bytes(20) + data[30:]):
        assert "a.parquet: no Parquet, or a damaged file" in refusal(tmp_path, "a.parquet", damaged)


def test_a_column_that_comes_late_is_refused_rather_than_lost(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(module, "PARQUET_ROWS", 2)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c", "late": 1}\n')
    with pytest.raises(DataError, match="has the key 'late'"):
        convert(ConvertConfig(input=(str(tmp_path / "a.jsonl"),), output=str(tmp_path / "a.parquet")))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_without_its_package_parquet_is_a_usage_error(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        converted(tmp_path, "a.parquet", b"PAR1")


# --- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, data", [("a.jsonl", b"\n \n"), ("a.txt", b"\n"), ("a.csv", b"text\n"), ("a.md", b"")])
def test_an_input_without_a_row_is_an_error(tmp_path, name, data):
    assert f"{name}: no row in it" in refusal(tmp_path, name, data)


def test_outputs_of_another_kind_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=r"must end in \.jsonl or \.parquet"):
        convert(ConvertConfig(input=(str(tmp_path / "a.txt"),), output=str(tmp_path / "out.csv")))
