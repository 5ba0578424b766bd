"""Copies and near-copies: what is left out resembles what stays, what stays does not resemble itself, and no row is lost."""

import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import write_jsonl

from etude.corpus.rows import near
from etude.corpus.rows.dedup import DedupConfig, dedup, normalised
from etude.corpus.rows.external import Lines, Scatter, Verdicts, scratch_beside
from etude.corpus.rows.near import Groups, bands_of, candidate_share, shingles
from etude.errors import DataError, UsageError
from etude.files import clear_leftovers

# A command as a script calls it, in a process of its own: MODULE NAME OPTIONS...
COMMAND = """
import importlib, sys
from etude import cli
module = importlib.import_module(f"etude.corpus.rows.{sys.argv[1]}")
function, config = getattr(module, sys.argv[2]), getattr(module, f"{sys.argv[2].title()}Config")
cli.run(lambda: function(cli.parse(config, function.__doc__, sys.argv[3:])))
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", COMMAND, *map(str, arguments)]


def run(*arguments: object, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, timeout=120, **keywords)


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def rejected_of(path: Path) -> list[dict]:
    file = path.with_name(f"{path.name}.rejected.jsonl")
    return [json.loads(line) for line in lines_of(file)] if file.exists() else []


def files_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def rows(tmp_path) -> Path:
    """3000 rows, of which most occur several times, in several spellings of the JSON."""
    source = random.Random(0)
    with open(tmp_path / "rows.jsonl", "wb") as file:
        for _ in range(3000):
            text = source.choice(["Spring ", "spring", "春 眠", "春眠", "a.b", "ab", ""]) + str(source.randrange(150))
            record = {"text": text, "id": source.randrange(3)}
            file.write(
                json.dumps(record, ensure_ascii=source.random() < 0.5).encode() + source.choice([b"\n", b"\r\n", b" \n"])
            )
    return tmp_path / "rows.jsonl"


# ---- exact --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [(), ("case",), ("whitespace",), ("punctuation",), ("case", "whitespace", "punctuation")])
def test_exact_copies_are_those_that_a_dict_finds(rows, tmp_path, normalise):
    dedup(DedupConfig(input=(str(rows),), output=str(tmp_path / "out.jsonl"), normalise=normalise, workers=1))
    first: dict[str, int] = {}
    kept, copies = [], []
    for number, line in enumerate(lines_of(rows), 1):
        key = normalised(json.loads(line)["text"], normalise)
        if key in first:
            copies.append((f"{rows}:{number}", f"duplicate of {rows}:{first[key]}", line.rstrip(b"\r\n").decode()))
        else:
            first[key] = number
            kept.append(line.rstrip(b"\r\n") + b"\n")
    assert lines_of(tmp_path / "out.jsonl") == kept and len(kept) < 1100
    found = [(row["place"], row["reason"], row["line"]) for row in rejected_of(tmp_path / "out.jsonl")]
    assert found == copies


def test_what_normalising_takes_away():
    text = "  Don't\tSTOP,\n\n春眠。 ①_x  "
    assert normalised(text, ()) == text
    assert normalised(text, ("case",)) == text.casefold()
    assert normalised(text, ("whitespace",)) == "Don't STOP, 春眠。 ①_x"
    assert normalised(text, ("punctuation", "whitespace", "case")) == "dont stop 春眠 ①x"


def test_the_key_is_the_text_the_conversation_or_the_line(tmp_path, capsys):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    share = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    records = [
        {"text": "a", "n": 1},
        {"text": "a", "n": 2},
        {"text": "a", "n": 1},
        {"messages": chat},
        {"conversations": share},
    ]
    path = write_jsonl(tmp_path / "in.jsonl", records)
    kept = {}
    for key in ("text", "line"):
        dedup(DedupConfig(input=(str(path),), output=str(tmp_path / f"{key}.jsonl"), key=key, workers=1))
        kept[key] = [json.loads(line) for line in lines_of(tmp_path / f"{key}.jsonl")]
    assert kept["text"] == [records[0], records[3]]
    assert kept["line"] == [records[0], records[1], records[3], records[4]]
    assert "3  duplicate" in capsys.readouterr().err


def test_bad_rows_are_named_and_never_kept(tmp_path):
    lines = [b"\xef\xbb\xbf" + b'{"text": "a"}', b"", b"nonsense", b'{"text": "a"}', b'{"body": 1}', b'{"text": "b"}']
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"in.jsonl:3: not valid JSON .*; mend the record"):
        dedup(DedupConfig(input=(str(path),), output=str(tmp_path / "out.jsonl"), workers=1))
    assert files_in(tmp_path) == ["in.jsonl"]
    dedup(DedupConfig(input=(str(path),), output=str(tmp_path / "out.jsonl"), max_bad=2, workers=1))
    assert lines_of(tmp_path / "out.jsonl") == [b'{"text": "a"}\n', b'{"text": "b"}\n']
    assert [row["place"] for row in rejected_of(tmp_path / "out.jsonl")] == [f"{path}:{line}" for line in (3, 5, 4)]


def test_copies_are_found_across_files_packed_and_piped(rows, tmp_path):
    lines = lines_of(rows)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(b"".join(lines[:1000]))
    import gzip

    (tmp_path / "in/b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[1000:2000])))
    dedup(DedupConfig(input=(str(rows),), output=str(tmp_path / "one.jsonl"), workers=1))
    done = run("dedup", "dedup", "--input", tmp_path / "in", "-", "--output", "-", input=b"".join(lines[2000:]))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "one.jsonl").read_bytes()
    done = run("dedup", "dedup", "--input", "-", "--output", tmp_path / "two.jsonl.gz", input=b'{"text": "a"}\n\n' * 2)
    assert done.returncode == 0 and rejected_of(tmp_path / "two.jsonl.gz")[0]["reason"] == "duplicate of -:1", done.stderr
    assert files_in(tmp_path) == ["in", "one.jsonl", "one.jsonl.rejected.jsonl", "rows.jsonl", "two.jsonl.gz",
                                  "two.jsonl.gz.rejected.jsonl"]  # fmt: skip


@pytest.mark.parametrize(
    "options, message",
    [
        ({"key": "words"}, r"key \(words\) must be one of text, line"),
        ({"normalise": ("colour",)}, r"normalise \(colour\) must be one of case, whitespace, punctuation"),
        ({"key": "line", "near": True}, "near and normalise look at texts"),
        ({"threshold": 0.0}, r"threshold \(0.0\) must be above 0 and at most 1"),
        ({"ngram": 0}, r"ngram \(0\) must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        DedupConfig(**options)


def test_an_output_that_is_there_or_read_is_refused_and_nothing_is_left(rows, tmp_path):
    (tmp_path / "out.jsonl").write_text("old")
    for output, message in (("out.jsonl", "exists already"), ("rows.jsonl", "is an input as well")):
        with pytest.raises(UsageError, match=message):
            dedup(DedupConfig(input=(str(rows),), output=str(tmp_path / output)))
    assert files_in(tmp_path) == ["out.jsonl", "rows.jsonl"] and (tmp_path / "out.jsonl").read_text() == "old"


def test_without_its_package_near_is_a_usage_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    DedupConfig()
    with pytest.raises(UsageError, match=r'near-duplicates need a package: pip install "rensa'):
        DedupConfig(near=True)


# ---- nearly -------------------------------------------------------------------------------------------------------------


def sentences(source: random.Random, words: int, chinese: bool) -> list[str]:
    if chinese:
        return [chr(source.randrange(0x4E00, 0x4E00 + 2000)) for _ in range(words)]
    return ["".join(source.choices(string.ascii_lowercase, k=source.randrange(2, 8))) for _ in range(words)]


def alike_texts() -> list[str]:
    """60 families of an original and five copies of it with more and more words replaced, mixed; half of them in Chinese."""
    source, texts = random.Random(1), []
    for family in range(60):
        words = sentences(source, source.randrange(60, 300), family % 2 == 0)
        for copy in range(6):
            changed = list(words)
            for place in source.sample(range(len(words)), int(len(words) * copy * 0.008)):
                changed[place] = sentences(source, 1, family % 2 == 0)[0]
            texts.append(("" if family % 2 == 0 else " ").join(changed))
    source.shuffle(texts)
    return texts


def jaccard(one: str, other: str) -> float:
    first, second = (set(shingles(text, 5).tolist()) for text in (one, other))
    return len(first & second) / len(first | second)


def test_near_duplicates_are_those_that_comparing_all_pairs_finds(tmp_path):
    pytest.importorskip("rensa")
    texts = alike_texts()
    path = write_jsonl(tmp_path / "in.jsonl", ({"text": text} for text in texts))
    dedup(DedupConfig(input=(str(path),), output=str(tmp_path / "out.jsonl"), near=True, workers=1))
    kept = [json.loads(line)["text"] for line in lines_of(tmp_path / "out.jsonl")]
    left_out = rejected_of(tmp_path / "out.jsonl")
    assert len(kept) + len(left_out) == len(texts) and 60 <= len(kept) < 250
    exact = nearly = 0
    for row in left_out:
        text, reason = json.loads(row["line"])["text"], row["reason"]
        model = texts[int(reason.split(":")[1].split()[0]) - 1]
        if reason.startswith("duplicate"):
            exact += 1
            assert model == text
        else:
            nearly += 1
            estimate = float(reason.rpartition("(")[2].rstrip(")"))
            true = jaccard(model, text)
            assert estimate >= 0.8 and true > 0.7 and abs(estimate - true) < 0.12 and model in kept
            assert texts.index(model) < int(row["place"].rpartition(":")[2]) - 1  # the first of them stays
    assert exact >= 1 and nearly > 50
    # What stays is not clearly alike: every pair is compared.
    sets = [set(shingles(text, 5).tolist()) for text in kept]
    missed = [
        len(one & other) / len(one | other)
        for place, one in enumerate(sets)
        for other in sets[:place]
        if not one.isdisjoint(other)
    ]
    assert max(missed) < 0.9 and len(missed) > 50


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_catch_the_promised_share_of_pairs_at_the_threshold(threshold):
    pytest.importorskip("rensa")
    bands, rows = bands_of(threshold, 128)
    assert bands * rows <= 128 and candidate_share(threshold, bands, rows) >= 0.98
    assert rows == 128 or candidate_share(threshold, 128 // (rows + 1), rows + 1) < 0.98
    # And so they do with real signatures: pairs of sets of that similarity that agree in some band.
    source, pairs, found = random.Random(2), 150, 0
    for _ in range(pairs):
        words = sentences(source, 400, True)
        common = round(2 * 200 * threshold / (1 + threshold))
        texts = [" ".join(words[:200]), " ".join(words[:common] + words[200 : 400 - common])]
        _, (one, other) = near.signatures(texts, 1, 128)
        same = (one == other)[: bands * rows].reshape(bands, rows)
        found += same.all(1).any()
    assert found >= 0.95 * pairs


def test_shingles_are_runs_of_words_and_han_characters():
    def count(text: str, ngram: int = 2) -> int:
        return len(set(shingles(text, ngram).tolist()))

    assert count("one two three") == 2 and count("春眠不觉") == 3 and count("Etude 春眠") == 2
    assert shingles("One, two; THREE!", 2).tolist() == shingles("one two three", 2).tolist()
    assert shingles("春眠，不觉。", 2).tolist() == shingles("春 眠 不觉", 2).tolist()
    assert set(shingles("a b c", 2).tolist()).isdisjoint(shingles("b a", 2).tolist())  # the order counts
    assert len(shingles("one", 5)) == 1 and len(shingles("", 5)) == len(shingles("... !", 5)) == 0


def test_texts_without_words_and_with_few_stay_apart(tmp_path):
    pytest.importorskip("rensa")
    texts = ["!", "?", "...", "yes", "no", "Yes.", "!"]
    path = write_jsonl(tmp_path / "in.jsonl", ({"text": text} for text in texts))
    dedup(DedupConfig(input=(str(path),), output=str(tmp_path / "out.jsonl"), near=True, workers=1))
    assert [json.loads(line)["text"] for line in lines_of(tmp_path / "out.jsonl")] == ["!", "?", "...", "yes", "no"]
    reasons = [row["reason"].replace(str(path), "in") for row in rejected_of(tmp_path / "out.jsonl")]
    assert reasons == ["near-duplicate of in:4 (1.00)", "duplicate of in:1"]
    write_jsonl(path, [{"text": "!"}])
    dedup(DedupConfig(input=(str(path),), output=str(tmp_path / "none.jsonl"), near=True, workers=1))
    assert len(lines_of(tmp_path / "none.jsonl")) == 1


def test_the_number_of_workers_does_not_show(tmp_path, monkeypatch):
    pytest.importorskip("rensa")
    path = write_jsonl(tmp_path / "in.jsonl", ({"text": text} for text in alike_texts() * 2))
    for workers in (1, 3):
        dedup(DedupConfig(input=(str(path),), output=str(tmp_path / f"{workers}.jsonl"), near=True, workers=workers))
    monkeypatch.setattr(Scatter, "WAITING_BYTES", 1000)  # nor does how much waits in memory
    monkeypatch.setattr(Verdicts, "RANGE", 7)
    monkeypatch.setattr(near, "CHUNK", 50)
    dedup(DedupConfig(input=(str(path),), output=str(tmp_path / "small.jsonl"), near=True, workers=1))
    for end in ("jsonl", "jsonl.rejected.jsonl"):
        one, three, small = ((tmp_path / f"{name}.{end}").read_bytes() for name in (1, 3, "small"))
        assert one == three == small and len(one) > 10_000


def test_groups_are_the_connected_parts():
    np = pytest.importorskip("numpy")
    source, count = random.Random(3), 400
    edges = [(source.randrange(count), source.randrange(count)) for _ in range(180)]
    groups, expected = Groups(count), list(range(count))
    for one, other in edges:
        groups.join(one, other)
        low, high = sorted((expected[one], expected[other]))
        expected = [low if root == high else root for root in expected]
    assert groups.roots(np.arange(count)).tolist() == expected
    firsts, members = groups.members()
    assert list(zip(firsts.tolist(), members.tolist(), strict=True)) == sorted(
        (root, number) for number, root in enumerate(expected) if root != number
    )


# ---- on the disk --------------------------------------------------------------------------------------------------------


def test_verdicts_come_back_for_any_stretch_of_lines(tmp_path, monkeypatch):
    np = pytest.importorskip("numpy")
    monkeypatch.setattr(Verdicts, "RANGE", 10)
    monkeypatch.setattr(Scatter, "WAITING_BYTES", 100)
    verdicts, expected, source = Verdicts(tmp_path / "v"), [Verdicts.KEEP] * 95, random.Random(4)
    for value in range(40):
        line = source.randrange(95)
        verdicts.add(np.array([line]), np.array([value]), value / 64)  # of two on a line the later one counts
        expected[line] = value
    for start, length in [(0, 95), (7, 3), (7, 4), (10, 10), (29, 42), (50, 0)]:
        found, shares = verdicts.of(start, length)
        assert found.tolist() == expected[start : start + length]
        assert all(share == value / 64 for value, share in zip(found.tolist(), shares.tolist(), strict=True) if value >= 0)


def test_an_input_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b"}])
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": "c"}] * 3)
    lines = Lines([path, other], tmp_path)
    for _ in range(2):
        assert [(first, len(batch.lines)) for first, batch in lines.batches()] == [(0, 2), (2, 3)]
    assert [lines.place(number) for number in range(5)] == [f"{path}:1", f"{path}:2", *(f"{other}:{n}" for n in (1, 2, 3))]
    write_jsonl(path, [{"text": "a"}])
    with pytest.raises(DataError, match=r"in.jsonl: has changed while it was being read"):
        list(lines.batches())


def test_a_damaged_archive_is_an_error_and_leaves_nothing(tmp_path, rows):
    import gzip

    packed = gzip.compress(rows.read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"cut.jsonl.gz:\d+: the compressed file is damaged or cut short"):
        dedup(DedupConfig(input=(str(tmp_path / "cut.jsonl.gz"),), output=str(tmp_path / "out.jsonl"), workers=1))
    assert files_in(tmp_path) == ["cut.jsonl.gz", "rows.jsonl"]


def test_leftovers_of_dead_processes_go_and_others_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, living = os.getpid(), os.getppid()
    gone = [f".out.jsonl.{dead.pid}.tmp", f".out.jsonl.{dead.pid}.ab_1.tmp"]
    stay = [f".out.jsonl.{living}.tmp", f".out.jsonl.{mine}.tmp", f".out.jsonl.{dead.pid}.ab.old.tmp", f".other.jsonl.{dead.pid}.tmp", "out.jsonl",
            f".out.jsonl.{dead.pid}.txt", ".out.jsonl.tmp"]  # fmt: skip
    for name in gone + stay:
        if "ab_1" in name:
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text("x")
        else:
            (tmp_path / name).write_text("x")
    clear_leftovers(tmp_path / "out.jsonl")
    assert files_in(tmp_path) == sorted(stay)
    with scratch_beside(str(tmp_path / "out.jsonl")) as scratch:
        assert scratch.parent == tmp_path and scratch.is_dir()
        clear_leftovers(tmp_path / "out.jsonl")
        assert scratch.is_dir()
    assert files_in(tmp_path) == sorted(stay)


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory) -> Path:
    """Some megabytes with copies and near-copies."""
    source, texts = random.Random(5), []
    for _ in range(6000):
        texts.append(" ".join(sentences(source, 60, False)))
        if source.random() < 0.5:
            texts.append(source.choice(texts[-500:]) + source.choice(["", " more"]))
    return write_jsonl(tmp_path_factory.mktemp("many") / "in.jsonl", ({"text": text} for text in texts))


def killed(arguments: list[object], delay: float, number: int = signal.SIGKILL) -> subprocess.Popen:
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, start_new_session=True)
    time.sleep(delay)
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    return process


def survives_kills(arguments: list[object], output: Path) -> None:
    """Whenever it is killed, the output is absent or whole; the next run clears up and writes the same bytes."""
    started = time.monotonic()
    assert run(*arguments).returncode == 0
    took, whole, source = time.monotonic() - started, output.read_bytes(), random.Random(6)
    rejected = rejected_of(output)
    left_over = 0
    for _ in range(10):
        output.unlink(missing_ok=True)
        killed(arguments, took * source.uniform(0.2, 1))
        assert not output.exists() or output.read_bytes() == whole
        left_over += any(name.endswith(".tmp") for name in files_in(output.parent))
    if not left_over:
        pytest.skip("every kill came too early or too late to prove anything")
    done = run(*arguments, "--force")
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == whole and rejected_of(output) == rejected
    assert [name for name in files_in(output.parent) if name.endswith(".tmp")] == []


@pytest.mark.slow
def test_killed_at_any_moment_the_output_is_absent_or_whole(many_rows, tmp_path):
    pytest.importorskip("rensa")
    output = tmp_path / "out.jsonl"
    survives_kills(["dedup", "dedup", "--input", many_rows, "--output", output, "--near", "--workers", 2], output)
    assert len(lines_of(output)) + len(rejected_of(output)) == len(lines_of(many_rows))


def interrupted(arguments: list[object], folder: Path) -> subprocess.Popen:
    """A run that gets Ctrl-C once its temporary files are there."""
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(folder.glob(".*.tmp/*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    process.err = process.communicate(timeout=60)[1]
    return process


def test_ctrl_c_leaves_no_temporary_file(many_rows, tmp_path):
    process = interrupted(
        ["dedup", "dedup", "--input", many_rows, "--output", tmp_path / "out.jsonl", "--workers", 2], tmp_path
    )
    assert process.returncode == 130 and "interrupted" in process.err and "Traceback" not in process.err, process.err
    assert files_in(tmp_path) == []


# Memory is to stay the same however long the input is, but for what a NearIndex says of itself.
PEAK = """
import resource, subprocess, sys
before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(*arguments: object) -> int:
    """Bytes that a command's process held at most, in memory."""
    done = subprocess.run([sys.executable, "-c", PEAK, *command(*arguments)], capture_output=True, text=True, check=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(many_rows, tmp_path):
    data = many_rows.read_bytes()
    large = tmp_path / "large.jsonl"
    with open(large, "wb") as file:
        for copy in range(40):
            file.write(data.replace(b'{"text": "', b'{"text": "%d ' % copy))
    small, big = (
        peak_memory("dedup", "dedup", "--input", path, "--output", tmp_path / "out.jsonl", "--force", "--workers", 1)
        for path in (many_rows, large)
    )
    assert big - small < 24 * 2**20 < large.stat().st_size / 4
