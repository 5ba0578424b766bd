"""Keep the rows of a corpus that pass rules of length, language, pattern, repetition and quality.

The presets and their thresholds come from papers on English web text: ``gopher`` and ``repetition`` from Rae et al., "Scaling
Language Models: Methods, Analysis & Insights from Training Gopher" (2021), section A1.1 and table A1; ``c4`` from Raffel et
al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020), section 2.2. For Chinese a
Han character is a word (so 50 words are about 30 Chinese ones, and n-grams are shorter phrases), stop words are Chinese, 。！？
end sentences, and the mean length of words applies to texts of letters only. Repeats count from the second occurrence on.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from etude.cli import option
from etude.corpus.inputs import inputs_of
from etude.corpus.jsonl import Row, as_line
from etude.corpus.output import output_to, reading, require_kind, require_rows, summary, tell
from etude.corpus.rows.documents import Batch, batches, parsed, text_of
from etude.corpus.rows.languages import SCRIPTS, count_scripts, language_guesser, main_scripts
from etude.corpus.rows.measures import MEASURES, Texts
from etude.corpus.rows.options import INPUT, require_at_least
from etude.corpus.workers import in_order
from etude.errors import DataError, UsageError

PRESETS: dict[str, dict[str, Any]] = {
    "gopher": {
        "min_words": 50, "max_words": 100_000, "min_mean_word_chars": 3.0, "max_mean_word_chars": 10.0,
        "max_symbols_per_word": 0.1, "max_bullet_lines": 0.9, "max_ellipsis_lines": 0.3,
        "min_alphabetic_words": 0.8, "min_stop_words": 2,
    },
    "repetition": {
        "max_repeated_lines": 0.3, "max_repeated_paragraphs": 0.3,
        "max_repeated_line_chars": 0.2, "max_repeated_paragraph_chars": 0.2,
        "max_top_2gram": 0.20, "max_top_3gram": 0.18, "max_top_4gram": 0.16,
        "max_repeated_5grams": 0.15, "max_repeated_6grams": 0.14, "max_repeated_7grams": 0.13,
        "max_repeated_8grams": 0.12, "max_repeated_9grams": 0.11, "max_repeated_10grams": 0.10,
    },
    "c4": {"min_sentences": 3, "drop_placeholders": True, "drop_code": True},
}  # fmt: skip
C4_NOTICES = re.compile(
    "javascript|terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies|隐私政策|使用条款|使用.{0,3}cookie",
    re.IGNORECASE,
)
C4_LINE_END = re.compile(r"[.!?\"”。！？]\s*$")
C4_LINE_WORDS = 5


def limit(help: str, default: float = 0.0) -> Any:
    """An option that is off at 0."""
    return option(default, help)


@dataclass(frozen=True)
class FilterConfig:
    input: tuple[str, ...] = option((), INPUT)
    output: str = option("", "file for the rows kept, compressed by its ending, or - for standard output")
    force: bool = option(False, "overwrite the output if it exists")
    dry_run: bool = option(False, "only count; write nothing")
    max_bad: int = option(0, "rows that cannot be read to set aside before giving up")
    workers: int = option(0, "processes (0: one a core)")
    text_key: str = option("text", "key of the text; of conversations, the rules see all contents, one below the other")
    rules: tuple[str, ...] = option((), f"sets of rules with their papers' limits: {', '.join(PRESETS)}; your own limits win")
    without: tuple[str, ...] = option((), "rules of these sets to leave out, by the names below")
    languages: tuple[str, ...] = option((), "keep rows in these languages, such as zh en (needs py3langid)")
    scripts: tuple[str, ...] = option((), "keep rows mostly in these scripts, such as Latin simplified traditional Han")
    keep_regex: str = option("", "keep only rows in which this pattern is found (nested repeats can take for ever)")
    drop_regex: str = option("", "leave out rows in which this pattern is found")
    drop_placeholders: bool = option(False, "leave out rows that say lorem ipsum")
    drop_code: bool = option(False, "leave out rows with a curly bracket")
    min_chars: int = limit("characters (this and all limits: 0 is off)", 0)
    max_chars: int = limit("characters", 0)
    min_words: int = limit("words; a Han or Kana character is one", 0)
    max_words: int = limit("words", 0)
    min_sentences: int = limit("sentences, by . ! ? 。 ！ ？", 0)
    max_line_chars: int = limit("characters of the longest line", 0)
    max_mean_line_chars: float = limit("characters of a line, on average")
    max_symbols: float = limit("share of characters (not white space) that are no letters or digits; prose has 0.02 to 0.15")
    max_digits: float = limit("share of characters (not white space) that are digits")
    min_mean_word_chars: float = limit("characters of a word, on average; where most words are not Han or Kana")
    max_mean_word_chars: float = limit("the same, at most")
    max_symbols_per_word: float = limit("hash signs and ellipses by words")
    max_bullet_lines: float = limit("share of lines that begin with a bullet or number")
    max_ellipsis_lines: float = limit("share of lines that end with an ellipsis")
    min_alphabetic_words: float = limit("share of words with a letter")
    min_stop_words: int = limit("different words of: the be to of and that have with, or 的了是在不…", 0)
    max_repeated_lines: float = limit("share of lines that came before in the row")
    max_repeated_paragraphs: float = limit("the same of paragraphs")
    max_repeated_line_chars: float = limit("the same of lines, by characters")
    max_repeated_paragraph_chars: float = limit("the same of paragraphs, by characters")
    max_top_2gram: float = limit("share of characters in the pair of words that takes most")
    max_top_3gram: float = limit("the same of 3 words")
    max_top_4gram: float = limit("the same of 4 words")
    max_repeated_5grams: float = limit("share of characters in sequences of 5 words that came before in the row")
    max_repeated_6grams: float = limit("the same of 6 words")
    max_repeated_7grams: float = limit("the same of 7 words")
    max_repeated_8grams: float = limit("the same of 8 words")
    max_repeated_9grams: float = limit("the same of 9 words")
    max_repeated_10grams: float = limit("the same of 10 words")
    c4_lines: bool = option(
        False,
        f"first cut from texts the lines without final punctuation, of fewer than {C4_LINE_WORDS} words, or on cookies and JavaScript",
    )

    def __post_init__(self) -> None:
        for option_name, what, known in (
            ("rules", "set", PRESETS),
            ("without", "rule", RULES),
            ("scripts", "script", SCRIPTS[1:]),
        ):
            for name in getattr(self, option_name):
                if name not in known:
                    raise UsageError(f"{option_name}: there is no {what} {name!r}; known: {', '.join(known)}")
        for name in ("keep_regex", "drop_regex"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise UsageError(f"{name} ({getattr(self, name)!r}) is no regular expression: {error}") from None
        require_at_least(0, self, *(name for name in RULES if name[:4] in ("min_", "max_")), "max_bad", "workers")


RULES = [field.name for field in dataclasses.fields(FilterConfig)]
RULES = RULES[RULES.index("languages") : RULES.index("c4_lines")]


def rules_of(config: FilterConfig) -> dict[str, Any]:
    """The rules in force, in the order in which they are asked: presets, then the config's own, less ``without``."""
    chosen: dict[str, Any] = {}
    for name in config.rules:
        chosen |= PRESETS[name]
    chosen |= {name: value for name in RULES if (value := getattr(config, name))}
    return {name: chosen[name] for name in RULES if name in chosen and name not in config.without}


class Verdict(NamedTuple):
    place: str  # "file:line"
    line: bytes
    rule: str = ""  # the first that the row fails; "" for none
    reason: str = ""  # of what is left out; without a rule: why it cannot be read
    shortened: bytes = b""  # what is kept in the line's place


def filter(config: FilterConfig) -> Counter[str]:
    """Copy the rows that pass all rules; set the others aside with the first rule they fail and its figure.

    Returns the rows left out, by rule. Lines are copied byte for byte, but for texts that ``c4_lines`` shortens.
    """
    rules = rules_of(config)
    if not rules and not config.c4_lines:
        raise UsageError("no rule is on; choose a set with --rules gopher repetition, or limits such as --min_chars 100")
    if "languages" in rules:
        language_guesser()  # a missing package is told before the work
    files = inputs_of(config.input)
    require_kind(config.output or "-", [".jsonl"])
    judge = partial(judge_batch, rules=rules, text_key=config.text_key, c4_lines=config.c4_lines)
    where = "-" if config.dry_run else config.output
    with output_to(where, files, config.force) as output, reading("filter", files) as bar:
        rejects, edited = output.rejects(config.max_bad), 0
        for verdicts in in_order(judge, batches(files, bar), config.workers):
            for place, line, rule, reason, shortened in verdicts:
                if rule:
                    output.reject(place, reason, line, kind=rule)
                elif reason:
                    rejects.add(place, reason, line)
                elif config.dry_run:
                    output.kept, output.kept_bytes = output.kept + 1, output.kept_bytes + len(line) + 1
                else:
                    output.write_line(shortened or line)
                edited += bool(shortened) and not rule
        read = output.kept + output.reasons.total() - len(rejects.reasons)
        require_rows(read, files, rejects.reasons)
    if config.dry_run:
        tell("a dry run: nothing was written")
    summary(output, where)
    if edited:
        tell(f"shortened {edited:,} of the rows kept (--c4_lines)")
    if not output.kept:
        tell("warning: no row passed the rules")
    return output.reasons


def judge_batch(batch: Batch, rules: dict[str, Any], text_key: str, c4_lines: bool) -> list[Verdict]:
    """A verdict on each row of a batch, in order."""
    verdicts: list[Verdict] = []
    texts: dict[int, str] = {}  # of the rows that no rule failed as yet, by their place in verdicts
    for place, line, record, problem in parsed(batch):
        verdict = Verdict(place, line)
        try:
            if problem:
                raise DataError(problem)
            whole = text = text_of(record, text_key)
            if c4_lines and record.get(text_key) is not None:
                text = without_poor_lines(whole)
            if not text:
                verdict = Verdict(place, line, "c4_lines", "no line is left")
            else:
                if text != whole:
                    verdict = Verdict(place, line, shortened=as_line(record | {text_key: text}, Row(place, line, record)))
                texts[len(verdicts)] = text
        except DataError as error:
            verdict = Verdict(place, line, "", str(error))
        verdicts.append(verdict)
    places, measured = list(texts), Texts(list(texts.values()))
    for rule, bound in rules.items():
        if 2 * len(measured.failed) >= len(places):  # what is left deserves to be measured alone
            places = [place for number, place in enumerate(places) if number not in measured.failed]
            measured = Texts([texts[place] for place in places])
        for number, reason in failures(measured, rule, bound) if places else ():
            if number not in measured.failed:
                measured.failed.add(number)
                verdicts[places[number]] = verdicts[places[number]]._replace(rule=rule, reason=reason)
    if batch.broken:
        raise DataError(batch.broken)
    return verdicts


def failures(measured: Texts, rule: str, bound: Any) -> Iterator[tuple[int, str]]:
    """(number, reason) of each text that fails a rule."""
    kind, _, name = rule.partition("_")
    if kind in ("min", "max"):
        values = MEASURES[name](measured, bound)
        for number in (values < bound if kind == "min" else values > bound).nonzero()[0].tolist():
            value, limit = (f"{it:,.0f}" if isinstance(bound, int) else f"{it:.4g}" for it in (values[number], bound))
            yield number, f"{name} {value} {'<' if kind == 'min' else '>'} {limit}"
        return
    fails = failing_text(rule, bound)
    for number, text in enumerate(measured.texts):
        if number not in measured.failed and (reason := fails(text)):
            yield number, reason


def failing_text(rule: str, bound: Any) -> Callable[[str], str]:
    """A function that says why a text fails a rule that is no limit, or ""."""
    match rule:
        case "languages":
            language_of = language_guesser()
            return lambda text: "" if (found := language_of(text)) in bound else f"language {found}"
        case "scripts":
            return lambda text: "" if (found := main_scripts(count_scripts([text]))[0]) in bound else f"script {found}"
        case "keep_regex":
            search = re.compile(bound).search
            return lambda text: "" if search(text) else "keep_regex is not found"
        case "drop_regex":
            search = re.compile(bound).search
            return lambda text: f"drop_regex is found: {match[0][:80]!r}" if (match := search(text)) else ""
        case "drop_placeholders":
            return lambda text: "lorem ipsum" if "lorem ipsum" in text.lower() else ""
        case "drop_code":
            return lambda text: "a curly bracket" if "{" in text or "}" in text else ""
    raise AssertionError(rule)


def without_poor_lines(text: str) -> str:
    """A text without the lines that C4 cuts: no final punctuation, too few words, notices about cookies and JavaScript."""
    lines = [line for line in text.split("\n") if C4_LINE_END.search(line) and not C4_NOTICES.search(line)]
    if not lines:
        return ""
    words = Texts(lines).words.tolist()
    return "\n".join(line for line, count in zip(lines, words, strict=True) if count >= C4_LINE_WORDS)
