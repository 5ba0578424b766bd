"""Quality rules: every figure against a plain computation of it, and what the filter does with the rows."""

import json
import random
import re
import sys
from collections import Counter

import pytest
from conftest import TEXTS, write_jsonl

from etude.corpus.rows import quality
from etude.corpus.rows.languages import count_scripts, main_scripts
from etude.corpus.rows.measures import MEASURES, Texts
from etude.corpus.rows.quality import PRESETS, RULES, FilterConfig, rules_of, without_poor_lines
from etude.errors import DataError, UsageError


def texts_of_all_sorts(seed: int, count: int) -> list[str]:
    """Random texts of few different words, so that much repeats: English, Chinese, mixed; with lines and odd spacing."""
    source = random.Random(seed)
    english = [
        "the",
        "fox",
        "of",
        "a",
        "and",
        "lazy",
        "dogs",
        "jump",
        "internationalisation",
        "#tag",
        "...",
        "3.14",
        "naïve",
        "😀😀",
    ]
    chinese = list("春眠不觉晓处处闻啼鸟，。！《》“”……𠀀のカ")
    found = []
    for _ in range(count):
        pool = source.choice([english, chinese, english + chinese])
        pool = source.sample(pool, source.randrange(2, len(pool)))
        pieces = [source.choice(pool) for _ in range(source.randrange(1, 150))]
        found.append("".join(piece + source.choice(["", " ", " ", "\n", "  \t", "\n\n"]) for piece in pieces))
    return [text for text in found if text.strip()]


def words_of(text: str) -> list[str]:
    """The definition of a word, as a pattern."""
    separators = r"\s\u3001-\u3004\u3008-\u3020\u3030\uff01-\uff0f，。！？；：、《》“”…—·"
    alone = r"\u3005-\u3007\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
    return re.findall(rf"[{alone}]|[^{alone}{separators}]+", text)


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]


def plain_top(words: list[str], n: int) -> float:
    counts = Counter(ngrams(words, n))
    most = max((count * sum(map(len, gram)) for gram, count in counts.items() if count > 1), default=0)
    return min(1, most / sum(map(len, words)))


def plain_repeated(words: list[str], n: int) -> float:
    seen, covered = set(), set()
    for at, gram in enumerate(ngrams(words, n)):
        if gram in seen:
            covered |= set(range(at, at + n))
        seen.add(gram)
    return sum(len(words[at]) for at in covered) / sum(map(len, words))


@pytest.fixture(scope="module")
def sorts() -> list[str]:
    found = [*texts_of_all_sorts(0, 300), "one", "春", "a a a a a a a a", "x" * 5000, *TEXTS]
    found += ["y" * 64 + " " + "y" * 65 + " " + "y" * 64 + "z " + "y" * 65] * 2
    return [text for text in found if words_of(text)]


def test_words_are_counted_as_defined(sorts):
    assert MEASURES["words"](Texts(sorts), 0).tolist() == [len(words_of(text)) for text in sorts]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_top_ngram_is_what_counting_all_finds(sorts, n):
    expected = [plain_top(words_of(text), n) for text in sorts]
    assert MEASURES[f"top_{n}gram"](Texts(sorts), -1.0).tolist() == pytest.approx(expected)
    assert len(set(expected)) > 50


@pytest.mark.parametrize("n", range(5, 11))
def test_repeated_ngrams_are_what_a_set_of_all_finds(sorts, n):
    expected = [plain_repeated(words_of(text), n) for text in sorts]
    assert MEASURES[f"repeated_{n}grams"](Texts(sorts), -1.0).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in MEASURES if "gram" in name])
@pytest.mark.parametrize("limit", [0.05, 0.1, 0.2, 0.4])
def test_a_bound_never_decides_otherwise_than_the_figure(sorts, name, limit):
    exact, quick = (MEASURES[name](Texts(sorts), bound) for bound in (-1.0, limit))
    assert ((exact > limit) == (quick > limit)).all()
    assert (quick[quick > limit] == exact[quick > limit]).all()


def test_texts_do_not_depend_on_their_neighbours(sorts):
    together = {name: measure(Texts(sorts), -1.0) for name, measure in MEASURES.items()}
    for number in range(0, len(sorts), 9):
        for name, measure in MEASURES.items():
            found, expected = measure(Texts([sorts[number]]), -1.0)[0], together[name][number]
            assert found == expected or (found != found and expected != expected), (name, sorts[number])


def figure(name: str, text: str, limit: float = 99) -> float:
    return round(float(MEASURES[name](Texts([text]), limit)[0]), 4)


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("chars", "春😀 a", 4),
        ("sentences", "One. Two! Three? e.g. 3.14 (Four.) “Five.” no end", 6),
        ("sentences", "一。二！三？没完", 3),
        ("line_chars", "ab\n\nabcd\n  ", 4),
        ("mean_line_chars", "ab\n\nabcd\n  ", 3),
        ("symbols", "ab {} 春，", 0.5),
        ("digits", "ab 12", 0.5),
        ("mean_word_chars", "ab abcd", 3),
        ("symbols_per_word", "#a b... c… d……", 1),
        ("bullet_lines", "- a\n• b\n1. c\nd", 0.75),
        ("ellipsis_lines", "a...\nb… \nc\nd.", 0.5),
        ("alphabetic_words", "a 12 -- 春", 0.5),
        ("stop_words", "The cat and the dog, others have none", 3),
        ("stop_words", "我的书在这里", 4),
        ("stop_words", "bathe wither sandy", 0),
        ("repeated_lines", "a\nb\n\na\nc", 0.25),
        ("repeated_line_chars", "aaa\nb\naaa\nc", 0.375),
        ("repeated_paragraphs", "a\nb\n\na\nb\n\nc", 0.3333),
        ("repeated_paragraph_chars", "ab\n\nab\n\nc", 0.4),
    ],
)
def test_figures(name, text, expected):
    assert figure(name, text) == expected


def test_the_mean_length_of_words_does_not_judge_chinese():
    value = MEASURES["mean_word_chars"](Texts(["春眠不觉晓，处处闻啼鸟 abc"]), 3)[0]
    assert not value < 3 and not value > 10


# --- scripts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, script",
    [
        ("Hello 春", "Latin"), ("这个国家", "simplified"), ("這個國家", "traditional"), ("春眠不晓 abc", "Han"), ("123 …", "none"),
        ("これは本です", "Kana"), ("안녕하세요", "Hangul"), ("Привет", "Cyrillic"), ("γειά", "Greek"), ("नमस्ते", "Indic"),
    ],
)  # fmt: skip
def test_scripts(text, script):
    assert main_scripts(count_scripts([text, "another text", text])) == [script, "Latin", script]


# --- the filter ------------------------------------------------------------------------------------------------------


def run_filter(tmp_path, rows, **options) -> tuple[list[bytes], list[dict]]:
    """(lines kept, rejected rows) of the filter on these rows, which are texts or records."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": row} if isinstance(row, str) else row for row in rows])
    target = tmp_path / "out.jsonl"
    quality.filter(FilterConfig(input=(str(source),), output=str(target), force=True, **{"workers": 1, **options}))
    rejected = tmp_path / "out.jsonl.rejected.jsonl"
    lines = rejected.read_text("utf-8").splitlines() if rejected.exists() else []
    return target.read_bytes().splitlines(), [json.loads(line) for line in lines]


GOOD = "The fox and the dog have a house. It is warm there, and they live with two cats. Nobody minds that at all."


@pytest.mark.parametrize(
    "options, failing, reason",
    [
        ({"min_chars": 20}, "short", "chars 5 < 20"),
        ({"max_chars": 200}, GOOD * 2, "chars 212 > 200"),
        ({"min_words": 12}, "春眠不觉晓，处处闻啼鸟", "words 10 < 12"),
        ({"max_words": 30}, GOOD * 2, "words 45 > 30"),
        ({"max_symbols": 0.25}, "{}[]();;== a", "symbols 0.9091 > 0.25"),
        ({"max_digits": 0.2}, "call 12345", "digits 0.5556 > 0.2"),
        ({"max_line_chars": 110}, "x" * 111, "line_chars 111 > 110"),
        ({"keep_regex": r"\bfox\b"}, "a foxtrot", "keep_regex is not found"),
        ({"drop_regex": "(?i)buy now"}, "please Buy Now!", "drop_regex is found: 'Buy Now'"),
        ({"scripts": ("Latin",)}, "春眠不晓", "script Han"),
        ({"drop_placeholders": True}, "Lorem Ipsum dolor", "lorem ipsum"),
        ({"drop_code": True}, "int main() {", "a curly bracket"),
        ({"max_repeated_5grams": 0.15}, "one two three four five six seven. " * 5, "repeated_5grams 0.8 > 0.15"),
        ({"rules": ("repetition",)}, "again and\n" * 9, "repeated_lines 0.8889 > 0.3"),
        ({"rules": ("gopher",), "without": ("min_words",)}, "- x\n" * 20, "mean_word_chars 1 < 3"),
        ({"rules": ("c4",)}, "Only one sentence.", "sentences 1 < 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_rule_sets_aside_what_fails_it_with_the_figure(tmp_path, options, failing, reason):
    kept, rejected = run_filter(tmp_path, [GOOD, failing, GOOD], **options)
    assert kept == [json.dumps({"text": GOOD}).encode()] * 2
    expected = {"place": f"{tmp_path}/in.jsonl:2", "reason": reason, "line": json.dumps({"text": failing}, ensure_ascii=False)}
    assert rejected == [expected]


def test_languages(tmp_path):
    pytest.importorskip("py3langid")
    german = "Der Fuchs und der Hund wohnen in einem Haus, und es ist warm und gemütlich dort."
    kept, rejected = run_filter(
        tmp_path, [GOOD, german, "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"], languages=("en", "zh")
    )
    assert len(kept) == 2 and [row["reason"] for row in rejected] == ["language de"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    from etude.corpus.rows.languages import language_guesser

    language_guesser.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(UsageError, match="pip install py3langid"):
        run_filter(tmp_path, [GOOD], languages=("en",))
    language_guesser.cache_clear()


def test_prose_passes_every_preset_in_either_language(tmp_path):
    chinese = (
        "从前有一座山，山里有一座庙，庙里住着老和尚。他每天在院子里扫落叶，然后去井边挑水。"
        "有一天，小和尚问他为什么不累？老和尚笑了，说心里安静的人不会累。"
    )
    english = (
        f"{GOOD} Every morning one of them walks to the river to look for fish, while another cuts wood for the evening fire. "
        "So the days go by, one like another."
    )
    kept, rejected = run_filter(tmp_path, [english, chinese], rules=tuple(PRESETS))
    assert len(kept) == 2, rejected


def test_lines_come_out_byte_for_byte(tmp_path):
    lines = [rb'{"text" : "caf\u00e9 words",  "n": 1.0}', '{"id": 7, "text": "春 words"}'.encode(), b'{"text":"no"}']
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n".join(lines))
    quality.filter(FilterConfig(input=(str(source),), output=str(target), keep_regex="words", workers=1))
    assert target.read_bytes() == lines[0] + b"\n" + lines[1] + b"\n"


def test_workers_do_not_change_a_byte(tmp_path):
    rows = [*texts_of_all_sorts(1, 600), *TEXTS * 300]
    options = {"rules": ("repetition",), "min_words": 8, "c4_lines": False}
    assert run_filter(tmp_path, rows, workers=1, **options) == run_filter(tmp_path, rows, workers=2, **options)


def test_a_conversation_is_judged_by_its_joined_contents(tmp_path):
    def chat(reply: str) -> dict:
        return {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": reply}]}

    kept, rejected = run_filter(tmp_path, [chat("Yes."), chat("Because the fox said so.")], min_words=4)
    assert len(kept) == 1 and b"fox" in kept[0] and rejected[0]["reason"] == "words 2 < 4"


def test_c4_lines_are_cut_only_when_asked_and_counted(tmp_path, capsys):
    text = (
        "Menu\nThis line is long enough to stay.\nPlease enable JavaScript to see this page.\nToo short.\n这是一个很好的句子。"
    )
    assert without_poor_lines(text) == "This line is long enough to stay.\n这是一个很好的句子。"
    kept, rejected = run_filter(tmp_path, [text, "Menu", "This one stays as it is."], c4_lines=True)
    assert [json.loads(line)["text"] for line in kept] == [without_poor_lines(text), "This one stays as it is."]
    kept, rejected = run_filter(tmp_path, [text, "Menu", "This one stays as it is."], c4_lines=True, min_words=12)
    assert len(kept) == 1 and json.loads(rejected[0]["line"])["text"] == "Menu"  # set aside as it was
    assert json.loads(rejected[1]["line"])["text"] == "This one stays as it is."
    assert rejected[0]["reason"] == "no line is left" and "shortened 1 of the rows kept" in capsys.readouterr().err
    assert run_filter(tmp_path, [text], min_chars=1)[0] == [json.dumps({"text": text}, ensure_ascii=False).encode()]


def test_shortened_rows_keep_the_spelling_of_what_stays(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(
        b'{"n":1e5, "text": "Menu\\nThis line is long enough to stay.", "big" : 12345678901234567890123, "x": "\\u00e9"}\n'
    )
    quality.filter(FilterConfig(input=(str(source),), output=str(target), c4_lines=True, workers=1))
    kept = b'{"n": 1e5, "text": "This line is long enough to stay.", "big": 12345678901234567890123, "x": "\\u00e9"}\n'
    assert target.read_bytes() == kept


def test_a_dry_run_counts_and_writes_nothing(tmp_path, capsysbinary):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": GOOD}, {"text": "short"}])
    counts = quality.filter(FilterConfig(input=(str(source),), dry_run=True, min_chars=20, workers=1))
    out, err = capsysbinary.readouterr()
    assert counts == {"min_chars": 1} and out == b"" and b"kept      1 rows" in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_rows_end_the_job_or_are_set_aside(tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"text": GOOD}) + "\n{bad\n" + '{"other": 1}\n')
    with pytest.raises(DataError, match=r"in.jsonl:2: not valid JSON"):
        quality.filter(FilterConfig(input=(str(source),), output=str(target), min_chars=5, workers=1))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    quality.filter(FilterConfig(input=(str(source),), output=str(target), min_chars=5, workers=1, max_bad=2))
    rejected = [json.loads(line) for line in (tmp_path / "out.jsonl.rejected.jsonl").read_text().splitlines()]
    assert [row["place"] for row in rejected] == [f"{source}:2", f"{source}:3"]


def test_nothing_kept_is_an_empty_file_and_a_warning_but_no_row_at_all_is_an_error(tmp_path, capsys):
    kept, rejected = run_filter(tmp_path, ["a", "b"], min_chars=5)
    assert kept == [] and len(rejected) == 2 and "warning: no row passed the rules" in capsys.readouterr().err
    with pytest.raises(DataError, match="no row in it"):
        run_filter(tmp_path, [], min_chars=5)


def test_options_win_over_presets_and_rules_can_be_left_out():
    config = FilterConfig(rules=("gopher", "c4"), min_words=7, without=("max_words", "drop_code"))
    rules = rules_of(config)
    assert rules["min_words"] == 7 and rules["min_sentences"] == 3 and not {"max_words", "drop_code"} & set(rules)
    assert all(name in RULES for preset in PRESETS.values() for name in preset)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rules": ("goofer",)}, "there is no set 'goofer'; known: gopher, repetition, c4"),
        ({"without": ("words",)}, "there is no rule 'words'"),
        ({"scripts": ("Klingon",)}, "there is no script 'Klingon'; known: Latin"),
        ({"keep_regex": "("}, r"keep_regex \('\('\) is no regular expression"),
        ({"min_words": -1}, r"min_words \(-1\) must be at least 0"),
    ],
)
def test_what_cannot_work_is_said(options, message):
    with pytest.raises(UsageError, match=message):
        FilterConfig(**options)


def test_no_rule_is_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="no rule is on"):
        run_filter(tmp_path, [GOOD])
