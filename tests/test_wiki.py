"""The Wikipedia extractor: dumps of every packing and encoding read alike, damaged and hostile ones refused, outputs whole."""

import bz2
import codecs
import contextlib
import gzip
import itertools
import json
import lzma
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from etude.corpus.wiki import bzip2
from etude.corpus.wiki import dump as wikidump
from etude.corpus.wiki.dump import BadPage, Page, pages_of, read_batches
from etude.corpus.wiki.extract import ExtractConfig, extract, find_dumps
from etude.corpus.workers import ahead
from etude.errors import DataError, EtudeError, UsageError

SCRIPT = str(ROOT / "tool" / "extract_xml.py")
SITE = """
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <namespaces>
      <namespace key="-1" case="first-letter">Special</namespace>
      <namespace key="0" case="first-letter" />
      <namespace key="4" case="first-letter">Wikipédia</namespace>
      <namespace key="14" case="first-letter">Category</namespace>
    </namespaces>
  </siteinfo>
"""


def head(schema: str = "0.11", siteinfo: str = SITE) -> str:
    where = f"http://www.mediawiki.org/xml/export-{schema}/"
    names = f'xmlns="{where}" version="{schema}" xml:lang="fr"' if schema else ""
    return f"<mediawiki {names}>{siteinfo}"


def page(number: int, text: str = "", title: str = "", ns: str = "<ns>0</ns>", more: str = "", revision: str = "") -> str:
    text = text or f"The {number}th article of '''some''' length, 文章 {number}, R&amp;D.\n\nIts second paragraph."
    return f"""  <page>
    <title>{title or f"Title {number}"}</title>
    {ns}
    <id>{number}</id>{more}
    <revision>
      <id>{number}00</id>{revision}
      <text bytes="9" xml:space="preserve">{text}</text>
    </revision>
  </page>
"""


def dump(*pages: str, **keywords) -> bytes:
    return (head(**keywords) + "".join(pages) + "</mediawiki>\n").encode()


PAGES = [page(number) for number in range(1, 41)]
WHOLE = dump(*PAGES)


def write(path: Path, data: bytes) -> Path:
    """``data`` packed as the name of ``path`` asks for."""
    pack = {".bz2": bz2.compress, ".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def streams(*pieces: bytes) -> bytes:
    return b"".join(map(bz2.compress, pieces))


def multistream(every: int = 10) -> bytes:
    groups = [PAGES[start : start + every] for start in range(0, len(PAGES), every)]
    return streams(head().encode(), *("".join(group).encode() for group in groups), b"</mediawiki>\n")


def read(path: Path, threads: int = 2, max_page_bytes: int = 2**26) -> list[Page | BadPage]:
    return [page for batch in read_batches(path, max_page_bytes, threads) for page in pages_of(batch)]


def extracted(tmp_path: Path, data: bytes, **options) -> list[dict]:
    path, output = write(tmp_path / "dump.xml", data), tmp_path / "out.jsonl"
    extract(ExtractConfig(input=(str(path),), output=str(output), **{"workers": 1, "force": True, **options}))
    return [json.loads(line) for line in output.read_bytes().splitlines()]


def refusal(tmp_path: Path, data: bytes | Path, **options) -> str:
    """The message of the :class:`DataError` that a dump ends with; nothing is left behind."""
    path = data if isinstance(data, Path) else write(tmp_path / "dump.xml", data)
    (tmp_path / "out").mkdir(exist_ok=True)
    with pytest.raises(DataError) as caught:
        extract(ExtractConfig(input=(str(path),), output=str(tmp_path / "out" / "a.jsonl"), **{"workers": 1, **options}))
    assert os.listdir(tmp_path / "out") == []
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message.replace(str(tmp_path) + os.sep, "")


@pytest.fixture
def small_batches(monkeypatch):
    """Many batches and chunks out of little."""
    monkeypatch.setattr(wikidump, "BATCH_BYTES", 1000)
    monkeypatch.setattr(wikidump, "CHUNK_BYTES", 100)
    monkeypatch.setattr(bzip2, "READ_BYTES", 7)
    monkeypatch.setattr(bzip2, "CHUNK_BYTES", 100)
    monkeypatch.setattr(bzip2, "AHEAD_BYTES", 1500)
    monkeypatch.setattr(bzip2, "PIECE_BYTES", 300)


# --- reading ---------------------------------------------------------------------------------------------------------

EXPECTED = [
    Page(
        n,
        f"Title {n}",
        0,
        False,
        "wikitext",
        f"The {n}th article of '''some''' length, 文章 {n}, R&D.\n\nIts second paragraph.",
    )
    for n in range(1, 41)
]
XML_DECLARATION = b'<?xml version="1.0" encoding="utf-8"?>\n'
UTF16_DECLARATION = '<?xml version="1.0" encoding="UTF-16"?>\n'
DRESSES = {
    "plain": WHOLE,
    "declared, with a comment": XML_DECLARATION + b"<!-- <mediawiki> -->\n" + WHOLE,
    "byte order mark": codecs.BOM_UTF8 + WHOLE,
    "schema 0.10": dump(*PAGES, schema="0.10"),
    "no schema": dump(*PAGES, schema=""),
    "no siteinfo": dump(*PAGES, siteinfo=""),
    "UTF-16, little end": codecs.BOM_UTF16_LE + WHOLE.decode().encode("utf-16-le"),
    "UTF-16, big end": codecs.BOM_UTF16_BE + (UTF16_DECLARATION + WHOLE.decode()).encode("utf-16-be"),
    "UTF-16 without a mark": (UTF16_DECLARATION + WHOLE.decode()).encode("utf-16-le"),
    "Windows line ends": WHOLE.replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("suffix", ["", ".bz2", ".gz", ".xz"])
@pytest.mark.parametrize("dress", DRESSES)
def test_a_dump_reads_alike_in_every_dress(tmp_path, small_batches, dress, suffix):
    assert read(write(tmp_path / f"dump.xml{suffix}", DRESSES[dress])) == EXPECTED


def test_zstandard(tmp_path):
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    (tmp_path / "dump.xml.zst").write_bytes(zstd.compress(WHOLE))
    assert read(tmp_path / "dump.xml.zst") == EXPECTED


@pytest.mark.parametrize("threads", [1, 3])
def test_streams_of_a_bz2_may_be_cut_anywhere(tmp_path, small_batches, threads):
    path, source = tmp_path / "dump.xml.bz2", random.Random(0)
    for data in (
        multistream(),
        multistream(every=1),
        multistream() + bz2.compress(b""),
        b"".join(map(bz2.compress, [b"", WHOLE])),
    ):
        path.write_bytes(data)
        assert read(path, threads) == EXPECTED
    for _ in range(10):  # as pbzip2 does, in the middle of a page or of a character
        cuts = sorted(source.sample(range(len(WHOLE)), 12))
        path.write_bytes(streams(*(WHOLE[start:end] for start, end in itertools.pairwise([0, *cuts, len(WHOLE)]))))
        assert read(path, threads) == EXPECTED


def test_a_mark_within_a_stream_is_no_beginning(tmp_path, small_batches, monkeypatch):
    path = tmp_path / "dump.xml.bz2"
    path.write_bytes(multistream())
    monkeypatch.setattr(bzip2, "_STREAM", re.compile(rb"BZh[1-9]|[\x00-\x0f]"))  # one byte in sixteen
    monkeypatch.setattr(bzip2, "_MARK_BYTES", 4)
    with open(path, "rb") as file:
        pieces = list(bzip2._pieces(file, None))
    assert len(pieces) > 50 and b"".join(piece for _, piece in pieces) == path.read_bytes()
    assert read(path) == EXPECTED


@pytest.mark.parametrize("read_bytes", [1, 10, 2**20])
def test_pieces_of_a_bz2_begin_where_its_streams_do(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(bzip2, "READ_BYTES", read_bytes)
    lengths = [len(bz2.compress(bytes([n]) * 1000)) for n in range(30)]
    (tmp_path / "a.bz2").write_bytes(streams(*(bytes([n]) * 1000 for n in range(30))))
    with open(tmp_path / "a.bz2", "rb") as file:
        assert [(begins, len(piece)) for begins, piece in bzip2._pieces(file, None)] == [(True, length) for length in lengths]


def test_pages_are_what_the_export_says(tmp_path):
    two = page(7).replace("    <revision>", "    <revision><id>1</id><text>older</text></revision>\n    <revision>")
    slots = page(8, revision="<model>css</model>").replace("</text>", "</text><content><role>x</role><text>no</text></content>")
    without_ns = [page(9, ns="", title="Wikipédia:About"), page(10, ns="", title="Ratio 1:2")]
    redirect = page(11, text=" ", more='<redirect title="Title 1" />', ns="<ns>14</ns>")
    empty = page(12).replace(re.search("<text.*</text>", page(12), re.DOTALL)[0], '<text bytes="0" deleted="deleted" />')
    found = read(write(tmp_path / "a.xml", dump(two, slots, *without_ns, redirect, empty)))
    assert found[0] == EXPECTED[6] and found[1].model == "css" and found[1].text == EXPECTED[7].text
    assert [page.namespace for page in found] == [0, 0, 4, 0, 14, 0]
    assert [page.is_redirect for page in found] == [False] * 4 + [True, False]
    assert found[5].text == "" and found[4].text == " "


# --- extracting ------------------------------------------------------------------------------------------------------


def test_records_hold_id_title_and_clean_text(tmp_path, capsys):
    pages = [
        page(1, text="'''Bread''' is a [[staple food|staple]].&lt;ref>No&lt;/ref>", title="Bread &amp; butter"),
        page(2, text="#REDIRECT [[Bread]]", more='\n    <redirect title="Bread" />'),
        page(3, ns="<ns>14</ns>"),
        page(4, text="Bread may refer to:\n* x\n{{disambiguation}}"),
        page(5, text="p {}", revision="<model>css</model>"),
        page(6, text="{{stub}}"),
        page(7, text="Short."),
        page(8, text="面包是一种食物，用面粉做成。"),
    ]  # fmt: skip
    records = extracted(tmp_path, dump(*pages), min_chars=10)
    assert records == [
        {"id": 1, "title": "Bread & butter", "text": "Bread is a staple."},
        {"id": 8, "title": "Title 8", "text": "面包是一种食物，用面粉做成。"},
    ]
    told = capsys.readouterr().err
    assert "read      8 pages" in told and "kept      2 rows" in told and "passed by 6 pages" in told
    for reason in ("another namespace", "redirects", "disambiguation", "no wikitext", "empty", "shorter than --min_chars"):
        assert re.search(rf"^ +1  .*{reason}", told, re.MULTILINE), told
    keep = {"namespaces": (0, 14), "disambiguations": True}
    assert [record["id"] for record in extracted(tmp_path, dump(*pages), **keep)] == [1, 3, 4, 7, 8]
    assert [record["id"] for record in extracted(tmp_path, dump(*pages), namespaces=(14,))] == [3]


def test_options_reach_the_cleaner(tmp_path):
    text = "Text -{zh-hans:简;zh-hant:繁}-.\n{|\n| a cell\n|}\n== See also ==\n* [[Other]]"
    plain = extracted(tmp_path, dump(page(1, text=text)))[0]["text"]
    assert "简" in plain and "cell" not in plain and "Other" not in plain
    more = extracted(tmp_path, dump(page(1, text=text)), tables=True, sections=True, variant="zh-hant")[0]["text"]
    assert "繁" in more and "a cell" in more and "Other" in more
    category = page(1, text="Text.[[Catégorie:Pain]] [[:Catégorie:Pain|Pain]]")
    site = SITE.replace("Category", "Catégorie")
    assert extracted(tmp_path, dump(category, siteinfo=site))[0]["text"] == "Text. Pain"


def test_text_files_have_a_page_a_line_and_shards_a_size(tmp_path):
    path = write(tmp_path / "dump.xml", WHOLE)
    extract(ExtractConfig(input=(str(path),), output=str(tmp_path / "a.txt"), workers=1))
    lines = (tmp_path / "a.txt").read_text(encoding="utf-8").splitlines()
    assert lines[6] == "The 7th article of some length, 文章 7, R&D. Its second paragraph." and len(lines) == 40
    extract(ExtractConfig(input=(str(path),), output=str(tmp_path / "a.jsonl"), workers=1))
    extract(ExtractConfig(input=(str(path),), output=str(tmp_path / "shards"), shard_bytes=1500, workers=1))
    shards = sorted((tmp_path / "shards").iterdir())
    assert len(shards) > 3 and all(shard.stat().st_size <= 1500 for shard in shards)
    assert b"".join(shard.read_bytes() for shard in shards) == (tmp_path / "a.jsonl").read_bytes()


def test_the_same_bytes_from_any_number_of_workers_and_inputs(tmp_path, small_batches):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "articles-multistream1.xml-p1p40.bz2").write_bytes(multistream())
    write(tmp_path / "in" / "articles2.xml", DRESSES["UTF-16, little end"])
    (tmp_path / "in" / "articles-multistream-index.txt.bz2").write_bytes(bz2.compress(b"0:1:Title"))
    written = []
    for workers in (1, 2):
        extract(ExtractConfig(input=(str(tmp_path / "in"),), output=str(tmp_path / f"{workers}.jsonl"), workers=workers))
        written.append((tmp_path / f"{workers}.jsonl").read_bytes())
    assert written[0] == written[1]
    assert [json.loads(line)["id"] for line in written[0].splitlines()] == [*range(1, 41)] * 2


def test_dumps_are_found_by_name_folder_and_pattern(tmp_path):
    for name in ("b.xml", "a.xml.bz2", "deep/c.xml-p1p23.bz2", "notes.txt", "a-index.txt.bz2", "odd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(*given: str) -> list[str]:
        return [file.relative_to(tmp_path).as_posix() for file in find_dumps([str(tmp_path / name) for name in given])]

    assert names(".") == ["a.xml.bz2", "b.xml", "deep/c.xml-p1p23.bz2"]
    assert names("odd", "b.xml", "*.xml*") == ["odd", "b.xml", "a.xml.bz2"]
    for name in ("missing.xml", "*.html", "nul\0.xml"):
        with pytest.raises(DataError, match="no such file or folder; name MediaWiki exports"):
            names(name)
    with pytest.raises(UsageError, match="name an --input"):
        names()


# --- what is broken --------------------------------------------------------------------------------------------------

BAD_PAGES = {
    "no title": (page(2).replace("<title>Title 2</title>", ""), "the page has no title"),
    "a long title": (page(2, title="x" * 2000), "a title of 2000 characters"),
    "no id": (page(2).replace("    <id>2</id>", ""), "'Title 2' has no id; expected a number"),
    "no number": (page(2).replace("<id>2<", "<id>2x<"), "has the id '2x'; expected a number"),
    "a huge number": (page(2).replace("<id>2<", f"<id>{'2' * 5000}<"), "has the id '2222"),
    "no namespace": (page(2, ns="<ns>main</ns>"), "has the namespace 'main'; expected a number"),
    "no text element": (re.sub("<text.*</text>", "", page(2), flags=re.DOTALL), "(id 2) has no text element"),
    "no revision": (re.sub("<revision>.*</revision>", "", page(2), flags=re.DOTALL), "(id 2) has no text element"),
    "tags in the text": (page(2, text="one <b>two</b> three"), "has XML tags or comments within its text"),
    "an unknown entity": (page(2, text="&x;"), "not well-formed XML (Entity 'x' not defined"),
    "a control character": (page(2, text="\x0c"), "not well-formed XML"),
    "a zero byte": (page(2, text="a\0b"), "not well-formed XML"),
    "another element": ("<logitem></logitem>" + page(2), "expected <page>, found '<logitem>"),
    "an unclosed page": (page(2).replace("</page>", ""), "not well-formed XML"),
    "a late DOCTYPE": ("<!DOCTYPE page [<!ENTITY x 'y'>]>" + page(2, text="&x;"), "expected <page>, found"),
    "depth": (page(2, text="<a>" * 5000 + "</a>" * 5000), "not well-formed XML (Excessive depth"),
    "bytes": (page(2, text="BYTES"), "not well-formed XML"),
}


@pytest.mark.parametrize("case", BAD_PAGES)
def test_a_bad_page_ends_the_job_or_is_set_aside(tmp_path, case):
    bad, reason = BAD_PAGES[case]
    data = dump(page(1), bad, page(3), page(4)).replace(b"BYTES", b"\xff\xfe")
    line = data[: data.index(bad.encode().replace(b"BYTES", b"\xff\xfe").strip())].count(b"\n") + 1
    message = refusal(tmp_path, data)
    assert message.startswith(f"dump.xml:{line}: ") and reason in message and message.endswith("let some go with --max_bad N")
    kept = [record["id"] for record in extracted(tmp_path, data, max_bad=1)]
    assert kept == ([1, 4] if case == "an unclosed page" else [1, 3, 4])
    (rejected,) = map(json.loads, (tmp_path / "out.jsonl.rejected.jsonl").read_bytes().splitlines())
    assert rejected["place"].endswith(f"dump.xml:{line}") and reason in rejected["reason"]
    assert rejected["line"].startswith("<") and rejected["line"].endswith("</page>")


REFUSED = {
    "nothing": (b"", "the file is empty"),
    "no XML": (b"PK\x03\x04", "no MediaWiki export: it begins with 'PK"),
    "a web page": (b"<!doctype html><html>", "no MediaWiki export: it begins with '<!doctype html>"),
    "other XML": (b"<?xml version='1.0'?><rss><page></page></rss>", "no MediaWiki export"),
    "Latin-1": (b"<?xml version='1.0' encoding='ISO-8859-1'?>" + WHOLE, "its encoding is ISO-8859-1; convert it to UTF-8"),
    "half of UTF-16": (WHOLE.decode().encode("utf-16")[:-1], "not UTF-16, as its beginning is"),
    "no page": (dump(), "there is no <page> in it"),
    "nothing at all": (b"<mediawiki/>", "there is no <page> in it"),
    "a broken head": (dump(page(1)).replace(b"</siteinfo>", b""), "what stands before the first page is broken"),
    "a broken namespace": (dump(page(1)).replace(b'key="14"', b'key="x"'), "what stands before the first page is broken"),
    "a bad character in the head": (dump(page(1)).replace(b">Wikipedia<", b">\xff<"), "what stands before the first page"),
    "two dumps": (WHOLE + WHOLE, "expected <page>, found '</mediawiki>"),
    "a tail": (WHOLE + b"tail", "something follows </mediawiki>: 'tail'"),
    "only redirects": (
        dump(page(1, more="<redirect title='x' />")),
        "none of its 1 pages is kept: 1 redirects to other pages",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_dump_is_refused(tmp_path, case):
    data, reason = REFUSED[case]
    message = refusal(tmp_path, data)
    assert message.startswith("dump.xml:") or case == "only redirects"
    assert reason in message


def test_a_dump_cut_anywhere_names_its_last_whole_page(tmp_path, small_batches):
    source = random.Random(0)
    first, end = WHOLE.index(b"<page>"), WHOLE.rindex(b">") + 1
    for offset in [0, 1, first, first + 5, end - 1, *(source.randrange(end) for _ in range(45))]:
        whole = WHOLE[:offset].count(b"</page>")
        message = refusal(tmp_path, WHOLE[:offset])
        assert f"(at byte {offset} of the XML; " in message
        last = f"the last whole page is 'Title {whole}', id {whole})" if whole else "no whole page was read)"
        assert message.endswith(last)


@pytest.mark.parametrize("packing", ["one stream", "many streams", "gz", "xz"])
def test_an_archive_cut_anywhere_names_its_last_whole_page(tmp_path, small_batches, packing):
    source = random.Random(1)
    data = {
        "one stream": bz2.compress(WHOLE),
        "many streams": multistream(),
        "gz": gzip.compress(WHOLE),
        "xz": lzma.compress(WHOLE),
    }
    path = tmp_path / f"dump.xml.{packing if len(packing) == 2 else 'bz2'}"
    starts = [mark.start() for mark in bzip2._STREAM.finditer(data["many streams"])]
    ends = [*starts[1:], len(data["many streams"])]
    for offset in [0, 1, 9, 10, *(source.randrange(len(data[packing])) for _ in range(46))]:
        path.write_bytes(data[packing][:offset])
        message = refusal(tmp_path, path)
        assert message.startswith(f"{path.name}: ")
        if packing == "many streams":
            whole = 10 * max(0, sum(end <= offset for end in ends) - 1)
            found = int(re.search(r"(\d+)\)$", message)[1]) if "the last whole page is" in message else 0
            assert found in (whole, whole + 10)  # the last block may be there and the mark of the stream's end not
    (path.parent / "x").mkdir()
    good = write(path.parent / "x" / path.name, WHOLE)
    damaged = bytearray(good.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    assert "the compressed file is damaged or cut short" in refusal(tmp_path, path, max_bad=40)
    path.write_bytes(good.read_bytes() + b"tail")
    if path.suffix == ".bz2":
        assert "something else follows where its bzip2 data ends" in refusal(tmp_path, path)


def test_the_first_fault_is_told_whatever_the_number_of_workers(tmp_path, small_batches):
    data = dump(*PAGES[:20], page(21, text="&x;"), *PAGES[21:])[:-30]
    assert "Entity 'x'" in refusal(tmp_path, data) and "Entity 'x'" in refusal(tmp_path, data, workers=2)


# --- hostile dumps ---------------------------------------------------------------------------------------------------

LAUGHS = "".join(f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in itertools.pairwise("abcdefghij"))


def test_no_entity_is_ever_read(tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("do not read this", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.dtd"
        for doctype in (
            f'<!DOCTYPE mediawiki [<!ENTITY a "ha">{LAUGHS}]>',
            f'<!DOCTYPE mediawiki [<!ENTITY j SYSTEM "{canary.as_uri()}">]>',
            f'<!DOCTYPE mediawiki SYSTEM "{url}">',
            f'<!DOCTYPE mediawiki [<!ENTITY % p SYSTEM "{url}"> %p;]>',
        ):
            for before in (b"", XML_DECLARATION, b"<!-- x -->"):
                message = refusal(tmp_path, before + doctype.encode() + dump(page(1, text="&j;")))
                assert "it has a DOCTYPE, which no MediaWiki export has" in message
            assert "DOCTYPE" in refusal(tmp_path, (doctype + dump(page(1)).decode()).encode("utf-16"))
            hidden = dump(page(1), doctype + page(2, text="&j;"))
            assert "expected <page>, found '<!DOCTYPE" in refusal(tmp_path, hidden)
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_archives_that_never_end_are_stopped_in_little_memory(tmp_path):
    """A GiB each. Unpacked whole, it would be seen in the peak of memory of the process that reads them all."""
    opening = head().encode() + page(1).encode()
    text = opening + b"<page><title>b</title><id>2</id><revision><text>"
    packers = {".bz2": bz2.compress, ".gz": lambda data: gzip.compress(data, 1), ".xz": lzma.compress}
    for suffix, pack in packers.items():
        for name, start, fill in (("zeros", b"", b"\0"), ("spaces", b"", b" "), ("text", text, b"x"), ("tail", opening, b" ")):
            (tmp_path / f"{name}.xml{suffix}").write_bytes(pack(start) + pack(fill * 2**24) * 64)
    code = f"""
from pathlib import Path
from etude.corpus.wiki.extract import ExtractConfig, extract
from etude.errors import DataError
extract(ExtractConfig(input=({str(write(tmp_path / "good.xml", WHOLE))!r},), output={str(tmp_path / "good.jsonl")!r}, workers=1))
def peak():  # getrusage's would be that of the process that started this one, if it was larger
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = peak()
for path in sorted(Path({str(tmp_path)!r}).glob("*.xml.*")):
    try:
        extract(ExtractConfig(input=(str(path),), output="x.jsonl", workers=1, max_page_bytes=2**21))
    except DataError as error:
        print(error)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    *messages, kilobytes = done.stdout.splitlines()
    assert len(messages) == 12, done.stderr
    for message in messages:
        name = Path(message.partition(":")[0]).name.partition(".")[0]
        assert ("a page is longer than --max_page_bytes (2097152)" if name in ("text", "tail") else "begins with") in message
    assert int(kilobytes) < 100 * 2**10
    assert not (tmp_path / "x.jsonl").exists()


def test_pages_of_countless_tags_are_refused_unparsed(tmp_path):
    many = dump(page(1), page(2, text="<a/>" * 300_000))
    wide = dump(page(1), page(2, text="<a " + "".join(f"a{n}='' " for n in range(200_000)) + "/>"))
    for data in (many, wide):
        assert "the page has over 200000 tags, or one over 64 KiB" in refusal(tmp_path, data)
    long = dump(page(1), page(2, text="long " * 3_000_000))  # real pages may be long
    assert len(read(write(tmp_path / "long.xml", long))[1].text) == 15_000_000


def test_white_space_and_comments_take_linear_time(tmp_path):
    for data in (
        b" " * 2**21,
        b"<!---->" * 150_000,
        b"<!--" * 300_000,
        b"<?xml " + b" " * 2**20,
        head().encode() + b" " * 2**21,
    ):
        assert "no MediaWiki export" in refusal(tmp_path, data)
    assert "cut short" in refusal(tmp_path, dump(page(1))[:-13] + b" " * 2**21 + b"<")


# --- paths, processes and pipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output": ""}, "name an --output"),
        ({"output": "a\0.jsonl"}, "holds a zero byte"),
        ({"output": "a.parquet"}, "must end in .jsonl or .txt"),
        ({"output": "out.jsonl"}, "exists already"),
        ({"output": "link.jsonl"}, "exists already"),
        ({"output": "dump.jsonl", "input": ("dump.jsonl",), "force": True}, "is an input as well"),
        ({"output": "sub/../dump.jsonl", "input": ("dump.jsonl",), "force": True}, "is an input as well"),
        ({"output": ".", "shard_bytes": 10, "force": True}, "holds the input"),
        ({"output": "-", "shard_bytes": 10}, "a pipe has no shards"),
        ({"workers": -1}, "workers (-1) must be at least 0"),
        ({"max_page_bytes": 1000}, "max_page_bytes (1000) must be at least 1048576"),
        ({"input": ()}, "name an --input"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("dump.xml", "dump.jsonl", "out.jsonl"):
        write(tmp_path / name, WHOLE)
    os.symlink("nowhere", tmp_path / "link.jsonl")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(EtudeError) as caught:
        extract(ExtractConfig(**{"input": ("dump.xml",), "output": "new.jsonl", "workers": 1, **options}))
    assert message in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "dump.jsonl").read_bytes() == WHOLE


def run(*arguments: object, data: bytes = b"", **keywords) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, timeout=120, **keywords)


def test_the_script_from_pipe_to_pipe(tmp_path):
    (tmp_path / "dump.xml.bz2").write_bytes(multistream())
    (tmp_path / "in").mkdir()
    by_file = run("--input", "dump.xml.bz2", "--output", "../a.jsonl", "--workers", 2, cwd=tmp_path / "in")
    assert by_file.returncode == 65 and b"no such file" in by_file.stderr  # the working directory is another
    by_file = run("--input", "../dump.xml.bz2", "--output", "../a.jsonl", "--workers", 2, cwd=tmp_path / "in")
    assert by_file.returncode == 0 and b"read      40 pages" in by_file.stderr and by_file.stdout == b""
    piped = run("--input", "-", "--output", "-", "--workers", 1, data=WHOLE)
    assert piped.returncode == 0 and piped.stdout == (tmp_path / "a.jsonl").read_bytes()
    cut = run("--input", "-", "--output", tmp_path / "b.jsonl", data=WHOLE[:5000])
    assert cut.returncode == 65 and cut.stderr.startswith(b"error: -: the file is cut short") and cut.stderr.count(b"\n") == 1
    long = run("--input", tmp_path / "dump.xml.bz2", "--output", tmp_path / ("x" * 300 + ".jsonl"))
    assert long.returncode == 74 and b"File name too long" in long.stderr and b"Traceback" not in long.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "dump.xml.bz2", "in"]


def group_is_gone(pid: int) -> bool:
    """Whether all processes of the group that ``pid`` led end, the workers among them."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def long_dump(tmp_path) -> Path:
    """Takes some seconds to extract."""
    text = " ".join(f"[[Word {number}|word]] ''{number}'' {{{{lang|fr|mot}}}}" for number in range(3000))
    (tmp_path / "in").mkdir()
    return write(tmp_path / "in" / "dump.xml.gz", dump(*(page(number, text=text) for number in range(1, 60))))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills process groups")
def test_killed_at_any_moment_the_output_is_absent_or_whole(tmp_path, long_dump):
    source = random.Random(2)
    started = time.monotonic()
    whole = run("--input", long_dump, "--output", tmp_path / "whole.jsonl", "--workers", 2)
    seconds = time.monotonic() - started
    assert whole.returncode == 0, whole.stderr
    absent = 0
    for _ in range(20):
        output = tmp_path / "out" / "a.jsonl"
        command = [sys.executable, SCRIPT, "--input", str(long_dump), "--output", str(output), "--workers", "2"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(source.uniform(0.05, seconds))
        process.kill()
        process.wait()
        assert group_is_gone(process.pid)
        absent += not output.exists()
        assert not output.exists() or output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        output.unlink(missing_ok=True)
    assert absent > 5
    again = run("--input", long_dump, "--output", output, "--workers", 2)
    assert again.returncode == 0 and output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="interrupts process groups")
def test_interrupted_it_leaves_nothing(tmp_path, long_dump):
    for _ in range(3):
        command = [
            sys.executable,
            SCRIPT,
            "--input",
            str(long_dump),
            "--output",
            str(tmp_path / "out" / "a.jsonl"),
            "--workers",
            "2",
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        while not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out"):  # the first pages are written
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
        _, told = process.communicate(timeout=60)
        assert process.returncode == 130, told
        assert b"interrupted" in told and b"Traceback" not in told
        assert group_is_gone(process.pid) and os.listdir(tmp_path / "out") == []


def test_ahead_is_the_same_items_and_the_same_error():
    def failing():
        yield from range(10)
        raise ValueError("eleven")

    assert list(ahead(iter(range(100)), 3)) == list(range(100)) and list(ahead([], 3)) == []
    seen = []
    with pytest.raises(ValueError, match="eleven"):
        for item in ahead(failing(), 4):
            seen.append(item)
    assert seen == list(range(10))
    made = []
    items = ahead((made.append(n) or n for n in itertools.count()), 3)
    with contextlib.closing(items):
        assert next(items) == 0
        time.sleep(0.1)
    assert len(made) <= 5  # no further ahead than it was told, and it ends
