"""Which encoding a file has: right, or refused, but never a guess that makes other characters of it."""

import codecs
import random
import tracemalloc

import pytest

from etude.corpus.texts.encodings import detect, named, open_text
from etude.errors import DataError, UsageError

NOVEL = (
    "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。汉朝自高祖斩白蛇而起义，一统天下，"
    "后来光武中兴，传至献帝，遂分为三国。推其致乱之由，殆始于桓、灵二帝。\n今天我们去学校，老师说：“你们要好好学习！”大家都很高兴，因为明天不用上课了。\n"
)
POEM = (
    "春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。\n國破山河在，城春草木深。感時花濺淚，恨別鳥驚心。\n"
    "我們今天沒有時間，明天再說吧！這個問題很難。\n"
)
JAPANESE = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いていた。\n"
)
KOREAN = "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을 부여받았다.\n"
RUSSIAN = "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом и совестью.\n"
FRENCH = "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ça, c'était l'été à Orléans.\n"


def read(path, encoding: str = "") -> tuple[str, str]:
    with open_text(path, encoding) as (found, chunks):
        return found.name, "".join(chunks)


@pytest.mark.parametrize(
    "text, codec, name",
    [
        (NOVEL, "utf-8", "utf-8"),
        (NOVEL, "utf-8-sig", "utf-8"),
        (NOVEL, "gb18030", "gb18030"),
        (NOVEL, "gb2312", "gb18030"),
        (POEM, "gb18030", "gb18030"),
        (POEM, "big5", "big5"),
        (NOVEL, "utf-16", "utf-16-le"),
        (codecs.BOM_UTF16_BE.decode("utf-16-be") + POEM, "utf-16-be", "utf-16-be"),
        (NOVEL, "utf-16-le", "utf-16-le"),
        (POEM, "utf-16-be", "utf-16-be"),
        (NOVEL, "utf-32", "utf-32-le"),
        (NOVEL, "utf-32-be", "utf-32-be"),
        ("plain words\n", "ascii", "utf-8"),
        ("plain words\n", "utf-16-le", "utf-16-le"),
        (FRENCH, "utf-8", "utf-8"),
        ("naïve", "utf-8", "utf-8"),
        ("One line of English. " * 200 + NOVEL, "gb18030", "gb18030"),
    ],
)
def test_an_encoding_is_found_and_the_text_is_the_same(tmp_path, text, codec, name):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(codec))
    assert read(path) == (name, text.removeprefix("\ufeff"))


@pytest.mark.parametrize(
    "text, codec, hint",
    [
        (JAPANESE, "shift_jis", "shift_jis"),
        (JAPANESE, "euc_jp", "euc_jp"),
        (JAPANESE, "iso2022_jp", "iso2022_jp"),
        (KOREAN, "euc_kr", "euc_kr"),
        (RUSSIAN, "cp1251", "cp1251"),
        (RUSSIAN, "koi8-r", "koi8-r"),
        (FRENCH, "latin-1", "latin-1"),
    ],
)
@pytest.mark.parametrize("times", [1, 200])
def test_what_is_no_chinese_is_refused_with_its_name_and_read_once_named(tmp_path, text, codec, hint, times):
    path = tmp_path / "a.txt"
    path.write_bytes((text * times).encode(codec))
    with pytest.raises(DataError, match=rf"a.txt: .*{hint}.*--encoding") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert read(path, codec)[1] == text * times


def pieces(text: str, length: int, count: int):
    source = random.Random(length)
    starts = [source.randrange(len(text) - length) for _ in range(count)]
    return [text[at : at + length] for at in starts]


@pytest.mark.parametrize("length", [5, 10, 20, 40])
def test_a_short_piece_is_read_rightly_or_refused(length):
    for text, codec in [(NOVEL, "gb18030"), (POEM, "big5"), (POEM, "gb18030"), (JAPANESE, "cp932"), (JAPANESE, "euc_jp"),
                        (KOREAN, "cp949"), (RUSSIAN, "cp1251"), (RUSSIAN, "koi8-r"), (FRENCH, "cp1252")]:  # fmt: skip
        right = 0
        for piece in pieces(text, length, 40):
            data = piece.encode(codec)
            try:
                found = detect(data)
            except DataError:
                continue
            assert data.decode(found.codec) == piece, (piece, codec, found)
            right += not data.isascii()
        assert right >= 36 or length < 20 or text not in (NOVEL, POEM), (codec, right)
        assert right == 0 or text in (NOVEL, POEM)


def test_what_is_no_text_is_refused():
    for data in (
        bytes(range(256)) * 20,
        bytes(4096),
        random.Random(0).randbytes(5000),
        b"PK\x03\x04" + random.Random(1).randbytes(900),
    ):
        with pytest.raises(DataError):
            detect(data)


@pytest.mark.parametrize("codec", ["utf-8", "gb18030", "big5", "utf-16-le"])
@pytest.mark.parametrize("times", [1, 4000])
def test_the_first_bad_byte_is_named_by_line_and_offset(tmp_path, codec, times):
    text = POEM * times
    for bad in (b"\xff", b"\xd8\x00\xd8") if codec != "utf-16-le" else (b"\x00\xdc",):
        before, after = (text + "他們").encode(codec), POEM.encode(codec)
        path = tmp_path / "a.txt"
        path.write_bytes(before + bad + after)
        with pytest.raises(UnicodeDecodeError) as whole:
            path.read_bytes().decode({"big5": "cp950"}.get(codec, codec))
        with pytest.raises(DataError) as error:
            read(path, codec if codec != "big5" else "cp950")
        start = whole.value.start
        assert start >= len(before)
        byte = path.read_bytes()[start]
        line = path.read_bytes()[:start].decode({"big5": "cp950"}.get(codec, codec)).count("\n") + 1
        assert f"a.txt:{line}: not " in str(error.value) and f"(byte 0x{byte:02x} at offset {start})" in str(error.value)


def test_a_bad_byte_is_found_with_the_encoding_found_out(tmp_path):
    for text, codec in [(NOVEL, "utf-8"), (NOVEL, "gb18030"), (POEM, "big5")]:
        data = (text * 30).encode(codec)
        for at in (len(text.encode(codec)), len(data)):  # within what the encoding is found out by, and at the file's end
            (tmp_path / "a.txt").write_bytes(data[:at] + b"\xff" + data[at:])
            with pytest.raises(DataError, match=rf"not {codec} \(byte 0xff at offset {at}\)"):
                read(tmp_path / "a.txt")
        (tmp_path / "a.txt").write_bytes((text + "春").encode(codec)[:-1])  # a character cut by the end
        with pytest.raises(DataError, match=rf"not {codec} \(byte .* at offset {len(text.encode(codec))}\)"):
            read(tmp_path / "a.txt")


@pytest.mark.parametrize("times", [2, 400])  # within what the encoding is found out by, and far behind it
@pytest.mark.parametrize("text, codec", [(NOVEL, "gb18030"), (POEM, "big5")])
def test_what_was_added_in_utf_8_is_never_misread(tmp_path, text, codec, times):
    path = tmp_path / "a.txt"
    for tail in ("中文中文", "转载请注明出处\n", "by 他人 中文\nend\n", NOVEL):
        path.write_bytes((text * times).encode(codec) + tail.encode("utf-8"))
        with pytest.raises(
            DataError, match=r"a.txt:\d+: (is UTF-8, where the file begins as|not) |too little|no encoding known"
        ):
            read(path)
    path.write_bytes((text * times).encode(codec) + "中文中文".encode())
    if codec == "gb18030":  # all of it is valid in it, too
        with pytest.raises(DataError, match=rf"a.txt:{2 * times + 1}: is UTF-8, where the file begins as gb18030"):
            read(path)
        assert read(path, codec)[1].startswith(text)  # named, it is taken at its word


def test_a_text_that_ends_as_utf_8_could_is_told_all_the_same(tmp_path):
    """Its last characters are ASCII, or by chance valid UTF-8 of two bytes each."""
    path = tmp_path / "a.txt"
    for tail in ("\nThe end.\n" * 300, "\n怒女\n", "\n浓农弄奴努怒女暖虐疟\n"):
        path.write_bytes((NOVEL * 100 + tail).encode("gb18030"))
        assert read(path) == ("gb18030", NOVEL * 100 + tail)


def test_names_of_encodings(tmp_path):
    (tmp_path / "a.txt").write_bytes(JAPANESE.encode("shift_jis"))
    assert read(tmp_path / "a.txt", "Shift-JIS") == ("shift_jis", JAPANESE)
    for wrong in ("klingon", "rot13", "base64", "zip", "a\0b"):
        with pytest.raises(UsageError, match="encoding"):
            named(wrong)
    with pytest.raises(DataError, match=r"a.txt:1: not gb18030|a.txt:1: not ascii"):
        read(tmp_path / "a.txt", "ascii")


def test_a_damaged_archive_is_an_error(tmp_path):
    import gzip

    packed = gzip.compress(random.Random(0).randbytes(20_000).hex().encode())
    (tmp_path / "a.txt.gz").write_bytes(packed[:-2000])
    with pytest.raises(DataError, match=r"a.txt.gz: the compressed file is damaged or cut short"):
        read(tmp_path / "a.txt.gz")


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "a.txt"
    with open(path, "wb") as file:
        for _ in range(40):
            file.write((NOVEL * 1500).encode("gb18030"))  # without end 40 times 0.5 MB
    tracemalloc.start()
    with open_text(path) as (found, chunks):
        assert sum(map(len, chunks)) == 40 * 1500 * len(NOVEL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.name == "gb18030" and peak < path.stat().st_size / 2 and peak < 12 * 2**20
