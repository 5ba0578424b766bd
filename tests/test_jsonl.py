"""Records in and out: what is good comes through unchanged, what is bad is named by file and line, and all of it is counted."""

import bz2
import gzip
import json
import lzma
import os
import random
import sys
import tracemalloc

import pytest
from conftest import write_jsonl

from etude import cli
from etude.corpus import jsonl
from etude.corpus.inputs import find_files
from etude.corpus.jsonl import Rejects, parse_object, read_lines, read_records, read_texts, write_records
from etude.errors import DataError, UsageError

PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def texts_of(path, max_bad: int = 0, **options) -> list[str]:
    return [text for _, text in read_texts([path], Rejects(max_bad), **options)]


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        texts_of(path, **options)
    assert error.value.exit_code == 65
    assert "\n" not in str(error.value)
    return str(error.value)


# --- lines -----------------------------------------------------------------------------------------------------------


def test_lines_are_numbered_and_unchanged(tmp_path):
    data = "first\r\n\n  春 \u2028\x0b\x85 same line \nNULs\x00 too\rstill here\n\ufeffnot at the start\nlast".encode()
    assert list(read_lines(write(tmp_path / "a.txt", data))) == [
        (1, "first"), (2, ""), (3, "  春 \u2028\x0b\x85 same line "), (4, "NULs\x00 too\rstill here"),
        (5, "\ufeffnot at the start"), (6, "last"),
    ]  # fmt: skip
    assert list(read_lines(write(tmp_path / "empty.txt", b""))) == []
    assert list(read_lines(write(tmp_path / "end.txt", b"one\n"))) == [(1, "one")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_a_bom_and_windows_line_ends_are_no_part_of_the_text(tmp_path, end):
    data = b"\xef\xbb\xbf" + end.join([b'{"text": "one"}', b'{"text": "two"}', b""])
    assert texts_of(write(tmp_path / "a.jsonl", data)) == ["one", "two"]
    assert texts_of(write(tmp_path / "a.txt", b"\xef\xbb\xbfone" + end + b"two" + end)) == ["one", "two"]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
@pytest.mark.parametrize("before", ["", "春眠\n", "\n\r\nabc 😀\r\nxyz"])
def test_a_byte_that_is_not_utf_8_is_named_by_line_and_offset(tmp_path, bom, before):
    data = bom + before.encode() + b"ab\xff\xfe cd\nmore\n"
    line, offset = data[: data.index(0xFF)].count(b"\n") + 1, data.index(0xFF)
    path = write(tmp_path / "a.jsonl", data)
    with pytest.raises(
        DataError, match=rf"{path}:{line}: not UTF-8 \(byte 0xff at offset {offset}\); convert the file to UTF-8 first"
    ):
        list(read_lines(path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "gb18030", "big5", "shift_jis", "latin-1"])
def test_other_encodings_are_refused(tmp_path, encoding):
    text = '{"text": "naïve"}\n' if encoding == "latin-1" else '{"text": "春"}\n'
    assert "a.jsonl:1: " in refusal(write(tmp_path / "a.jsonl", text.encode(encoding)))


@pytest.mark.parametrize("unit", ["line", "file"])
def test_utf_16_is_told_by_its_zero_bytes_where_every_byte_is_ascii(tmp_path, unit):
    path = write(tmp_path / "a.txt", "plain words\n".encode("utf-16-le"))
    assert "a.txt:1: holds a zero byte, as UTF-16 does; convert the file to UTF-8 first" in refusal(path, text_unit=unit)
    assert "a.jsonl:1: not valid JSON" in refusal(write(tmp_path / "a.jsonl", '{"text": "a"}'.encode("utf-16-le")))


def test_a_character_cut_at_the_end_of_the_file_is_an_error(tmp_path):
    assert "a.txt:2: not UTF-8 (byte 0xe6 at offset 6)" in refusal(write(tmp_path / "a.txt", "一\nab春".encode()[:-1]))


def test_an_endless_line_is_refused_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 2**20)
    just, over = b"x" * 2**20 + b"\n", b"x" * (2**20 + 1)
    assert [len(line) for _, line in read_lines(write(tmp_path / "just.txt", b"x" * (2**20 - 1) + b"\nx"))] == [2**20 - 1, 1]
    assert "over.txt:2: the line is longer than 1 MiB; split it first" in refusal(write(tmp_path / "over.txt", b"one\n" + over))
    assert "just.txt:1: the line is longer" in refusal(write(tmp_path / "just.txt", just))
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(2**36)  # sparse: 64 GiB of zeros in one line
    bomb = write(tmp_path / "bomb.txt.bz2", bz2.compress(bytes(2**24)))
    tracemalloc.start()
    assert "huge.txt:1: the line is longer" in refusal(tmp_path / "huge.txt")
    assert "bomb.txt.bz2:1: the line is longer" in refusal(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


# --- compressed files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_are_read_whole(tmp_path, suffix):
    one, two = ("".join(f'{{"text": "{name} {number} 春"}}\n' for number in range(500)).encode() for name in ("one", "two"))
    path = write(tmp_path / f"a.jsonl{suffix}", PACKERS[suffix](one) + PACKERS[suffix](two))  # two streams, as pbzip2 writes
    assert texts_of(path) == [f"{name} {number} 春" for name in ("one", "two") for number in range(500)]
    assert texts_of(write(tmp_path / f"A.TXT{suffix.upper()}", PACKERS[suffix]("一\n二".encode()))) == ["一", "二"]


def damaged_everywhere(packed: bytes) -> list[bytes]:
    cuts = [packed[: len(packed) * share // 8] for share in range(1, 8)] + [packed[:-1]]
    flips = [
        packed[:at] + bytes([packed[at] ^ 0x55]) + packed[at + 1 :] for at in range(20, len(packed) - 20, len(packed) // 12)
    ]
    return [*cuts, *flips]


@pytest.mark.parametrize("suffix", PACKERS)
def test_damaged_archives_are_errors_and_never_a_shorter_text(tmp_path, suffix):
    whole = [f"line {number} {random.Random(number).random()}" for number in range(3000)]
    packed = PACKERS[suffix]("".join(json.dumps({"text": text}) + "\n" for text in whole).encode())
    path = tmp_path / f"a.jsonl{suffix}"
    for data in damaged_everywhere(packed):
        message = refusal(write(path, data), max_bad=3000)
        assert message.startswith(f"{path}:")
    assert "the compressed file is damaged or cut short" in refusal(write(path, packed[: len(packed) // 2]))
    assert "the compressed file is damaged or cut short" in refusal(write(path, b"this is no archive"))


def test_zstandard_files_are_read_whole_or_refused(tmp_path):
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    zstd = pytest.importorskip(name)
    data = "".join(f'{{"text": "{number} 春 {random.Random(number).random()}"}}\n' for number in range(3000)).encode()
    packed = zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})  # as the command line tool does
    assert len(texts_of(write(tmp_path / "a.jsonl.zst", packed + packed))) == 6000
    for data in damaged_everywhere(packed):
        assert "a.jsonl.zst:" in refusal(write(tmp_path / "a.jsonl.zst", data), max_bad=3000)


def test_without_its_package_a_zstandard_file_is_a_usage_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(UsageError, match=r"a.jsonl.zst: .zst needs a package: pip install backports.zstd"):
        texts_of(write(tmp_path / "a.jsonl.zst", b"("))


# --- records ---------------------------------------------------------------------------------------------------------

BAD_LINES = {
    '{"text": "cut': "not valid JSON",
    '{"text": "a"} {"text": "b"}': "not valid JSON",
    "{'text': 'a'}": "not valid JSON",
    '{"text": "a\x00b"}': "not valid JSON",
    '{"text": "tab\tinside"}': "not valid JSON",
    '\ufeff{"text": "a"}': "not valid JSON",
    '{"text": "a", "score": NaN}': "NaN is no JSON",
    '{"text": "a", "score": [1, -Infinity]}': "-Infinity is no JSON",
    '{"text": "a", "text": "b"}': "a key occurs twice",
    '{"text": "a", "meta": {"x": 1, "x": 2}}': "a key occurs twice",
    '{"text": ' + "[" * 100_000: "nested too deeply",
    '{"text": ' + "9" * 5000 + "}": "not valid JSON",
    '["text"]': "expected a JSON object, found list",
    '"text"': "expected a JSON object, found str",
    "null": "expected a JSON object, found NoneType",
    "17": "expected a JSON object, found int",
    '{"content": "a", "body": 1}': "no key 'text' (found: 'content', 'body'); name the right one with --text_key",
    '{"a\\nb": 1}': "no key 'text' (found: 'a\\nb')",
    "{}": "no key 'text' (found: none)",
    '{"text": null}': "no key 'text'",
    '{"text": 5}': "'text' is int, not text",
    '{"text": ["a"]}': "'text' is list, not text",
    '{"text": ""}': "'text' is empty",
    '{"text": " \\n\\u3000"}': "'text' is empty",
    '{"text": "a \\ud83d b"}': "holds half of a character (U+D83D), which cannot be stored",
    '{"text": "\\ude0a\\ud83d"}': "holds half of a character (U+DE0A)",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_record_is_named_with_its_place_and_reason(tmp_path, line):
    path = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n\n{line}\n{{"text": "also good"}}\n'.encode())
    message = refusal(path)
    assert message.startswith(f"{path}:3: ") and BAD_LINES[line] in message
    assert message.endswith("; mend the record, or let some go with --max_bad N")
    assert len(message) < 500
    rejects = Rejects(max_bad=1)
    assert [text for _, text in read_texts([path], rejects)] == ["good", "also good"]
    assert len(rejects.reasons) == 1 and rejects.reasons[0].startswith(f"{path}:3: ")


def test_good_records_come_through_unchanged(tmp_path):
    records = [{"text": text} for text in ("春", "a\nb\t\x00\u2028", "😀", "e\u0301", " kept ", "\ufeff")]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    assert texts_of(path) == [record["text"] for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))  # escapes, surrogate pairs among them
    assert texts_of(path) == [record["text"] for record in records]
    assert texts_of(write(path, b'\n \t\n{"text":"a"}\r\n\r\n'), text_key="text") == ["a"]
    assert texts_of(write(path, b'{"text": 1, "body": "b"}'), text_key="body") == ["b"]
    assert [place for place, _ in read_records(write(path, b'\n{"a": 1}\n\n{"b": 2}'), Rejects())] == [f"{path}:2", f"{path}:4"]


def test_rejects_end_the_job_one_above_the_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + b"bad\n" * 4)
    with pytest.raises(DataError, match=r"a.jsonl:4: .* \(more than the 2 that --max_bad allows\); mend the record"):
        texts_of(path, max_bad=2)
    rejects = Rejects(max_bad=8)
    assert len(list(read_texts([path, path], rejects))) == 2
    summary = rejects.summary()
    assert (
        summary.startswith("skipped 8 bad records (--max_bad 8):")
        and f"{path}:2" in summary
        and summary.endswith("… and 3 more")
    )
    assert Rejects(max_bad=8).summary() == ""


@pytest.mark.parametrize("unit, expected", [("line", ["one ", " two"]), ("file", ["one \n\n two\n\t"])])
def test_text_files_are_documents_by_line_or_by_file(tmp_path, unit, expected):
    path = write(tmp_path / "a.txt", b"one \r\n\n two\n\t\n")
    assert texts_of(path, text_unit=unit) == expected


def test_an_empty_file_as_a_document_is_rejected(tmp_path):
    path = write(tmp_path / "a.txt", b" \n\n")
    assert "a.txt:1: the file is empty" in refusal(path, text_unit="file")
    assert texts_of(path, max_bad=1, text_unit="file") == texts_of(path, text_unit="line") == []


def mutated(line: str, source: random.Random) -> str:
    """``line`` with one to three small accidents; it stays one line."""
    snippets = ["\x00", "\\ud800", "\\udc00\\ud800", "\\u00", "\u2028", "\r", "\ufeff", "é", " ", '"', "\\", "{", "}", ",", ":",
                "[" * 2000, "NaN", "Infinity", "1e999", "null", "text", '"text": 1', '"text": null']  # fmt: skip
    for _ in range(source.randrange(1, 4)):
        at, length = source.randrange(len(line) + 1), source.randrange(4)
        action = source.randrange(5)
        if action == 0:
            line = line[:at] + line[at + length :]
        elif action == 1:
            line = line[:at] + source.choice(snippets) + line[at:]
        elif action == 2:
            line = line[:at] + source.choice(snippets) + line[at + length :]
        elif action == 3:
            line = line[:at] + line[at:][::-1]
        else:
            line = line[:at] + chr(source.choice((source.randrange(32), source.randrange(0x110000)))) + line[at + 1 :]
    return "".join("?" if 0xD800 <= ord(character) < 0xE000 or character == "\n" else character for character in line)


def test_mutated_lines_are_all_accepted_or_rejected(tmp_path):
    source = random.Random(0)
    lines = [
        json.dumps({"id": number, "text": f"文 {number}", "meta": {"a": [1]}}, ensure_ascii=number % 2 == 0)
        for number in range(4000)
    ]
    lines = [mutated(line, source) if source.random() < 0.8 else line for line in lines]
    path = write(tmp_path / "a.jsonl", "".join(line + "\n" for line in lines).encode())
    rejects = Rejects(max_bad=len(lines))
    accepted = dict(read_texts([path], rejects))
    records = {f"{path}:{number}" for number, line in enumerate(lines, 1) if line.strip() or number == 1}
    rejected = [":".join(reason.split(":")[:2]) for reason in rejects.reasons]
    assert len(accepted) + len(rejected) == len(records) > 3990
    assert accepted.keys() | set(rejected) == records  # none twice, none missing
    assert len(accepted) > 1000 and len(rejected) > 1000
    for place, text in accepted.items():
        assert json.loads(lines[int(place.split(":")[1]) - 1].removeprefix("\ufeff"))["text"] == text
        text.encode("utf-8")
    assert refusal(path).startswith(f"{rejected[0]}: ")


def odd_json(source: random.Random, depth: int = 0) -> str:
    """A JSON value as somebody may write it: odd spaces and numbers, escapes, keys that occur twice."""
    space = lambda: source.choice(["", "", "", " ", "  ", "\t", "\r"])  # noqa: E731
    kind = source.randrange(10 if depth < 3 else 6)
    if kind < 3 and depth:
        return source.choice(
            [
                '"a"',
                '": b"',
                '"\\": "',
                '" :"',
                '"\\u0022:"',
                '"\\u003a"',
                '"春"',
                '"\\ud83d\\ude0a"',
                '"\\ud83d"',
                '"\\\\"',
                '":"',
            ]
        )
    if kind < 6 and depth:
        long = str(source.randrange(10 ** source.randrange(15, 25)))
        return source.choice(
            ["1", "-0", "0.5", "1e5", "1E400", "-1e-400", "true", "null", "NaN", long, "-" + long, long + ".0"]
        )
    parts = [odd_json(source, depth + 1) for _ in range(source.randrange(4))]
    if kind == 9:
        return f"[{space()}{','.join(parts)}{space()}]"
    keys = ['"a"', '"b"', '"\\u0061"', '"a:"', '":"', '"\\""', '"春"', '""']
    return "{" + ",".join(f"{space()}{source.choice(keys)}{space()}:{space()}{part}" for part in parts) + space() + "}"


def test_the_fast_reader_takes_nothing_that_the_exact_one_reads_otherwise():
    pytest.importorskip("orjson")
    source, fast, refused = random.Random(2), 0, 0
    for _ in range(20_000):
        line = odd_json(source)
        record = jsonl._parse_fast(line.encode())
        try:
            exact = parse_object(line)
        except DataError:
            assert record is None, line
            refused += 1
            continue
        if record is not None:
            assert repr(record).replace("-0.0", "0") == repr(exact).replace("-0.0", "0"), line
            fast += 1
    assert fast > 2000 and refused > 2000
    # And it does take what is common.
    for record in ({"text": 'He said: "a" b', "n": [1.5, {"x": "春 :"}]}, {"messages": [{"role": "user", "content": "a\tb"}]}):
        for line in (json.dumps(record), json.dumps(record, ensure_ascii=False), json.dumps(record, separators=(",", ":"))):
            assert jsonl._parse_fast(line.encode()) == record, line


def test_flipped_bytes_never_pass_unseen(tmp_path):
    source = random.Random(1)
    whole = b"".join(json.dumps({"text": f"{number} 春眠不觉晓"}, ensure_ascii=False).encode() + b"\n" for number in range(20))
    for _ in range(300):
        at = source.randrange(len(whole))
        data = whole[:at] + bytes([source.randrange(256)]) + whole[at + 1 :]
        path, rejects = write(tmp_path / "a.jsonl", data), Rejects(max_bad=40)
        lines = sum(bool(line.strip()) for line in data.split(b"\n"))
        try:
            accepted = len(list(read_texts([path], rejects)))
        except DataError as error:
            with pytest.raises(UnicodeDecodeError) as reason:
                data.decode("utf-8")
            offset = reason.value.start
            assert str(error).startswith(
                f"{path}:{data[:offset].count(10) + 1}: not UTF-8 (byte 0x{data[offset]:02x} at offset {offset})"
            )
        else:
            assert accepted + len(rejects.reasons) == lines


def test_a_script_ends_with_65_and_one_line(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", b'{"text": 1}\n')
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda: texts_of(path) and None)
    assert exit.value.code == 65
    assert (
        capsys.readouterr().err
        == f"error: {path}:1: 'text' is int, not text; mend the record, or let some go with --max_bad N\n"
    )


def test_parsing_takes_objects_only():
    assert parse_object(' {"a": [1, {"b": null}]} ') == {"a": [1, {"b": None}]}
    with pytest.raises(DataError, match="not valid JSON"):
        parse_object("")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    for name in ("b.jsonl", "a.txt", "deep/c.jsonl.gz", "deep/er/d.TXT", "notes.md", "e.json", "deep/x.tar.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(found, tree) -> list[str]:
    return [path.relative_to(tree).as_posix() for path in found]


def test_files_are_found_by_name_folder_and_pattern(tree, monkeypatch):
    assert names(find_files([tree]), tree) == ["a.txt", "b.jsonl", "deep/c.jsonl.gz", "deep/er/d.TXT"]
    assert names(find_files([tree / "b.jsonl", str(tree / "a.txt")]), tree) == ["b.jsonl", "a.txt"]
    assert names(find_files([f"{tree}/*.jsonl"]), tree) == ["b.jsonl"]
    assert names(find_files([f"{tree}/**/*.jsonl*"]), tree) == ["b.jsonl", "deep/c.jsonl.gz"]
    assert names(find_files([f"{tree}/[ab].*", tree / "a.txt", tree]), tree) == [
        "a.txt",
        "b.jsonl",
        "deep/c.jsonl.gz",
        "deep/er/d.TXT",
    ]
    assert find_files([]) == []
    monkeypatch.chdir(tree)
    assert [str(path) for path in find_files(["a.txt", "deep"])] == [
        "a.txt",
        *(os.path.join("deep", name) for name in ("c.jsonl.gz", os.path.join("er", "d.TXT"))),
    ]
    monkeypatch.setenv("HOME", str(tree))
    assert names(find_files(["~/a.txt"]), tree) == ["a.txt"]
    odd = write(tree / "c[1].jsonl", b"")
    assert find_files([odd]) == [odd]  # a file of that name comes before a pattern


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.jsonl", "missing.jsonl: no such file or folder; check the path"),
        ("*.parquet", r"\*.parquet: no such file or folder"),
        ("notes.md", r"notes.md: expected .jsonl or .txt \(also .gz .bz2 .xz .zst\); convert or rename it"),
        ("e.json", "e.json: expected .jsonl or .txt"),
        ("*.md", "notes.md: expected .jsonl or .txt"),
        ("empty", "empty: no .jsonl or .txt file in this folder"),
    ],
)
def test_what_is_not_there_or_no_data_is_an_error(tree, name, message):
    (tree / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        find_files([tree / "a.txt", tree / name])


# --- writing ---------------------------------------------------------------------------------------------------------


def test_records_written_are_records_read(tmp_path):
    records = [{"text": "春\n\u2028\x00"}, {"text": "b", "n": [1, None, 2.5]}]
    path = tmp_path / "new" / "a.jsonl"
    assert write_records(path, iter(records)) == 2
    assert [record for _, record in read_records(path, Rejects())] == records
    assert "春".encode() in path.read_bytes() and path.read_bytes().count(b"\n") == 2
    assert write_records(path, []) == 0 and path.read_bytes() == b""


@pytest.mark.parametrize("there", [False, True], ids=["new", "over an old one"])
def test_a_file_half_written_never_appears(tmp_path, there):
    path = tmp_path / "a.jsonl"
    if there:
        path.write_bytes(b"old\n")

    def failing():
        yield from ({"text": "x" * 1000} for _ in range(200))
        assert (path.read_bytes() == b"old\n") if there else not path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(path, failing())
    assert {file.name for file in tmp_path.iterdir()} == ({"a.jsonl"} if there else set())
    assert not there or path.read_bytes() == b"old\n"
    with pytest.raises(DataError, match="cannot be written as JSON"):
        write_records(path, [{"text": "\ud800"}])
    assert {file.name for file in tmp_path.iterdir()} == ({"a.jsonl"} if there else set())
