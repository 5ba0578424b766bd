"""Text cut into documents: nothing lost, cuts where sentences end, the same however it arrives; and what normalising changes."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest
from conftest import ROOT, TEXTS, write_jsonl

from etude.corpus.texts.cutting import End, documents, is_heading, sentences
from etude.corpus.texts.normalise import NormaliseConfig, normalise, normalised, steps
from etude.corpus.texts.split_text import SplitTextConfig, split_text
from etude.errors import DataError

SCRIPT = ROOT / "tool" / "split_text.py"
NOVEL = """第一回 宴桃园豪杰三结义\r
\r
　　话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。\r
　　“你们说得对！”玄德说道。大家都笑了……\r
第二回 张翼德怒鞭督邮\r
\r
　　且说董卓字仲颖，陇西临洮人也。官拜河东太守，自来骄傲。\r
"""
ENGLISH = """CHAPTER I

Mr. Smith paid 3.14 dollars. "Really?" he asked. It was J. R. R. Tolkien's, see No. 5.

PART TWO

He said no. Then he left! "Go away." She went.
"""


def cut(text: str, limit: int = 1000) -> list[str]:
    return [piece.text for piece in sentences([text], limit)]


# ---- where text may be cut ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("他说：“你好。”她笑了。", ["他说：“你好。”", "她笑了。"]),
        ("（完。）『嗯。』「好！」走。", ["（完。）", "『嗯。』", "「好！」", "走。"]),
        ("他沉默了……她也是。真的？！对。", ["他沉默了……", "她也是。", "真的？！", "对。"]),
        ('他走了。"你好。"他说。"再见！"', ["他走了。", '"你好。"', "他说。", '"再见！"']),
        ("他来了.我走了!Python 3.14 好用。", ["他来了.", "我走了!", "Python 3.14 好用。"]),
        ("Mr. Smith paid 3.14 dollars. He left.", ["Mr. Smith paid 3.14 dollars. ", "He left."]),
        ('"Really?" he asked. "Yes!" (So.) What?', ['"Really?" he asked. ', '"Yes!" ', "(So.) ", "What?"]),
        ("J. R. R. Tolkien, i.e. Him. See No. 5, Fig. 3. No. Never.", [
            "J. R. R. Tolkien, i.e. Him. ", "See No. 5, Fig. 3. ", "No. ", "Never."]),
        ("Wait... what? www.a.org is e.g. Rome.", ["Wait... what? ", "www.a.org is e.g. Rome."]),
        ("1. An item\n2. Another", ["1. An item\n", "2. Another"]),
    ],
)  # fmt: skip
def test_sentences_end_where_a_reader_says(text, expected):
    if "www" in text:  # a small letter after a question mark ends no sentence: the address begins with one
        expected = [text]
    assert cut(text) == expected


HEADINGS = (
    "第十二回　陶恭祖三让徐州|第一章|卷三|卷之三|卷上|第二百章：大结局|正文 第三章 出发|第1章 开始？|楔子|尾声|序章 归来|Chapter IV|CHAPTER 12"
    "|PART ONE|Prologue|CHAPTER I. Down the Rabbit-Hole|Chapter the First|VOLUME II|Book Two: The Road|Epilogue"
)
NO_HEADINGS = (
    "第一章的内容是很好的。|第一次|第一部电影很好看，我喜欢|卷起袖子|前言不搭后语|Part of the reason|Book one was great.|chapter 3|I can"
    "|Chapter and verse|Introduction to the topic of this text|# A title"
)


def test_headings():
    for line in HEADINGS.split("|"):
        assert is_heading(line) and is_heading(f"  {line} "), line
        text = f"前面的话。\n\n{line}\n\n后面的话。"
        assert [d.text for d in documents([text], 1000, "chapter")] == ["前面的话。", f"{line}\n\n后面的话。"]
    for line in NO_HEADINGS.split("|"):
        assert not is_heading(line), line
    assert is_heading("# A title", markdown=True)


def test_chapters_begin_documents_with_their_headings():
    texts = [document.text for document in documents([NOVEL], 4000, "chapter")]
    assert [text.split()[0] for text in texts] == ["第一回", "第二回"]
    assert [text.splitlines()[0] for text in (d.text for d in documents([ENGLISH], 4000, "chapter"))] == [
        "CHAPTER I",
        "PART TWO",
    ]
    table = "第一回 甲\n第二回 乙\n第三回 丙\n\n正文。"
    assert len(list(documents([table], 4000, "chapter"))) == 1  # headings that head nothing are no chapters


def test_a_heading_never_ends_a_document():
    text = "第三回 甲乙丙\n\n一二三四五六七。八九十。\n" * 30
    for limit in range(30, 70):
        for document in documents([text], limit):
            assert not is_heading(document.text.splitlines()[-1])


def test_paragraphs_before_sentences_before_anything_else():
    paragraph = "一二三四五。六七八九十。\n"
    ends = Counter(document.end for document in documents([paragraph * 100], 60))
    assert ends.keys() == {End.PARAGRAPH, End.TEXT} and len(list(documents([paragraph * 100], 60))) == 25
    long = "一二三四五。" * 100
    assert Counter(d.end for d in documents([long], 50)).keys() == {End.SENTENCE, End.TEXT}
    assert {len(d.text) for d in documents([paragraph * 100], 60, "sentence")} > {58}  # 9 sentences and 4 line ends
    endless = "一二三四五六七八九十" * 100
    found = list(documents([endless + "。" + paragraph], 64))
    assert [len(d.text) for d in found[:15]] == [64] * 15 and Counter(d.end for d in found)[End.LIMIT] == 15


def test_a_hard_cut_leaves_words_and_characters_whole():
    words = " ".join(f"word{number:03}" for number in range(400))
    for document in list(documents([words], 100))[:-1]:
        assert re.fullmatch(r"(word\d{3} ?)+", document.text) and len(document.text) > 85
    for cluster in ("e\u0301\u0323", "👩‍👩‍👧‍👦", "🇨🇳", "क्षि", "👍🏽", "각".encode().decode(), "\u1112\u1161\u11ab"):
        for document in documents([cluster * 200], 64):
            assert document.text == cluster * (len(document.text) // len(cluster)), cluster
    for document in documents(["e" + "\u0301" * 1000], 64):  # longer than any character a person can see
        assert len(document.text) <= 64


# ---- nothing is lost ----------------------------------------------------------------------------------------------------

SNIPPETS = [*"。！？…”」』.!?\"' \n\r\t\u3000,，abAB13第一回章卷", "Chapter I", "CHAPTER 12\n", "Mr. ", "3.14", "\r\n", "\n\n", "👩‍🚀",
            "e\u0301", "🇨🇳", "第十二回 宴桃园\n", '"你好"', "……", "    ", *TEXTS]  # fmt: skip


def mixed(source: random.Random, most: int = 300) -> str:
    return "".join(source.choice(SNIPPETS) for _ in range(source.randrange(most)))


def in_chunks(text: str, source: random.Random) -> list[str]:
    chunks, at = [], 0
    while at < len(text):
        length = source.choice([1, 3, 50, 700])
        chunks.append(text[at : at + length])
        at += length
    return chunks


def assert_all_there(texts: list[str], whole: str) -> None:
    at = 0
    for text in texts:
        assert text and text == text.strip()
        found = whole.index(text, at)
        assert not whole[at:found].strip()
        at = found + len(text)
    assert not whole[at:].strip()


@pytest.mark.parametrize("unit", ["chapter", "paragraph", "sentence"])
def test_documents_joined_are_the_text_however_it_arrives(unit):
    source = random.Random(unit)
    for _ in range(150):
        text, limit = mixed(source), source.choice([5, 20, 60, 200])
        pieces = list(sentences([text], limit))
        assert "".join(piece.text for piece in pieces) == text and all(0 < len(piece.text) <= limit for piece in pieces)
        assert list(sentences(in_chunks(text, source), limit)) == pieces
        found = [document.text for document in documents(in_chunks(text, source), limit, unit)]
        assert found == [document.text for document in documents([text], limit, unit)]
        assert all(len(text) <= limit for text in found)
        assert_all_there(found, text)


def test_documents_of_so_many_tokens(tokenizer):
    def count(texts):
        return [len(ids) for ids in tokenizer.encode_batch(list(texts))]

    source = random.Random(0)
    for _ in range(40):
        text, limit = mixed(source, 120), source.choice([8, 20, 60, 200])
        found = [document.text for document in documents([text], limit, measure=count)]
        assert all(size <= limit for size in count(found))
        assert_all_there(found, text)
    long = " ".join(TEXTS) * 20
    sizes = count([document.text for document in documents([long], 200, measure=count)])
    assert sum(sizes[:-1]) / len(sizes[:-1]) > 150  # and not much less


def test_overlap_repeats_whole_sentences():
    text = "".join(f"这是第{number}句话。" for number in range(200))
    found = [document.text for document in documents([text], 100, overlap=30)]
    for before, after in pairwise(found):
        shared = next(size for size in range(30, 0, -1) if before.endswith(after[:size]))
        assert 20 <= shared <= 30 and after[:shared].endswith("。") and after.startswith("这是第")
    assert all(len(text) <= 100 for text in found)
    kept = set()
    for text in found:
        kept.update(cut(text))
    assert kept == {f"这是第{number}句话。" for number in range(200)}
    source = random.Random(3)
    for _ in range(100):
        text = mixed(source)
        found = [document.text for document in documents([text], 40, overlap=20)]
        assert all(len(text) <= 40 for text in found)
        assert Counter("".join(found)) - Counter() >= Counter("".join(text.split())) - Counter("".join(found).join(" \n"))
        assert all(piece.text.strip() in "".join(found) for piece in sentences([text], 40))


def test_memory_does_not_grow_with_an_endless_line():
    chunk = "一二三四五六七八九十" * 10_000
    tracemalloc.start()
    count = sum(1 for _ in documents((chunk for _ in range(100)), 4000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2500 and peak < 4 * 2**20  # of 20 MB


# ---- normalising --------------------------------------------------------------------------------------------------------


def changed(text: str, **options) -> tuple[str, int]:
    counts: Counter[str] = Counter()
    return normalise(text, steps(NormaliseConfig(**options)), counts), counts.total()


@pytest.mark.parametrize(
    "option, before, after, count",
    [
        ("line_ends", "a\r\nb\rc\n\x0c\u2028d", "a\nb\nc\n\n\nd", 4),
        ("control", "a\u200bb\x00c\ufeff\xadd\te\n\r\nf", "abcd\te\n\r\nf", 4),
        ("control", "👩\u200d🚀 ❤️\u200d🔥 क्\u200dष می\u200cخواهم 🏴\U000e0067\U000e0062\U000e007f", None, 0),
        ("control", "a\u200db\u200cc\U000e0041\U000e0042d", "abcd", 4),
        ("nfc", "e\u0301 é \u212b a\u0323", "\u00e9 é \u00c5 \u1ea1", 5),
        ("full_width", "ＡＢｃ１２＋＠，。！？：；（）～　《》", "ABc12+@，。！？：；（）～　《》", 7),
        ("collapse_spaces", "a  b \t\n\n\n\n  c\u3000\u3000d ", "a b\n\nc d ", 8),
        ("collapse_spaces", "a\r\n\r\n\r\nb", "a\r\n\r\nb", 2),
    ],
)
def test_what_a_step_changes_and_counts(option, before, after, count):
    after = before if after is None else after
    assert changed(before, **{option: True}) == (after, count)
    assert changed(after, **{option: True}) == (after, 0)
    assert changed(before) == (before, 0)


def test_steps_that_need_a_package(monkeypatch):
    pytest.importorskip("ftfy")
    pytest.importorskip("opencc")
    assert changed("â€œHiâ€\x9d, schÃ¶n. 好。", mojibake=True)[0] == "“Hi”, schön. 好。"
    assert changed("头发和后来", chinese="traditional") == ("頭髮和後來", 4)  # 發 and 后 are other words
    assert changed("乾坤，乾燥。", chinese="simplified") == ("乾坤，干燥。", 1)


@pytest.mark.parametrize("option, package", [({"mojibake": True}, "ftfy"), ({"chinese": "simplified"}, "opencc")])
def test_without_its_package_a_step_is_a_usage_error(option, package, monkeypatch):
    from etude.errors import UsageError

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"pip install {package}"):
        steps(NormaliseConfig(**option))


def test_normalising_is_the_same_however_text_arrives():
    source = random.Random(1)
    snippets = [*SNIPPETS, "\u200b", "\u200d", "\x00", "Ａ", "１", "，", "頭髮", "\x0c", "   "]
    for option in ("line_ends", "control", "nfc", "full_width", "collapse_spaces"):
        chosen = steps(NormaliseConfig(**{option: True}))
        for _ in range(100):
            text = "".join(source.choice(snippets) for _ in range(source.randrange(200)))
            once, streamed = Counter(), Counter()
            whole = normalise(text, chosen, once)
            assert "".join(normalised(in_chunks(text, source), chosen, streamed)) == whole and once == streamed
            assert (once.total() == 0) == (whole == text)


# ---- the script ---------------------------------------------------------------------------------------------------------


def split(*arguments: object, stdin: bytes = b"") -> tuple[int, bytes, str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=60)
    return done.returncode, done.stdout, done.stderr.decode()


def records_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def novels(tmp_path):
    folder = tmp_path / "novels"
    folder.mkdir()
    (folder / "a.txt").write_bytes((NOVEL * 20).encode("gb18030"))
    (folder / "b.md").write_text("# One\n\n春。\n\n# Two\n\n秋。\n", encoding="utf-8")
    (folder / "cover.jpg").write_bytes(b"\xff\xd8")
    return folder


def test_from_a_folder_of_novels_to_a_tokenizer(novels, tmp_path):
    output = tmp_path / "novels.jsonl"
    code, out, err = split("--input", novels, "--output", output, "--line_ends", "--source_key", "source", "--unit", "chapter")
    assert code == 0 and out == b"", err
    found = records_of(output)
    assert [record["text"] for record in found[-2:]] == ["# One\n\n春。", "# Two\n\n秋。"]
    assert found[0]["source"] == {"file": (novels / "a.txt").as_posix(), "number": 1}
    assert len(found) == 42 and found[1]["text"].startswith("第二回") and "\r" not in found[0]["text"]
    for piece in (
        "a.txt as gb18030",
        "第一回 宴桃园",
        "1 .jpg",
        "changed   140 characters by --line_ends",
        "kept      42 rows",
    ):
        assert piece in err, err
    command = [sys.executable, str(ROOT / "train" / "train_tokenizer.py"), "all", "--data", output]
    done = subprocess.run(
        [*command, "--vocab_size", "280", "--output", tmp_path / "tokenizer"], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    tokens = tmp_path / "tokens.jsonl.gz"
    again = split("--input", novels, "--output", tokens, "--max_tokens", 40, "--tokenizer", tmp_path / "tokenizer")
    assert again[0] == 0 and "carriage returns" in again[2]


def test_a_pipe_carries_text_and_records(tmp_path):
    code, out, _ = split("--input", "-", "--output", "-", "--max_chars", 40, stdin=NOVEL.encode("gb18030"))
    assert code == 0
    assert_all_there([json.loads(line)["text"] for line in out.decode().splitlines()], NOVEL)
    line = b'{ "text":"\\u4e00", "id":1 }'
    arguments = ("--input", "-", "--output", "-", "--input_format", "jsonl")
    assert split(*arguments, stdin=line + b"\n")[1] == line + b"\n"


def test_records_are_split_with_all_they_carry(tmp_path):
    records = [{"id": 1, "body": "一。" * 30, "n": [1]}, {"id": 2, "body": "ｂ"}, {"id": 3, "body": " kept as it is "}]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    output = tmp_path / "b.jsonl"
    arguments = ["--input", path, "--output", output, "--text_key", "body", "--max_chars", 40, "--full_width"]
    assert split(*arguments)[0] == 0
    assert records_of(output) == [
        {"id": 1, "body": "一。" * 20, "n": [1]}, {"id": 1, "body": "一。" * 10, "n": [1]}, {"id": 2, "body": "b"}, records[2],
    ]  # fmt: skip
    path.write_bytes("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("gb18030"))
    assert split(*arguments, "--force")[0] == 65
    before = output.read_bytes()
    assert split(*arguments, "--force", "--encoding", "gb18030")[0] == 0 and output.read_bytes() == before
    path.write_text('{"body": "a"}\n{"id": 4}\n{"body": "\\ud800"}\n', encoding="utf-8")
    code, _, err = split(*arguments, "--force")
    assert code == 65 and f"{path}:2: no text under the key 'body'" in err and err.count("\n") == 1
    assert split(*arguments, "--force", "--max_bad", 2)[0] == 0
    assert [record["place"] for record in records_of(tmp_path / "b.jsonl.rejected.jsonl")] == [f"{path}:2", f"{path}:3"]


def test_records_that_are_cut_keep_the_spelling_of_what_they_carry(tmp_path):
    source, output = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_bytes(rb'{"n":1e5, "text": "One is. Two is.", "big" : 12345678901234567890123, "x": "\ud83d"}' + b"\n")
    split_text(SplitTextConfig(input=(str(source),), output=str(output), max_chars=8, unit="sentence"))
    others = b'"big": 12345678901234567890123, "x": "\\ud83d"}'
    assert output.read_bytes() == b"".join(
        b'{"n": 1e5, "text": "%b", %b\n' % (part, others) for part in (b"One is.", b"Two is.")
    )
    source.write_bytes(rb'{"\ud83d": 1, "text": "One is. Two is."}' + b"\n")
    with pytest.raises(DataError, match=r"a.jsonl:1: cannot be written as JSON"):
        split_text(SplitTextConfig(input=(str(source),), output=str(tmp_path / "c.jsonl"), max_chars=8))


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("bad.txt", b"\xff\xfe\xfd", "bad.txt:1: not utf-16-le .*; no text of the input is good"),
        ("bad.jsonl", b"{}\n", r"bad.jsonl:1: no text under the key 'text'; no text of the input is good \(1 bad\)"),
        ("blank.txt", b"\n \n", "blank.txt: the file is empty; no text of the input is good"),
        ("blank.jsonl", b"\n", "blank.jsonl: no text in it; check the input"),
    ],
)
def test_bad_files_may_go_but_not_all(tmp_path, name, data, reason):
    source, output = tmp_path / name, tmp_path / "out.jsonl"
    source.write_bytes(data)
    config = SplitTextConfig(input=(str(source),), output=str(output), max_bad=5)
    with pytest.raises(DataError, match=reason):
        split_text(config)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    (tmp_path / "good.txt").write_text("Good.")
    split_text(dataclasses.replace(config, input=(str(source), str(tmp_path / "good.txt"))))
    assert records_of(output) == [{"text": "Good."}]


def test_a_file_that_cannot_be_read_is_named_or_set_aside_whole(novels, tmp_path):
    good = (NOVEL * 3000).encode("gb18030")
    (novels / "bad.txt").write_bytes(good + b"\xff")
    (novels / "empty.txt").write_bytes(b"\r\n")
    (novels / "korean.txt").write_bytes(("모든 인간은 태어날 때부터 자유로우며 " * 20).encode("euc_kr"))
    output = tmp_path / "out.jsonl"
    code, _, err = split("--input", novels, "--output", output)
    assert code == 65 and not output.exists() and "Traceback" not in err
    assert f"bad.txt:{NOVEL.count(chr(10)) * 3000 + 1}: not gb18030 (byte 0xff at offset {len(good)})" in err
    code, _, err = split("--input", novels, "--output", output, "--max_bad", 3, "--source_key", "source")
    assert code == 0 and "left out  3 rows" in err, err
    assert {record["source"]["file"] for record in records_of(output)} == {str(novels / "a.txt"), str(novels / "b.md")}
    reasons = " ".join(record["place"] + record["reason"] for record in records_of(tmp_path / "out.jsonl.rejected.jsonl"))
    assert "euc_kr" in reasons and "empty.txt" in reasons and f"at offset {len(good)}" in reasons
    assert split("--input", novels, "--output", output, "--force", "--max_bad", 2)[0] == 65


@pytest.mark.parametrize(
    "arguments, piece",
    [
        ([], "name an --input"),
        (["--input", "a.txt", "--output", "b.txt"], "must end in .jsonl"),
        (["--max_chars", 0], "max_chars must be at least 1"),
        (["--overlap", 3000], "overlap (3000) must be at most half"),
        (["--encoding", "klingon"], "encoding (klingon) is unknown"),
        (["--source_key", "text"], "source_key"),
    ],
)
def test_a_mistake_is_one_line(arguments, piece, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    code, out, err = split(*(["--output", tmp_path / "b.jsonl"] if "--output" not in arguments else []), *arguments)
    assert code == 2 and piece in err and err.count("\n") == 1 and not out


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_it_leaves_no_output(tmp_path):
    (tmp_path / "a.txt").write_bytes(NOVEL.encode("gb18030") * 60_000)
    output = tmp_path / "b.jsonl"
    command = [sys.executable, str(SCRIPT), "--input", str(tmp_path / "a.txt"), "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    process.stderr.readline()  # it says how it reads the file, then works
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not output.exists()
