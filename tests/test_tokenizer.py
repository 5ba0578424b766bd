"""The tokenizer: nothing is lost or changed on the way through it, and no text can become a control token."""

import gzip
import json
import random
import subprocess
import sys
import time

import pytest
from conftest import TEXTS, write_jsonl

from etude.corpus.jsonl import Rejects
from etude.errors import DataError, MismatchError, UsageError, VerificationError
from etude.tokenizer import (
    CHAT_TEMPLATE,
    DOCUMENT_END,
    RESERVED,
    SPECIAL_TOKENS,
    TURN_END,
    TURN_START,
    Tokenizer,
    _cut_long_runs,
    chat_template,
    train_tokenizer,
)
from etude.training import tokenizer as stage
from etude.training.config import TokenizerConfig

SMALLEST = 256 + len(SPECIAL_TOKENS)
HARD = [
    "",
    " ",
    "\n",
    "\r\n\t x  ",
    "  \n \n\n",
    "\x00\x01\x7f\x80\x85\u2028\u200b\ufeff",
    "e\u0301 é ﬁ Å Å ㎏ １２３",
    "👩‍👩‍👧‍👦🏳️‍🌈 ﷽ 한\u1112\u1161\u11ab",
]


def random_texts(seed: int, count: int) -> list[str]:
    """Strings over all of Unicode but surrogates, white space and pieces of special tokens more often than chance has them."""
    source = random.Random(seed)
    favourites = [" ", "\n", "\r", "\t", "<|", "|>", "im_end", "\u0301", "'s", "'LL", "1", "狐", *SPECIAL_TOKENS]

    def piece() -> str:
        point = source.randrange(source.choice((0x80, 0x3000, 0xD800, 0x110000)))
        return source.choice(favourites) if source.random() < 0.4 or 0xD800 <= point < 0xE000 else chr(point)

    return ["".join(piece() for _ in range(source.randrange(40))) for _ in range(count)]


@pytest.fixture(scope="module")
def hf(tokenizer_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(tokenizer_folder))


def edited(tokenizer_folder, folder, json_edit=lambda values: None, **settings):
    """A copy of a tokenizer folder, its tokenizer.json changed by ``json_edit``, its tokenizer_config.json by ``settings``."""
    values = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    json_edit(values)
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}), encoding="utf-8")
    return folder


# --- text in, the same text out --------------------------------------------------------------------------------------


def test_every_text_comes_back_byte_for_byte(tokenizer):
    points = [*range(0x3000), *range(0x3000, 0x110000, 41)]
    everything = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
    for text in [*HARD, *random_texts(0, 400), everything]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode("utf-8")
        assert not tokenizer.special_ids.intersection(ids), text


def test_nothing_is_normalised(tokenizer):
    for composed, other in [
        ("é", "e\u0301"),
        ("Å", "\u212b"),
        ("한", "\u1112\u1161\u11ab"),
        ("fi", "ﬁ"),
        ("1", "１"),
        ("a", "A"),
    ]:
        assert tokenizer.encode(composed) != tokenizer.encode(other)
        assert tokenizer.decode(tokenizer.encode(other)) == other


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    texts = [*HARD, *random_texts(1, 100)]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_special_tokens_in_text_stay_text(tokenizer):
    for token in SPECIAL_TOKENS:
        for text in (token, f"a {token}b", token * 3, f"{token[:-1]}{token}", f" {token}\n{token} "):
            ids = tokenizer.encode(text)
            assert not tokenizer.special_ids.intersection(ids)
            assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special=True) == text
        assert tokenizer.encode_batch([token]) == [tokenizer.encode(token)]
        assert tokenizer.encode_template(token) == [tokenizer.id_of(token)]


def test_the_template_s_words_are_text_around_control_tokens(tokenizer):
    start, end = tokenizer.id_of(TURN_START), tokenizer.id_of(TURN_END)
    text = f"{TURN_START}user\nHi{TURN_END}\n{TURN_START}"
    assert tokenizer.encode_template(text) == [start, *tokenizer.encode("user\nHi"), end, *tokenizer.encode("\n"), start]
    assert tokenizer.decode(tokenizer.encode_template(text)) == text


def test_token_bytes_are_pieces_of_utf_8(tokenizer):
    pieces = [tokenizer.token_bytes(token) for token in range(len(tokenizer))]
    assert {piece for piece in pieces if len(piece) == 1} == {bytes([byte]) for byte in range(256)}
    assert [token for token, piece in enumerate(pieces) if not piece] == sorted(tokenizer.special_ids)
    assert len(set(pieces)) == len(pieces) - len(SPECIAL_TOKENS) + 1
    assert tokenizer.token_bytes(len(tokenizer)) == b""
    emoji = tokenizer.encode("🦊")
    assert len(emoji) > 1 and tokenizer.token_bytes(emoji[0]) == "🦊".encode()[: len(tokenizer.token_bytes(emoji[0]))]
    assert "\ufffd" in tokenizer.decode(emoji[:1])  # half a character shows; nothing is swallowed


def test_digits_stand_one_by_one(tmp_path):
    tokenizer = train_tokenizer(["in 2024, 2024 and 2024 １２ １２ " + "a b c d e f"] * 50, tmp_path, SMALLEST + 10)
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode("20242024")] == [b"2", b"0", b"2", b"4"] * 2
    assert len(tokenizer.encode("１２")) == len(tokenizer.encode("１")) + len(tokenizer.encode("２"))


# --- its vocabulary --------------------------------------------------------------------------------------------------


def test_special_tokens_have_the_first_ids_and_pad_is_not_eos(tokenizer):
    assert [tokenizer.id_of(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.special_ids == frozenset(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.pad_id, tokenizer.document_end_id, tokenizer.eos_id) == (0, 0, 2)  # 0 is a pad id, not a missing one
    assert tokenizer.pad_id != tokenizer.eos_id
    assert tokenizer.bos_id is None
    assert tokenizer.id_of("no such token") is None


@pytest.mark.parametrize("vocab_size", [SMALLEST, SMALLEST + 1, 300, 333])
def test_the_vocabulary_has_just_the_size_asked_for(tmp_path, vocab_size):
    tokenizer = train_tokenizer(TEXTS * 2, tmp_path, vocab_size)
    assert len(tokenizer) == vocab_size
    ids = {token for text in TEXTS for token in tokenizer.encode(text)}
    assert max(ids) < vocab_size
    assert all(tokenizer.token_bytes(token) for token in range(len(SPECIAL_TOKENS), vocab_size))


def test_the_length_counts_added_tokens_and_does_not_grow(tokenizer, tokenizer_folder, tmp_path):
    from tokenizers import Tokenizer as Backend

    assert len(tokenizer) == 320
    tokenizer.encode("<|never_seen|> 𓀀𓀁"), tokenizer.encode_template("<|never_seen|> 𓀀𓀁")
    assert len(tokenizer) == 320
    backend = Backend.from_file(str(tokenizer_folder / "tokenizer.json"))
    backend.add_special_tokens(["<|extra|>"])
    folder = edited(tokenizer_folder, tmp_path)
    backend.save(str(folder / "tokenizer.json"))
    extended = Tokenizer(folder)
    assert backend.get_vocab_size(with_added_tokens=False) == 320  # what a model's embedding must not be sized by
    assert len(extended) == 321 and extended.encode_template("<|extra|>") == [320]


def test_too_little_text_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(DataError, match=r"yields only \d+ tokens, fewer than vocab_size \(1000\); give more text") as error:
        train_tokenizer(["a few words"], tmp_path / "tokenizer", 1000)
    assert error.value.exit_code == 65
    assert not (tmp_path / "tokenizer").exists()
    with pytest.raises(DataError, match=f"only {SMALLEST} tokens"):
        train_tokenizer([], tmp_path / "tokenizer", SMALLEST + 1)


def test_too_small_a_vocabulary_is_an_error_before_anything_is_read(tmp_path):
    texts = iter(TEXTS)
    with pytest.raises(UsageError, match=rf"vocab_size \({SMALLEST - 1}\) must be at least {SMALLEST}"):
        train_tokenizer(texts, tmp_path, SMALLEST - 1)
    assert next(texts) == TEXTS[0]


def test_the_same_text_makes_the_same_file(tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS * 3])
    train_tokenizer(TEXTS * 3, tmp_path / "here", 320)
    script = """import json, sys
from etude.tokenizer import train_tokenizer
with open(sys.argv[1] + "/texts.jsonl", encoding="utf-8") as file:
    train_tokenizer([json.loads(line)["text"] for line in file], sys.argv[1] + "/there", 320)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {"PYTHONPATH": ":".join(sys.path), "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "5"}
    subprocess.run(command, check=True, env=environment)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


@pytest.mark.parametrize("first, last", [(0x4E00, 0x5000), (0x21, 0x2F), (0x1F300, 0x1F500)], ids=["Han", "symbols", "emoji"])
def test_long_runs_cost_no_more_than_sentences(tmp_path, first, last):
    source = random.Random(0)
    run = "".join(chr(source.randrange(first, last)) for _ in range(60_000))
    began = time.process_time()
    tokenizer = train_tokenizer([run], tmp_path, 900)
    assert time.process_time() - began < 5  # seconds; as one word, symbols take ten times as long, and many merges more
    assert tokenizer.decode(tokenizer.encode(run)) == run


def test_cutting_long_runs_loses_and_repeats_nothing():
    texts = [
        *HARD,
        *random_texts(2, 50),
        "字" * 33 + "，后面的话 and more",
        "字" * 100 + "!" * 70 + " " * 40 + "_" * 50,
        "x" * 64 + "123",
    ]
    for text in texts:
        pieces = list(_cut_long_runs(text))
        assert "".join(pieces) == text
    assert max(map(len, _cut_long_runs("字" * 1000 + "!?" * 1000 + " \n" * 1000 + "é" * 1000 + "\u0301_" * 1000))) == 32
    assert list(_cut_long_runs("short words, 短句。 1234")) == ["short words, 短句。 1234"]


# --- the same tokenizer elsewhere ------------------------------------------------------------------------------------


def test_transformers_gives_equal_ids(tokenizer, hf):
    assert len(hf) == len(tokenizer) and hf.clean_up_tokenization_spaces is False
    assert (hf.pad_token_id, hf.eos_token_id, hf.bos_token_id) == (tokenizer.pad_id, tokenizer.eos_id, None)
    texts = [*HARD, *TEXTS, "1234567 ３４ ½", *random_texts(3, 300)]
    for text in texts:
        assert hf(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)  # and nothing is put around them
        if not any(token in text for token in SPECIAL_TOKENS):
            assert hf(text)["input_ids"] == tokenizer.encode(text)
            assert hf.decode(tokenizer.encode(text)) == text
    assert hf(TURN_END)["input_ids"] == [tokenizer.eos_id] != tokenizer.encode(TURN_END)  # what Etude protects from


def test_a_folder_is_copied_with_all_it_means(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "model", max_length=77)
    copy = Tokenizer(tmp_path / "model")
    assert copy.settings["model_max_length"] == 77
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.render((("user", "Hi"),), True) == tokenizer.render((("user", "Hi"),), True)
    assert (copy.pad_id, copy.eos_id) == (tokenizer.pad_id, tokenizer.eos_id)


def test_the_fingerprint_tells_vocabularies_and_templates_apart(tokenizer, tokenizer_folder, tmp_path):
    fingerprints = {
        tokenizer.fingerprint,
        train_tokenizer(TEXTS * 3, tmp_path / "other size", 319).fingerprint,
        train_tokenizer(TEXTS * 3, tmp_path / "other template", 320, "Be kind.").fingerprint,
    }
    assert len(fingerprints) == 3
    assert train_tokenizer(TEXTS * 3, tmp_path / "same", 320).fingerprint == tokenizer.fingerprint


def test_a_template_of_its_own_file_comes_first(tokenizer_folder, tmp_path):
    folder = edited(tokenizer_folder, tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert Tokenizer(folder).render((("user", "Hi"),)) == "Hi"


def test_a_foreign_bos_is_found(tokenizer_folder, tmp_path):
    def put_in_front(values):
        token = {"SpecialToken": {"id": TURN_START, "type_id": 0}}
        values["post_processor"] = {
            "type": "TemplateProcessing", "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [token, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {TURN_START: {"id": TURN_START, "ids": [1], "tokens": [TURN_START]}},
        }  # fmt: skip

    tokenizer = Tokenizer(edited(tokenizer_folder, tmp_path, put_in_front))
    assert tokenizer.bos_id == 1
    assert 1 not in tokenizer.encode("Hi") and 1 not in tokenizer.encode_template("Hi")


def test_folders_without_a_sound_tokenizer_are_refused(tokenizer_folder, tmp_path):
    with pytest.raises(MismatchError, match=r"no tokenizer here; run: python train/train_tokenizer.py all"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer.json: not a readable tokenizer"):
        Tokenizer(tmp_path)
    folder = edited(tokenizer_folder, tmp_path)
    (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer_config.json: not valid JSON"):
        Tokenizer(folder)
    with pytest.raises(MismatchError, match=r"the eos_token '</s>' is not in the vocabulary"):
        _ = Tokenizer(edited(tokenizer_folder, tmp_path, eos_token="</s>")).eos_id
    with pytest.raises(MismatchError, match="no chat template"):
        Tokenizer(edited(tokenizer_folder, tmp_path, chat_template=None)).render((("user", "Hi"),))


# --- the chat template -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "default", ["", "Be brief. 简短。", 'Say "no" to \\n, {{ braces }} and {% tags %}.\nLine 2', "<|im_end|>"]
)
def test_the_default_system_turn_opens_conversations_without_one(tmp_path, default):
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(TEXTS, tmp_path, 300, default)
    rest = f"{TURN_START}user\nHi{TURN_END}\n{TURN_START}assistant\n"
    system = f"{TURN_START}system\n{{}}{TURN_END}\n"
    assert tokenizer.render((("user", "Hi"),), True) == (system.format(default) if default else "") + rest
    given = (("system", "Rhyme."), ("user", "Hi"))
    assert tokenizer.render(given, True) == system.format("Rhyme.") + rest
    hf = AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [{"role": "user", "content": "Hi"}]
    assert hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == tokenizer.render(
        (("user", "Hi"),), True
    )


# --- the stage: sample, train, verify --------------------------------------------------------------------------------


def config_of(tmp_path, documents, **options) -> TokenizerConfig:
    data = write_jsonl(tmp_path / "data.jsonl", ({"text": text} for text in documents))
    return TokenizerConfig(**{"data": (str(data),), "output": str(tmp_path / "tokenizer"), "vocab_size": 300, **options})


def sample(config: TokenizerConfig) -> list[str]:
    return list(stage._sample(config, Rejects()))


def test_the_sample_has_the_size_asked_for_and_comes_from_everywhere(tmp_path):
    documents = [f"document {number:04} " + "字" * (number % 60) for number in range(2000)]
    assert sample(config_of(tmp_path, documents)) == documents == sample(config_of(tmp_path, documents, max_bytes=0))
    config = config_of(tmp_path, documents, max_bytes=40_000)
    taken = sample(config)
    assert 34_000 < sum(len(text.encode("utf-8")) for text in taken) <= 42_000
    assert taken == [text for text in documents if text in set(taken)]  # in order, none twice
    numbers = [int(text.split()[1]) for text in taken]
    assert all(sum(quarter * 500 <= number < quarter * 500 + 500 for number in numbers) > 50 for quarter in range(4))
    assert sample(config) == taken != sample(config_of(tmp_path, documents, max_bytes=40_000, seed=1))


def test_the_sample_of_a_compressed_file_comes_from_everywhere_as_well(tmp_path):
    def packed(documents) -> TokenizerConfig:
        path = tmp_path / "data.jsonl.gz"
        path.write_bytes(gzip.compress(write_jsonl(tmp_path / "plain", ({"text": text} for text in documents)).read_bytes()))
        return config_of(tmp_path, [], data=(str(path),), max_bytes=30_000)

    letters = random.Random(0)
    taken = sample(packed(f"document {number} " + "".join(letters.choices("abcdefgh", k=60)) for number in range(2000)))
    assert 12_000 < sum(map(len, taken)) <= 31_500
    assert any(int(text.split()[1]) > 1900 for text in taken)
    taken = sample(packed("document " + "a" * 60 for _ in range(20_000)))  # compressed far better than expected
    assert sum(map(len, taken)) <= 31_500


def test_a_bad_record_ends_training_before_anything_is_written(tmp_path, capsys):
    config = config_of(tmp_path, TEXTS)
    with open(config.data[0], "a", encoding="utf-8") as file:
        file.write('{"text": 5}\n')
    with pytest.raises(DataError, match=rf"data.jsonl:{len(TEXTS) + 1}: 'text' is int, not text"):
        stage.train(config)
    assert not (tmp_path / "tokenizer").exists()
    stage.train(TokenizerConfig(data=config.data, output=config.output, vocab_size=300, max_bad=1))
    assert "skipped 1 bad records" in capsys.readouterr().out


def test_the_stage_shows_trains_and_verifies(tmp_path, capsys):
    config = config_of(tmp_path, TEXTS * 3)
    stage.show_config(config)
    stage.train(config)
    stage.verify(config)
    printed = capsys.readouterr().out
    assert "all of the text" in printed and "300 tokens, 8 of them special" in printed
    assert "come back byte for byte" in printed and "Chinese" in printed and "other" in printed


def test_what_verifying_prints_is_counted_right(tokenizer):
    texts = ["狐狸住在森林里。", "The fox.", "一半 and half 一半"]
    counts = stage.compression(tokenizer, texts)
    ids = [len(tokenizer.encode(text)) for text in texts]
    assert counts["all"] == (sum(len(text.encode()) for text in texts), sum(map(len, texts)), sum(ids))
    assert counts["other"] == (8, 8, ids[1])


def unchanged(values):
    pass


def template(old: str, new: str) -> dict[str, str]:
    """The chat template with one thing changed."""
    assert old in CHAT_TEMPLATE
    return {"chat_template": chat_template().replace(old, new)}


def drop_byte(values, character: str):
    del values["model"]["vocab"][character]


def not_special(values, token: str):
    next(added for added in values["added_tokens"] if added["content"] == token)["special"] = False


LOST = "does not come back byte for byte"
CONTROL = "becomes the control token"
END_UNMARKED = "message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}"
DAMAGE = {
    "NFC": (lambda values: values.update(normalizer={"type": "NFC"}), {}, LOST),
    "lower case": (lambda values: values.update(normalizer={"type": "Lowercase"}), {}, LOST),
    "prefix space": (lambda values: values["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), {}, LOST),
    "lost byte 0": (lambda values: drop_byte(values, "Ā"), {}, LOST),
    "lost byte F4": (lambda values: drop_byte(values, "ô"), {}, LOST),
    "no decoder": (lambda values: values.update(decoder=None), {}, LOST),
    "end of turn not special": (lambda values: not_special(values, TURN_END), {}, CONTROL),
    "end of document not special": (lambda values: not_special(values, DOCUMENT_END), {}, CONTROL),
    "reserved not special": (lambda values: not_special(values, RESERVED[0]), {}, CONTROL),
    "pad is eos": (unchanged, {"pad_token": TURN_END}, "pad and eos are one token"),
    "mask without the end token": (
        unchanged,
        template("message['content'] + '<|im_end|>' -}}{%- endgeneration -%}", END_UNMARKED),
        "disagree on a conversation's ids or mask",
    ),
    "another prompt": (
        unchanged,
        template(
            "add_generation_prompt -%}\n{{- '<|im_start|>assistant\\n'", "add_generation_prompt -%}\n{{- '<|im_start|>bot\\n'"
        ),
        "prompt is no prefix",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verifying_finds_damage(tokenizer_folder, tmp_path, damage, capsys):
    change, settings, message = DAMAGE[damage]
    config = config_of(tmp_path, TEXTS, output=str(edited(tokenizer_folder, tmp_path / "tokenizer", change, **settings)))
    with pytest.raises(VerificationError, match=message) as error:
        stage.verify(config)
    assert error.value.exit_code == 70
    assert "verified" not in capsys.readouterr().out
