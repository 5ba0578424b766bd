"""Shuffle, split, merge and sample: the rows are the ones that went in, byte for byte, where they are promised to be."""

import json
import os
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import write_jsonl
from test_dedup import (
    alike_texts,
    files_in,
    interrupted,
    killed,
    lines_of,
    many_rows,  # noqa: F401
    peak_memory,
    rejected_of,
    run,
    survives_kills,
)

from etude.corpus.rows import arrange, deal
from etude.corpus.rows.arrange import MergeConfig, SampleConfig, ShuffleConfig, merge, sample, shuffle
from etude.corpus.rows.deal import SplitConfig, part_of, split
from etude.corpus.rows.near import shingles
from etude.errors import DataError, UsageError


@pytest.fixture
def rows(tmp_path) -> Path:
    """2000 different rows, in several spellings of the JSON and lengths, one of them long."""
    source = random.Random(0)
    with open(tmp_path / "rows.jsonl", "wb") as file:
        for number in range(2000):
            text = "春x" * (20_000 if number == 700 else source.randrange(40))
            record = json.dumps({"id": number, "text": f"{number} {text}"}, ensure_ascii=number % 2 == 0)
            file.write(source.choice(["", " "]).encode() + record.encode() + b"\n")
    return tmp_path / "rows.jsonl"


def numbered(path: Path, name: str, count: int, size: int = 0) -> Path:
    return write_jsonl(path / f"{name}.jsonl", ({"text": f"{name}{number}{'.' * size}"} for number in range(count)))


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in lines_of(path)]


# ---- shuffle ------------------------------------------------------------------------------------------------------------


def shuffled(rows: Path, name: str, **options) -> list[bytes]:
    output = rows.parent / name
    shuffle(ShuffleConfig(input=(str(rows),), output=str(output), force=True, **options))
    return lines_of(output)


def test_a_shuffle_has_the_same_rows_in_another_order(rows):
    lines = lines_of(rows)
    one, two = shuffled(rows, "one.jsonl", seed=1), shuffled(rows, "two.jsonl", seed=2)
    assert sorted(one) == sorted(two) == sorted(lines)
    assert one != two and one != lines and shuffled(rows, "again.jsonl", seed=1) == one
    assert len(set(zip(lines, one, strict=True)) & {(line, line) for line in lines}) < 10  # few stay where they were


def test_the_order_does_not_depend_on_the_memory(rows, monkeypatch):
    whole = shuffled(rows, "whole.jsonl")
    for bits in (2, 6):
        monkeypatch.setattr(arrange, "FAN_OUT_BITS", bits)
        for row_bytes in (64, 2**14, 2**17):  # up to: no bucket holds more than eight rows
            monkeypatch.setattr(arrange, "ROW_BYTES", row_bytes)
            assert shuffled(rows, "part.jsonl", memory=1) == whole
    assert files_in(rows.parent) == ["part.jsonl", "rows.jsonl", "whole.jsonl"]
    few, orders = numbered(rows.parent, "few", 5), []
    for row_bytes in (64, 2**21):  # the second: not even one row fits
        monkeypatch.setattr(arrange, "ROW_BYTES", row_bytes)
        orders.append(shuffled(few, "part.jsonl", memory=1))
    assert orders[0] == orders[1] != lines_of(few)


def test_every_place_is_equally_likely(tmp_path):
    """Each of 6 rows over 150 seeds: chi-square of 36 cells, 25 degrees of freedom, far from its tails."""
    path, cells = numbered(tmp_path, "r", 6), Counter()
    for seed in range(150):
        for place, line in enumerate(shuffled(path, "out.jsonl", seed=seed)):
            cells[line, place] += 1
    assert 8 < sum((cells[line, place] - 25) ** 2 / 25 for line in lines_of(path) for place in range(6)) < 55


def test_shuffle_sets_bad_rows_aside_and_reads_pipes_and_archives(rows, tmp_path):
    done = run("arrange", "shuffle", "--input", "-", "--output", "-", input=rows.read_bytes())
    assert done.returncode == 0 and done.stdout == b"".join(shuffled(rows, "one.jsonl")), done.stderr
    lines = lines_of(rows)
    (tmp_path / "bad.jsonl").write_bytes(b"".join([*lines[:10], b"nonsense\n", b"\n", *lines[10:]]).replace(b"\n", b"\r\n"))
    done = run("arrange", "shuffle", "--input", tmp_path / "bad.jsonl", "--output", tmp_path / "out.jsonl.gz")
    assert done.returncode == 65 and f"{tmp_path}/bad.jsonl:11: not valid JSON".encode() in done.stderr
    assert not any("out" in name for name in files_in(tmp_path))
    arguments = ["--input", tmp_path / "bad.jsonl", "--output", tmp_path / "out.jsonl.gz", "--max_bad", 1]
    assert run("arrange", "shuffle", *arguments).returncode == 0
    assert shuffled(tmp_path / "out.jsonl.gz", "two.jsonl", seed=5) != lines
    assert sorted(lines_of(tmp_path / "two.jsonl")) == sorted(lines)
    assert rejected_of(tmp_path / "out.jsonl.gz")[0]["line"] == "nonsense"


@pytest.mark.slow
def test_a_shuffle_killed_at_any_moment_leaves_none_or_all(many_rows, tmp_path):  # noqa: F811
    output = tmp_path / "out.jsonl"
    big = tmp_path / "big.jsonl"
    big.write_bytes(many_rows.read_bytes() * 8)
    survives_kills(["arrange", "shuffle", "--input", big, "--output", output, "--memory", 1], output)
    assert sorted(lines_of(output)) == sorted(lines_of(big))


def test_ctrl_c_leaves_no_temporary_file(many_rows, tmp_path):  # noqa: F811
    process = interrupted(
        ["arrange", "shuffle", "--input", many_rows, many_rows.parent, "--output", tmp_path / "o.jsonl"], tmp_path
    )
    assert process.returncode == 130 and "Traceback" not in process.err, process.err
    assert files_in(tmp_path) == []


# ---- sample -------------------------------------------------------------------------------------------------------------


def sampled(path: Path, **options) -> list[bytes]:
    sample(SampleConfig(input=(str(path),), output=str(path.parent / "out.jsonl"), force=True, **options))
    return lines_of(path.parent / "out.jsonl")


@pytest.mark.parametrize("count", [1, 7, 1000, 1999, 2000, 5000])
def test_a_sample_by_rows_is_exact_and_in_order(rows, count, capsys):
    lines, found = lines_of(rows), sampled(rows, rows=count)
    assert len(found) == min(count, 2000) and set(found) <= set(lines)
    assert found == sorted(found, key=lines.index)
    assert sampled(rows, rows=count) == found
    assert (sampled(rows, rows=count, seed=1) != found) == (count < 2000)
    assert ("there are only 2,000 rows, not 5,000" in capsys.readouterr().err) == (count == 5000)


def test_every_row_is_as_likely_in_a_sample(tmp_path):
    path, taken = numbered(tmp_path, "r", 12), Counter()
    for seed in range(150):
        taken.update(sampled(path, rows=4, seed=seed))
    assert len(taken) == 12 and sum(taken.values()) == 600
    assert 1 < sum((count - 50) ** 2 / 50 for count in taken.values()) < 30


def test_a_sample_by_bytes_comes_near_and_never_above(rows):
    for wanted in (100, 20_000, 100_000):
        found = sampled(rows, bytes=wanted)
        assert wanted - 300 < sum(map(len, found)) <= wanted and set(found) <= set(lines_of(rows))
    assert sampled(rows, bytes=10**9) == lines_of(rows)
    taken = [lines_of(rows).index(line) for line in sampled(rows, bytes=20_000)]
    assert min(taken) < 300 and max(taken) > 1700  # from everywhere


def test_a_sample_by_ratio(rows):
    found = sampled(rows, ratio=0.3)
    assert 520 < len(found) < 680 and found == [line for line in lines_of(rows) if line in set(found)]
    assert sampled(rows, ratio=1.0) == lines_of(rows) and sampled(rows, ratio=0.3, seed=1) != found


def test_a_sample_may_be_empty_but_says_so(tmp_path, capsys):
    path = numbered(tmp_path, "a", 5)
    for options in ({"bytes": 10}, {"ratio": 1e-9}):
        assert sampled(path, **options) == [] and "warning: no row was taken; ask for more" in capsys.readouterr().err
    assert len(sampled(path, bytes=20)) == 1 and "warning" not in capsys.readouterr().err


def test_a_sample_passes_over_empty_files_but_not_only_such(tmp_path):
    numbered(tmp_path, "a", 5), numbered(tmp_path, "b", 0)
    for options in ({"rows": 5}, {"bytes": 1000}, {"ratio": 1.0}):
        config = SampleConfig(input=(str(tmp_path / "[ab].jsonl"),), output=str(tmp_path / "out.jsonl"), force=True, **options)
        sample(config)
        assert len(lines_of(tmp_path / "out.jsonl")) == 5


def test_a_sample_of_an_input_that_changes_is_refused(tmp_path, monkeypatch):
    path = numbered(tmp_path, "a", 50)
    monkeypatch.setattr(arrange, "tell", lambda line: numbered(tmp_path, "a", 50, size=1))  # said between the two readings
    with pytest.raises(DataError, match="the input has changed while it was being read"):
        sampled(path, bytes=10**6)
    assert files_in(tmp_path) == ["a.jsonl"]


def test_a_sample_from_a_pipe_with_bad_rows(rows):
    data = b"nonsense\n" + rows.read_bytes()
    done = run("arrange", "sample", "--input", "-", "--output", "-", "--rows", 50, "--max_bad", 1, input=data)
    assert done.returncode == 0 and done.stdout == b"".join(sampled(rows, rows=50)), done.stderr
    assert b"1  bad record" in done.stderr
    done = run("arrange", "sample", "--input", "-", "--output", "-", "--rows", 50, input=data)
    assert done.returncode == 65 and done.stderr.startswith(b"error: -:1: not valid JSON") and done.stdout == b""


# ---- merge --------------------------------------------------------------------------------------------------------------


def merged(*inputs: Path, **options) -> list[bytes]:
    output = inputs[0].parent / "merged.jsonl"
    merge(MergeConfig(input=tuple(map(str, inputs)), output=str(output), force=True, **options))
    return lines_of(output)


def test_merging_without_weights_is_one_after_the_other(rows, tmp_path):
    other = numbered(tmp_path, "b", 3)
    assert merged(rows, other) == lines_of(rows) + lines_of(other)


@pytest.mark.parametrize("weights", [(3, 1), (1, 1), (0.5, 0.3, 0.2), (100, 1, 7)])
@pytest.mark.parametrize("by", ["rows", "bytes"])
def test_shares_hold_at_every_point(tmp_path, weights, by):
    sources = [numbered(tmp_path, name, 1500, size) for name, size in zip("abc", (5, 50, 20), strict=True)][: len(weights)]
    found = merged(*sources, weights=(",".join(map(str, weights)),), by=by)
    had, total = Counter(), 0
    for line in found[:-1]:
        size = 1 if by == "rows" else len(line)
        had[json.loads(line)["text"][0]] += size
        total += size
        for name, weight in zip("abc", weights, strict=False):
            assert abs(had[name] - total * weight / sum(weights)) <= (1.5 if by == "rows" else 150)
    for source, name in zip(sources, "abc", strict=False):  # each in its own order, from its beginning
        taken = [line for line in found if json.loads(line)["text"][0] == name]
        assert taken == lines_of(source)[: len(taken)]
    assert found == merged(*sources, weights=tuple(map(str, weights)), by=by)


def test_what_happens_when_a_source_ends(tmp_path, capsys):
    a, b = numbered(tmp_path, "a", 10), numbered(tmp_path, "b", 30)
    counts = {}
    for when_short in ("stop", "go_on", "repeat"):
        found = Counter(json.loads(line)["text"] for line in merged(a, b, weights=("1,1",), when_short=when_short))
        counts[when_short] = [sum(count for text, count in found.items() if text[0] == name) for name in "ab"]
        assert ("some are left in" in capsys.readouterr().err) == (when_short == "stop")
    assert counts == {"stop": [10, 10], "go_on": [10, 30], "repeat": [30, 30]}
    c = numbered(tmp_path, "c", 30)
    assert len(merged(b, a, weights=("3,1",))) == 40  # the last row of a share is not lost
    found = Counter(merged(a, b, c, weights=("2,1,1",), when_short="repeat"))
    assert {found[line] for line in lines_of(a)} == {6} and {found[line] for line in lines_of(b) + lines_of(c)} == {1}


def test_a_merge_can_name_the_source_and_changes_nothing_else(tmp_path):
    lines = [b'{"text": "a",  "n": 1e2 } ', b"{}", b'{ "\\u0061": "\xe6\x98\xa5"}', b'{"from": 1}']
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = merged(path, source_key="source")
    name = json.dumps(str(path)).encode()
    assert found == [b'{"text": "a",  "n": 1e2, "source": %b}\n' % name, b'{"source": %b}\n' % name,
                     b'{ "\\u0061": "\xe6\x98\xa5", "source": %b}\n' % name, b'{"from": 1, "source": %b}\n' % name]  # fmt: skip
    assert all(json.loads(line)["source"] == str(path) for line in found)
    with pytest.raises(DataError, match=r"in.jsonl:4: has a key 'from' already; mend the record"):
        merged(path, source_key="from")


def test_a_merge_reads_folders_and_pipes(tmp_path):
    for number in range(2):
        numbered(tmp_path / "folder", f"{number}", 5)
    numbered(tmp_path, "b", 5)
    arguments = ["--input", tmp_path / "folder", "-", "--weights", "2,1", "--output", "-"]
    done = run("arrange", "merge", *arguments, input=(tmp_path / "b.jsonl").read_bytes())
    texts = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    assert texts == ["00", "b0", "01", "02", "b1", "03", "04", "b2", "10", "11", "b3", "12", "13", "b4", "14"], done.stderr


def test_merges_that_cannot_work_are_refused(tmp_path):
    a, empty = numbered(tmp_path, "a", 2), numbered(tmp_path, "empty", 0)
    for options, message in [
        ({"weights": ("1", "2", "3")}, "3 weights for 2 inputs"),
        ({"weights": ("1,x",)}, r"weights \(1,x\) must be numbers above 0"),
        ({"weights": ("1,-1",)}, "must be numbers above 0"),
        ({"by": "tokens"}, r"by \(tokens\) must be rows or bytes"),
        ({"when_short": "wait"}, r"when_short \(wait\) must be one of stop, go_on, repeat"),
    ]:
        with pytest.raises(UsageError, match=message):
            merged(a, empty, **options)
    with pytest.raises(UsageError, match="standard input cannot be repeated"):
        MergeConfig(input=("-",), when_short="repeat")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    for options in ({}, {"weights": ("1,1",)}):  # each input is meant to give rows
        with pytest.raises(DataError, match=r"empty.jsonl: no row in it; check the input"):
            merged(a, empty, **options)
        with pytest.raises(DataError, match=r"bad.jsonl:1: .*no row of the input is good"):
            merged(a, bad, max_bad=1, **options)
        for name in (f"{tmp_path}/../{tmp_path.name}/a.jsonl", tmp_path):
            with pytest.raises(UsageError, match=r"a.jsonl: is named twice; name each file once"):
                merged(a, name, **options)
    assert files_in(tmp_path) == ["a.jsonl", "bad.jsonl", "empty.jsonl"]


# ---- split --------------------------------------------------------------------------------------------------------------


def dealt(path: Path, names: str = "train val", **options) -> list[list[bytes]]:
    outputs = [path.parent / f"{name}.jsonl" for name in names.split()]
    split(SplitConfig(input=(str(path),), output=tuple(map(str, outputs)), force=True, workers=1, **options))
    return [lines_of(output) for output in outputs]


def test_a_split_by_ratio_deals_every_row_out_once(rows):
    lines = lines_of(rows)
    parts = dealt(rows, "train val test", ratios=("0.8,0.15,0.05",))
    assert sorted(line for part in parts for line in part) == sorted(lines)
    for part, expected in zip(parts, (1600, 300, 100), strict=True):
        assert abs(len(part) - expected) < 60 and part == [line for line in lines if line in set(part)]
    assert dealt(rows, "train val test", ratios=("80", "15", "5")) == parts
    assert dealt(rows, "train val test", ratios=("0.8,0.15,0.05",), seed=1) != parts


def test_copies_stand_on_one_side_and_rows_keep_theirs(tmp_path):
    source = random.Random(1)
    records = [{"id": number, "text": f"text {source.randrange(300)}"} for number in range(2000)]
    train, val = dealt(write_jsonl(tmp_path / "a.jsonl", records), ratios=("0.7,0.3",))
    sides = [{json.loads(line)["text"] for line in part} for part in (train, val)]
    assert sides[0].isdisjoint(sides[1]) and min(map(len, sides)) > 50
    more, _ = dealt(write_jsonl(tmp_path / "a.jsonl", [*records[:1000], {"text": "new"}]), ratios=("0.7,0.3",))
    assert {json.loads(line)["text"] for line in more} - {"new"} <= sides[0]
    assert [part_of(f"text {number}", 0, [0.7]) for number in range(300)].count(1) in range(60, 120)


def test_a_split_keeps_near_duplicates_together(tmp_path):
    pytest.importorskip("rensa")
    texts = alike_texts()
    texts += [*texts[:50], "!", "?", "!"]
    path = write_jsonl(tmp_path / "in.jsonl", ({"text": text} for text in texts))

    def leak(parts: list[list[bytes]]) -> float:
        train, val = ([json.loads(line)["text"] for line in part] for part in parts)
        assert sorted(train + val) == sorted(texts) and len(val) > 60
        sets = {text: set(shingles(text, 5).tolist()) for text in texts}
        pairs = ((sets[one], sets[other]) for one in val for other in train if not sets[one].isdisjoint(sets[other]))
        return max(len(one & other) / len(one | other) for one, other in pairs)

    assert leak(dealt(path, ratios=("0.7,0.3",))) > 0.9
    parts = dealt(path, ratios=("0.7,0.3",), near=True)
    assert leak(parts) < 0.9
    sides = [{json.loads(line)["text"] for line in part} for part in parts]
    assert sides[0].isdisjoint(sides[1])
    outputs = ["--output", tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    done = run(
        "deal", "split", "--input", "-", *outputs, "--ratios", "0.7,0.3", "--near", "--workers", 2, input=path.read_bytes()
    )
    assert done.returncode == 0, done.stderr
    assert [lines_of(tmp_path / name) for name in ("one.jsonl", "two.jsonl")] == parts


@pytest.mark.parametrize("options", [{"rows": 300}, {"rows": 2000}, {"bytes": 10_000}, {"bytes": 10**8}])
def test_a_split_into_parts_follows_the_order(rows, options):
    folder, lines = rows.parent / "parts", lines_of(rows)
    split(SplitConfig(input=(str(rows),), output=(str(folder),), **options))
    parts = [lines_of(folder / name) for name in files_in(folder)]
    assert [line for part in parts for line in part] == lines
    assert files_in(folder) == [f"{number:05d}.jsonl" for number in range(len(parts))]
    if "rows" in options:
        assert [len(part) for part in parts[:-1]] == [options["rows"]] * (len(parts) - 1) and len(parts) == -(
            -2000 // options["rows"]
        )
    else:
        assert all(sum(map(len, part)) <= options["bytes"] or len(part) == 1 for part in parts)
        assert all(sum(map(len, part)) + len(after[0]) > options["bytes"] for part, after in pairwise(parts))


def test_several_outputs_appear_together_or_not_at_all(rows, tmp_path, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(rows.read_bytes() + b'{"id": 1}\n')
    (tmp_path / "val.jsonl").write_text("old")
    with pytest.raises(DataError, match=r"bad.jsonl:2001: no key 'text'"):
        dealt(bad, ratios=("0.5,0.5",))
    config = {"input": (str(rows),), "output": tuple(f"{tmp_path}/{name}.jsonl" for name in ("train", "val"))}
    with pytest.raises(UsageError, match=r"val.jsonl: exists already"):
        split(SplitConfig(**config, ratios=("1,1",)))

    closed = deal.Output.close

    def full(self) -> None:
        if "val" in self._file.name:
            raise OSError(28, "No space left on device")
        closed(self)

    assert files_in(tmp_path) == ["bad.jsonl", "rows.jsonl", "val.jsonl"]
    monkeypatch.setattr(deal.Output, "close", full)
    with pytest.raises(OSError, match="No space left"):
        split(SplitConfig(**config, ratios=("1,1",), force=True))
    assert files_in(tmp_path) == ["bad.jsonl", "rows.jsonl", "val.jsonl"] and (tmp_path / "val.jsonl").read_text() == "old"
    monkeypatch.undo()
    outputs = dealt(bad, ratios=("1,1",), max_bad=1)
    assert sum(map(len, outputs)) == 2000 and rejected_of(tmp_path / "train.jsonl")[0]["place"] == f"{bad}:2001"


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "say how to split, by one of --ratios, --rows and --bytes"),
        ({"rows": 1, "bytes": 1}, "say how to split"),
        ({"ratios": ("1,1",), "output": ("a",)}, "output names 1, expected 2: a file for each ratio"),
        ({"rows": 1, "output": ("a", "b")}, "output names 2, expected 1: one folder"),
        ({"ratios": ("1,1",), "output": ("a", "./a")}, "must be different files"),
        ({"ratios": ("1,0",), "output": ("a", "b")}, r"ratios \(1,0\) must be numbers above 0"),
        ({"rows": 1, "output": ("a",), "near": True}, "near goes with ratios"),
    ],
)
def test_splits_that_cannot_work_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        SplitConfig(**options)


def test_killed_splits_and_merges_leave_nothing_for_long(many_rows, tmp_path):  # noqa: F811
    other = tmp_path / "other.jsonl"
    other.write_bytes(many_rows.read_bytes())
    for arguments, output in [
        (["deal", "split", "--rows", 1000, "--input", many_rows], tmp_path / "parts"),
        (["arrange", "merge", "--input", many_rows, other, "--weights", "1,1"], tmp_path / "merged.jsonl"),
    ]:
        for delay in (0.25, 0.3, 0.35):
            killed([*arguments, "--output", output], delay)
        done = run(*arguments, "--output", output, "--force")
        assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == ["merged.jsonl", "other.jsonl", "parts"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["arrange", "shuffle", "--memory", 4],
        ["arrange", "sample", "--rows", 1000],
        ["arrange", "merge"],
        ["deal", "split", "--rows", 10_000],
    ],
    ids=lambda arguments: arguments[1],
)
def test_memory_does_not_grow_with_the_input(many_rows, tmp_path, arguments):  # noqa: F811
    large = tmp_path / "large.jsonl"
    large.write_bytes(many_rows.read_bytes() * 12)
    small, big = (
        peak_memory(*arguments, "--input", path, "--output", tmp_path / "out.jsonl", "--force") for path in (many_rows, large)
    )
    assert big - small < 8 * 2**20 < os.path.getsize(large) / 3
