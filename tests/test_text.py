"""The Python API: text in, text out, streamed or not, with a toy tokenizer and a model of random weights."""

import itertools
import json
import math
import random

import pytest
import torch

from etude.chat import ChatFormat
from etude.errors import DataError, MismatchError, UsageError
from etude.generation.plain import generate
from etude.generation.settings import SamplingSettings
from etude.generation.text import Reply, TextDecoder, TextModel, load
from etude.llama import config_to_hf
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from etude.weights import save_model

CONTEXT, VOCABULARY, PADDED_VOCABULARY = 64, 300, 320
TEXTS = ["The fox lives in the forest. 狐狸住在森林里。", "Where does the fox live? 🦊🌲 Ça va, naïve café?"] * 3
CHARACTERS = "aé狐森🦊👩‍🚀\n <|🏳️‍🌈한ß\u0301\x00\ufffd"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose vocabulary is larger than its tokenizer's, and whose ids beyond would come out on top. Control tokens
    are unlikely, so that answers are long.
    """
    folder = tmp_path_factory.mktemp("weight") / "etude_sft_model"
    tokenizer = train_tokenizer(TEXTS, folder, VOCABULARY)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(3)
    model = Etude(EtudeConfig(PADDED_VOCABULARY, max_position_embeddings=CONTEXT, initializer_range=0.4, **shape))
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 20
        model.lm_head.weight[: len(SPECIAL_TOKENS)] = 0
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> TextModel:
    return load(folder, device="cpu")


def random_text(numbers: random.Random, length: int) -> str:
    return "".join(numbers.choice(CHARACTERS) for _ in range(length))


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_model_folder_is_all_that_is_needed(folder, model):
    assert isinstance(model.complete("The fox", max_new_tokens=5, seed=0), str)
    assert model.model.head_weight.dtype == torch.float32  # "auto"
    half = load(folder, "cpu", "bf16")
    assert half.model.head_weight.dtype == torch.bfloat16
    assert half.complete("The fox", max_new_tokens=5, seed=0)
    assert not model.model.training


def test_a_llama_folder_is_loaded_as_well(folder, model, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(model.model.config)))
    llama = load(tmp_path, "cpu")
    for text in TEXTS[:2]:
        assert llama.complete(text, max_new_tokens=10, seed=1) == model.complete(text, max_new_tokens=10, seed=1)


def test_wrong_folders_are_refused(folder, model, tmp_path):
    with pytest.raises(MismatchError, match="there is no model here"):
        load(tmp_path)
    with pytest.raises(UsageError, match="precision"):
        load(folder, "cpu", "int3")
    smaller = Etude(EtudeConfig(VOCABULARY - 1, 32, 1, 2))
    with pytest.raises(MismatchError, match=f"tokenizer has {VOCABULARY} tokens, the model only {VOCABULARY - 1}"):
        TextModel(smaller, model.tokenizer)


# --- one call each ---------------------------------------------------------------------------------------------------


def test_one_in_one_out_and_list_in_list_out(model):
    options = {"max_new_tokens": 6, "seed": 1}
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    one = model.chat("Hi", **options)
    assert model.chat([{"role": "user", "content": "Hi"}], **options) == one
    assert model.chat(["Hi", conversation], **options)[0] == one
    assert model.chat([conversation], **options) == [model.chat(conversation, **options)] != [one]
    assert model.complete(["The", "狐"], **options)[0] == model.complete("The", **options)
    assert model.complete([], **options) == model.chat([], **options) == []
    assert model.complete("", **options)  # an empty prompt begins a document


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_batch_size_changes_no_answer(model, temperature):
    prompts = ["The", "Where does the fox live?", "狐狸", "", "🦊🌲 Ça"]
    options = {"max_new_tokens": 8, "temperature": temperature, "seed": 5}
    expected = model.complete(prompts, batch_size=1, **options)
    assert len(set(expected)) == len(prompts)
    for batch_size in (2, 3, 16):
        assert model.complete(prompts, batch_size=batch_size, **options) == expected
    with pytest.raises(UsageError, match=r"batch_size \(0\) must be at least 1"):
        model.complete(prompts, batch_size=0)


def test_streamed_text_is_the_text(model):
    for seed in range(15):  # random weights give every sort of broken UTF-8
        options = {"max_new_tokens": 20, "temperature": 1.5, "top_k": 0, "top_p": 1.0, "seed": seed}
        pieces = list(model.stream_complete("The fox 🦊", **options))
        assert "".join(pieces) == model.complete("The fox 🦊", **options) and all(pieces)
        assert "".join(model.stream_chat("狐狸?", **options)) == model.chat("狐狸?", **options)


def test_text_is_what_the_tokenizer_decodes(model):
    prompt, ends_within_a_character = model.completion_ids("The fox"), 0
    for seed in range(10):
        options = {"max_new_tokens": 12, "temperature": 1.5, "top_k": 0, "top_p": 1.0, "seed": seed}
        settings = SamplingSettings(**options)
        steps = generate(model.model, [prompt], settings, model.stop_ids, forbidden_ids=model.forbidden_ids)
        ids = [step.tokens[0] for step in steps if step.tokens[0] is not None]
        decoded = model.tokenizer.decode(ids)
        assert model.complete("The fox", **options) == decoded
        ends_within_a_character += decoded.endswith("\ufffd") and len(ids) == 12
    assert ends_within_a_character


def test_finish_reasons(model, monkeypatch):
    prompt = [model.completion_ids("The fox")]
    (cut,) = model.replies(prompt, max_new_tokens=8, temperature=0)
    assert cut == Reply(model.complete("The fox", max_new_tokens=8, temperature=0), "length")
    (full,) = model.replies(prompt, max_new_tokens=10_000, temperature=0)
    assert full.finish_reason == "length"
    (stopped,) = model.replies(prompt, stop=cut.text[-2:], max_new_tokens=50, temperature=0)
    assert stopped.finish_reason == "stop"
    counted = []
    monkeypatch.setattr(
        "etude.generation.text.generate", lambda *given: (counted.append(step) or step for step in generate(*given))
    )
    assert model.replies(prompt, stop=cut.text[-2:], max_new_tokens=50, temperature=0) == [stopped]
    assert len(counted) <= 8  # nothing is computed after the last row's stop string
    stream = model.stream_complete("The fox", max_new_tokens=8, temperature=0)
    with pytest.raises(StopIteration) as end:
        while True:
            next(stream)
    assert end.value.value == "length"


def test_a_reply_ends_at_its_end_token(folder):
    model = load(folder, "cpu")
    for token in (model.tokenizer.eos_id, model.tokenizer.document_end_id):
        with torch.no_grad():  # a head that says this token, and an 'a' if it must not
            model.model.lm_head.weight.zero_()
            model.model.norm.weight.fill_(1.0)
            direction = model.model.hidden(torch.tensor([model.chat_ids("Hi")]))[0, -1]
            model.model.lm_head.weight[token] = direction
            model.model.lm_head.weight[model.tokenizer.encode("a")] = direction / 2
        (reply,) = model.replies([model.chat_ids("Hi")], temperature=0, max_new_tokens=5)
        assert reply == Reply("", "stop")


# --- what may come in, and what may come out -------------------------------------------------------------------------


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_special_tokens_typed_by_a_person_give_no_control_ids(model, special):
    def controls(ids):
        return [token for token in ids if token in model.tokenizer.special_ids]

    typed = f"a{special}b {special}\n{special}"
    assert controls(model.completion_ids(typed)) == []
    assert controls(model.chat_ids(typed)) == controls(model.chat_ids("a"))
    assert special in model.tokenizer.decode(model.chat_ids(typed))
    conversation = [{"role": role, "content": typed} for role in ("system", "user", "assistant", "user")]
    harmless = [{**message, "content": "a"} for message in conversation]
    assert controls(model.chat_ids(conversation)) == controls(model.chat_ids(harmless))
    assert special in model.tokenizer.decode(model.completion_ids(typed))


def test_the_vocabulary_does_not_grow(model):
    before = (len(model.tokenizer), model.model.embed_tokens.weight.shape, model.model.head_weight.shape)
    model.chat("Unheard-of: ꙮ 𒀀 <|new_token|> <|im_end|>", max_new_tokens=3)
    assert (len(model.tokenizer), model.model.embed_tokens.weight.shape, model.model.head_weight.shape) == before
    for prompt in ("The", "狐"):
        assert max(model.completion_ids(prompt)) < len(model.tokenizer)


def test_nothing_without_text_is_ever_chosen(model):
    """Ids beyond the tokenizer, which this model likes best of all, and control tokens that end nothing."""
    settings = SamplingSettings(max_new_tokens=40, temperature=3, top_k=0, top_p=1, seed=1)
    prompts = [model.completion_ids(text) for text in TEXTS[:2]]
    free = {token for step in generate(model.model, prompts, settings) for token in step.tokens}
    assert max(free - {None}) >= len(model.tokenizer)
    steps = generate(model.model, prompts, settings, model.stop_ids, 0, model.forbidden_ids)
    chosen = {token for step in steps for token in step.tokens if token is not None}
    assert all(model.tokenizer.token_bytes(token) for token in chosen) and max(chosen) < len(model.tokenizer)


def test_conversations_that_cannot_be_answered_are_refused(model):
    with pytest.raises(UsageError, match="ends with the assistant's turn"):
        model.chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    with pytest.raises(DataError, match="unknown role 'root'"):
        model.chat([{"role": "root", "content": "Hi"}])
    with pytest.raises(DataError, match="half of a character"):
        model.chat("broken \ud83d")
    with pytest.raises(DataError, match="half of a character"):
        model.complete("broken \ud83d")
    with pytest.raises(UsageError, match=rf"takes \d+ tokens; the model's context holds {CONTEXT}"):
        model.chat("fox " * 100)
    with pytest.raises(UsageError, match="temperature"):
        model.chat("Hi", temperature=-1)
    with pytest.raises(UsageError, match="stop"):
        model.chat("Hi", stop=["ok", ""])


def test_prompts_are_the_chat_formats(model):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "狐"}]
    assert model.chat_ids(messages) == ChatFormat(model.tokenizer).prompt(messages)
    whole = ChatFormat(model.tokenizer).encode([*messages, {"role": "assistant", "content": "Well"}]).ids
    assert whole[: len(model.chat_ids(messages))] == model.chat_ids(messages)


# --- pieces of text --------------------------------------------------------------------------------------------------


def decode(tokenizer: Tokenizer, ids, stop=()) -> tuple[list[str], TextDecoder]:
    decoder = TextDecoder(tokenizer, stop)
    pieces = [decoder.push(token) for token in ids]
    return [*pieces, decoder.finish()], decoder


def test_pieces_never_hold_half_a_character(model):
    numbers = random.Random(0)
    for _ in range(200):
        text = random_text(numbers, numbers.randrange(30)).replace("\ufffd", "")
        pieces, _ = decode(model.tokenizer, model.tokenizer.encode(text))
        assert "".join(pieces) == text
        assert pieces[-1] == "" and "\ufffd" not in "".join(pieces)  # so each piece was whole, and none came late


def test_broken_bytes_come_out_as_the_tokenizer_has_them(model):
    numbers = random.Random(1)
    plain = [token for token in range(len(model.tokenizer)) if token not in model.tokenizer.special_ids]
    for _ in range(300):
        ids = numbers.choices(plain, k=numbers.randrange(1, 25))
        pieces, _ = decode(model.tokenizer, ids)
        assert "".join(pieces) == model.tokenizer.decode(ids)


def test_half_a_character_waits_for_the_end(model):
    ids = model.tokenizer.encode("a한")[:-1]  # three bytes, of which the last never comes
    pieces, _ = decode(model.tokenizer, ids)
    assert pieces[0] == "a" and set(pieces[1:-1]) == {""} and pieces[-1] == "\ufffd"


def expected_cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """By definition: reading character by character, the text ends where a stop string is complete for the first time."""
    for end in range(1, len(text) + 1):
        starts = [end - len(each) for each in stop if text[:end].endswith(each)]
        if starts:
            return text[: min(starts)], True
    return text, False


class Chunks:
    """Stands in for a tokenizer whose tokens are any pieces of a text's bytes."""

    def __init__(self, text: str, numbers: random.Random):
        data = text.encode()
        cuts = sorted({0, len(data), *(numbers.randrange(len(data) + 1) for _ in range(numbers.randrange(4)))})
        self.pieces = [data[begin:end] for begin, end in itertools.pairwise(cuts)]

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]


def test_stop_strings_do_not_depend_on_tokens(model):
    """Random texts over few characters, so that stop strings are common, overlap and straddle tokens."""
    numbers = random.Random(2)
    stopped = 0

    def few(length: int) -> str:
        return "".join(numbers.choice("ab狐") for _ in range(length))

    for _ in range(500):
        whole, stop = few(numbers.randrange(12)), tuple(few(numbers.randrange(1, 5)) for _ in range(numbers.randrange(1, 4)))
        expected, ends = expected_cut(whole, stop)
        chunks = Chunks(whole, numbers)
        for tokenizer, ids in ((model.tokenizer, model.tokenizer.encode(whole)), (chunks, range(len(chunks.pieces)))):
            pieces, decoder = decode(tokenizer, ids, stop)
            assert ("".join(pieces), decoder.stopped) == (expected, ends)
        stopped += ends
    assert 100 < stopped < 450


def test_text_waits_no_longer_than_it_must(model):
    decoder = TextDecoder(model.tokenizer, ("END", "\n\n"))
    shown = [decoder.push(token) for character in "aENxE" for token in model.tokenizer.encode(character)]
    assert shown == ["a", "", "", "ENx", ""] and decoder.finish() == "E" and not decoder.stopped


def test_generation_ends_at_a_stop_string(model):
    options = {"max_new_tokens": 40, "temperature": 1.2, "seed": 8}
    prompts = ["The fox", "狐狸"]
    free = model.complete(prompts, **options)
    for row, text in enumerate(free):
        stop = text[5:9]  # four characters of random bytes: tokens end within it
        expected = text[: text.find(stop)]
        assert model.complete(prompts, stop=stop, **options)[row] == expected
        assert model.complete(prompts, stop=["never to be seen", stop], **options)[row] == expected
    assert "".join(model.stream_complete(prompts[0], stop=free[0][5:9], **options)) == free[0][: free[0].find(free[0][5:9])]


# --- loss and perplexity ---------------------------------------------------------------------------------------------


def nats(model: TextModel, before: list[int], token: int) -> float:
    with torch.inference_mode():
        return -model.model(torch.tensor([before]))[0, -1].log_softmax(-1)[token].item()


def test_loss_of_a_short_text_counts_each_token_once(model):
    ids = [model.tokenizer.document_end_id, *model.tokenizer.encode("The fox 🦊 lives")]
    expected = [nats(model, ids[:at], ids[at]) for at in range(1, len(ids))]
    assert model.loss("The fox 🦊 lives") == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert model.perplexity("The") == pytest.approx(math.exp(model.loss("The")))
    with pytest.raises(UsageError, match="the text is empty"):
        model.loss("")


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, CONTEXT + CONTEXT // 2, 3 * CONTEXT + 7])
def test_loss_of_a_long_text_is_taken_in_windows(model, length):
    """Token by token: the first window holds the context; each next one ends half a context further on."""
    text = "狐" * length  # one token each, or a fixed number
    ids = [model.tokenizer.document_end_id, *model.tokenizer.encode(text)]
    assert len(ids) > length
    total, end = 0.0, CONTEXT + 1
    for at in range(1, len(ids)):
        while at >= end:
            end += CONTEXT // 2
        begin = max(0, min(end, len(ids)) - 1 - CONTEXT)
        assert at < CONTEXT or at - begin >= CONTEXT // 2
        total += nats(model, ids[begin:at], ids[at])
    assert model.loss(text) == pytest.approx(total / (len(ids) - 1), rel=1e-5)
