"""Decoding is proved by comparison: cached with uncached, batched with single, filters and greedy tokens with transformers."""

import math
import random

import pytest
import torch

from etude.errors import UsageError, VerificationError
from etude.export import SAMPLING
from etude.generation.plain import Step, check_prompt, generate, next_token_probabilities, sample
from etude.generation.settings import SamplingSettings
from etude.llama import config_to_hf
from etude.model.attention import KVCache
from etude.model.config import EtudeConfig
from etude.model.transformer import Etude
from etude.weights import to_disk_name

CONTEXT = 48
PROMPTS = [[5, 6, 7], [11], [23, 3, 90, 41, 8, 8, 17, 60, 2], [0, 0, 4]]  # one holds the padding id as an ordinary token
GREEDY = SamplingSettings(max_new_tokens=16, temperature=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost tiny models more than they give, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(**changes) -> Etude:
    torch.manual_seed(7)
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    # Large weights, so that logits lie far apart and a mistake moves them visibly.
    return Etude(EtudeConfig(**{**shape, "max_position_embeddings": CONTEXT, "initializer_range": 0.4, **changes})).eval()


@pytest.fixture(scope="module")
def model() -> Etude:
    return tiny_model()


def run(model, prompts, settings, **options) -> tuple[list[list[int]], list[str]]:
    """All new tokens of each row, and why it ended; checks on the way that an ended row stays silent."""
    rows, reasons = [[] for _ in prompts], [None] * len(prompts)
    for step in generate(model, prompts, settings, **options):
        assert isinstance(step, Step)
        for row, token in enumerate(step.tokens):
            if reasons[row] is not None:
                assert token is None and step.reasons[row] == reasons[row]
            elif token is not None:
                rows[row].append(token)
            else:
                assert step.reasons[row] == "stop"
        reasons = step.reasons
    return rows, reasons


# --- the cache -------------------------------------------------------------------------------------------------------


def test_cached_equals_uncached(model):
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(GREEDY.max_new_tokens):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        (new,), _ = run(model, [prompt], GREEDY)
        assert new == ids[len(prompt) :]
        assert len(set(new)) > 4  # a model that only repeats itself would prove nothing


@pytest.mark.parametrize("chunks", [(1,) * 12, (12,), (5, 1, 4, 2), (1, 11), (7, 5)])
def test_chunks_into_the_cache_see_what_a_full_pass_sees(model, chunks):
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
    cache, parts, at = KVCache(model.config, 2, 12, like=model.head_weight), [], 0
    with torch.inference_mode():
        for size in chunks:
            parts.append(model(ids[:, at : at + size], cache=cache))
            at += size
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunks", [(12,), (8, 4), (7, 1, 3, 1)])
def test_chunks_behind_padding_see_what_the_bare_row_sees(model, chunks):
    ids = torch.randint(97, (3, 12), generator=torch.Generator().manual_seed(2))
    starts = torch.tensor([0, 3, 6])
    cache, parts, at = KVCache(model.config, 3, 12, like=model.head_weight, starts=starts), [], 0
    with torch.inference_mode():
        for size in chunks:
            parts.append(model(ids[:, at : at + size], cache=cache))
            at += size
        padded = torch.cat(parts, 1)
        for row, start in enumerate(starts.tolist()):
            bare = model(ids[row : row + 1, start:])[0]
            torch.testing.assert_close(padded[row, start:], bare, rtol=1e-4, atol=1e-4)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        SamplingSettings(max_new_tokens=16, temperature=0, repetition_penalty=1.5),
        SamplingSettings(max_new_tokens=16, temperature=1.5, top_k=0, top_p=0.9, repetition_penalty=1.3, seed=4),
    ],
    ids=["greedy", "greedy with penalty", "sampled"],
)
def test_a_row_is_the_same_alone_in_a_batch_and_behind_padding(model, settings):
    together, _ = run(model, PROMPTS, settings)
    assert len({tuple(new) for new in together}) == len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        assert run(model, [prompt], settings, first_row=row)[0] == [together[row]]
    for size in (2, 3):
        parts = [run(model, PROMPTS[at : at + size], settings, first_row=at)[0] for at in range(0, len(PROMPTS), size)]
        assert [new for part in parts for new in part] == together
    others, _ = run(model, [[90] * 20, PROMPTS[1]], settings)
    assert others[1] == together[1]  # other company, same place: same answer


def test_the_padding_id_does_not_matter(model):
    settings = SamplingSettings(max_new_tokens=16, temperature=0, repetition_penalty=1.5)
    assert run(model, PROMPTS, settings, pad_id=0) == run(model, PROMPTS, settings, pad_id=96)


def test_seeds_reproduce(model):
    def answer(seed):
        return run(model, PROMPTS, SamplingSettings(max_new_tokens=16, temperature=1.5, top_p=1, top_k=0, seed=seed))

    torch.manual_seed(1)
    first = answer(5)
    torch.manual_seed(2)  # nothing global counts
    assert answer(5) == first
    assert answer(6) != first
    assert answer(None) != answer(None)


def test_same_prompt_in_two_rows_gets_two_samples(model):
    rows, _ = run(model, [PROMPTS[0]] * 2, SamplingSettings(max_new_tokens=16, temperature=2, top_p=1, seed=1))
    assert rows[0] != rows[1]


# --- where a row ends ------------------------------------------------------------------------------------------------


def test_a_stop_id_ends_its_row_and_is_not_given_out(model):
    free, reasons = run(model, PROMPTS, GREEDY)
    assert reasons == ["length"] * len(PROMPTS)
    stop = next(token for token in free[2] if sum(token in new for new in free) == 1)
    stopped, reasons = run(model, PROMPTS, GREEDY, stop_ids={stop})
    for row, new in enumerate(free):
        assert stopped[row] == (new[: new.index(stop)] if stop in new else new)
        assert reasons[row] == ("stop" if stop in new else "length")
    assert reasons == ["length", "length", "stop", "length"]


def test_rows_of_one_length_go_on_alike_when_one_of_them_ends(model):
    """Without padding at first; the ended row becomes padding."""
    prompts = [PROMPTS[0], PROMPTS[3]]
    free, _ = run(model, prompts, GREEDY)
    stop = next(token for token in free[0][:6] if token not in free[1])
    stopped, reasons = run(model, prompts, GREEDY, stop_ids={stop})
    assert stopped == [free[0][: free[0].index(stop)], free[1]] and reasons == ["stop", "length"]


def test_the_context_ends_a_row_whatever_its_company(model):
    settings = SamplingSettings(max_new_tokens=1000, temperature=0)
    long, short = [9] * (CONTEXT - 3), [5]
    rows, reasons = run(model, [long, short], settings)
    assert [len(new) for new in rows] == [3, CONTEXT - 1]
    assert reasons == ["length", "length"]
    assert run(model, [long], settings)[0] == rows[:1] and run(model, [short], settings)[0] == rows[1:]


def test_prompts_that_cannot_be_answered_are_refused(model):
    check_prompt([1] * (CONTEXT - 1), CONTEXT)
    with pytest.raises(
        UsageError, match=rf"takes {CONTEXT} tokens; .* holds {CONTEXT}.*shorten the prompt to at most {CONTEXT - 1}"
    ):
        next(generate(model, [[1], [1] * CONTEXT], GREEDY))
    with pytest.raises(UsageError, match="the prompt is empty"):
        next(generate(model, [[]], GREEDY))


def test_forbidden_ids_are_never_chosen():
    model = tiny_model(tie_word_embeddings=False)  # an embedding of 97 rows for a tokenizer of, say, 90
    with torch.no_grad():
        model.lm_head.weight[90:] *= 30  # what nobody trained may come out on top
    anything = SamplingSettings(max_new_tokens=16, temperature=1, top_k=0, top_p=1, seed=0)
    for settings in (GREEDY, anything):
        assert max(max(new) for new in run(model, PROMPTS, settings)[0]) >= 90
        assert max(max(new) for new in run(model, PROMPTS, settings, forbidden_ids=range(90, 97))[0]) < 90
    assert model.embed_tokens.weight.shape[0] == 97


def test_weights_that_are_not_finite_are_an_error():
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(VerificationError, match="not finite"):
        next(generate(model, PROMPTS, GREEDY))


# --- the choice of a token -------------------------------------------------------------------------------------------

FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 500},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.7, "min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 0.6, "top_k": 9, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_are_those_of_transformers(filters):
    from transformers import GenerationConfig, LogitsProcessorList
    from transformers.generation import logits_process as hf

    settings = SamplingSettings(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **filters})
    logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(3)) * 3
    previous = torch.randint(60, (4, 12), generator=torch.Generator().manual_seed(4))
    processors = LogitsProcessorList([hf.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)])
    processors.append(hf.TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        processors.append(hf.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(hf.TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        processors.append(hf.MinPLogitsWarper(settings.min_p))
    expected = processors(previous, logits.clone()).softmax(-1)
    torch.testing.assert_close(next_token_probabilities(logits, previous.tolist(), settings), expected)
    assert set(filters) <= set(GenerationConfig().to_dict())  # the names are transformers' as well


def test_top_p_does_not_mix_rows():
    """Three rows of very different sharpness, each alone and together; and each keeps just its own nucleus."""
    logits = torch.tensor([[8.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0.1], [0, 3, 0, 3, 0, 0]])
    settings = SamplingSettings(temperature=1, top_k=0, top_p=0.6)
    together = next_token_probabilities(logits, [[]] * 3, settings)
    alone = [next_token_probabilities(row[None], [[]], settings)[0] for row in logits]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=0)
    assert [int((row > 0).sum()) for row in together] == [1, 4, 2]
    assert together[2].nonzero().flatten().tolist() == [1, 3]


def test_temperature_0_is_the_likeliest_token_and_divides_by_nothing():
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1e30, -5.0, -math.inf]])
    probabilities = next_token_probabilities(logits, [[], []], SamplingSettings(temperature=0))
    assert probabilities.tolist() == [[0, 1, 0], [0, 1, 0]]
    coldest = next_token_probabilities(logits, [[], []], SamplingSettings(temperature=0.001))
    assert coldest.isfinite().all() and coldest.tolist() == [[0, 1, 0], [0, 1, 0]]


class Fixed:
    """A source that always gives one number."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


def test_sampling_follows_the_probabilities_and_never_draws_the_impossible():
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.2, 0.3, 0.0]])
    source, count = random.Random(0), 4000
    drawn = [sample(probabilities, [source])[0] for _ in range(count)]
    for token, probability in enumerate(probabilities[0].tolist()):
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(drawn.count(token) - count * probability) <= 4 * deviation
    assert sample(probabilities, [Fixed(0.0)]) == [1]
    assert sample(probabilities, [Fixed(1 - 2**-53)]) == [4]
    many = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0)).softmax(-1)
    many[:, 15_000:] = 0  # sums to less than 1, as rounding may have it
    assert sample(many, [Fixed(1 - 2**-53)])[0] < 15_000


@pytest.mark.parametrize(
    "field, value, limit",
    [
        ("max_new_tokens", 0, "at least 1"),
        ("temperature", -0.5, "at least 0.001, or 0"),
        ("temperature", 1e-9, "at least 0.001, or 0"),
        ("temperature", math.nan, "at least 0.001, or 0"),
        ("temperature", math.inf, "at least 0.001, or 0"),
        ("top_k", -1, "at least 1, or 0 to switch it off"),
        ("top_p", 0.0, "greater than 0 and at most 1"),
        ("top_p", 1.01, "greater than 0 and at most 1"),
        ("min_p", -0.1, "between 0 and 1"),
        ("repetition_penalty", 0.0, "greater than 0"),
        ("seed", -1, "at least 0"),
    ],
)
def test_settings_are_checked(field, value, limit):
    with pytest.raises(UsageError, match=rf"^{field} \({value}\) must be {limit}"):
        SamplingSettings(**{field: value})


def test_defaults_are_those_an_export_recommends():
    assert {name: getattr(SamplingSettings(), name) for name in SAMPLING} == SAMPLING


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(model):
    """The same model as a Llama of transformers'."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = LlamaForCausalLM(LlamaConfig(**config_to_hf(model.config))).eval()
    loaded = hf.load_state_dict({to_disk_name(name): tensor for name, tensor in model.state_dict().items()}, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"] and not loaded.unexpected_keys  # the head is the embedding
    return hf


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_tokens_are_those_of_transformers(model, hf, penalty):
    ours, _ = run(model, PROMPTS, SamplingSettings(max_new_tokens=16, temperature=0, repetition_penalty=penalty))
    for prompt, new in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        options = {
            "do_sample": False,
            "max_new_tokens": 16,
            "repetition_penalty": penalty,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        theirs = hf.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert theirs[0, len(prompt) :].tolist() == new


@pytest.mark.parametrize(
    "needed, filters",
    [
        (("top_k", "top_p"), {"repetition_penalty": 1.5, "temperature": 5.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01}),
        (("min_p",), {"repetition_penalty": 1.5, "temperature": 3.0, "top_k": 40, "top_p": 0.95, "min_p": 0.3}),
    ],
)
def test_the_order_of_filters_is_that_of_transformers(model, hf, needed, filters):
    """What generate() draws from with all filters switched on, where the ``needed`` ones do take something away."""
    off = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    unused = {*needed, "repetition_penalty", "temperature"}
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"do_sample": True, "max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
        theirs = hf.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, pad_token_id=0, **options, **filters)
        with torch.inference_mode():
            logits = model(ids)[:, -1]
        ours = next_token_probabilities(logits, [prompt], SamplingSettings(**filters))
        torch.testing.assert_close(ours, theirs.scores[0].softmax(-1), rtol=1e-4, atol=1e-6)
        for name in list(unused):
            without = next_token_probabilities(logits, [prompt], SamplingSettings(**{**filters, name: off[name]}))
            unused -= set() if torch.equal(without, ours) else {name}
    assert not unused
