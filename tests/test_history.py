"""Cutting a conversation to the context: whole turns, the oldest first, and never what must stay."""

import pytest

from etude.chat import ChatFormat
from etude.errors import UsageError
from etude.generation.history import fit_history


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


@pytest.fixture(scope="module")
def chat_format(tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)


def test_what_fits_is_left_alone(chat_format):
    messages = turns("Where does the fox live?", "In the forest.", "春眠不觉晓？", system="Be brief.")
    length = len(chat_format.prompt(messages))
    assert fit_history(chat_format, messages, context=length + 10, reserve=10) == (messages, 0)


def test_one_token_too_many_drops_the_oldest_question_with_its_answer(chat_format):
    messages = turns("First?", "One.", "Second?", "Two.", "Third?", system="Be brief.")
    length = len(chat_format.prompt(messages))
    kept, dropped = fit_history(chat_format, messages, context=length + 9, reserve=10)
    assert dropped == 1
    assert kept == [messages[0], *messages[3:]]  # the system turn, and from the second question on


def test_the_reserve_is_free_after_cutting_and_no_more_is_dropped_than_needed(chat_format):
    messages = turns(*(f"Turn {number}: {'fox ' * number}" for number in range(9)))
    for context in range(60, len(chat_format.prompt(messages)) + 20, 7):
        try:
            kept, dropped = fit_history(chat_format, messages, context, reserve=20)
        except UsageError:
            continue
        assert kept == messages[2 * dropped :]
        assert len(chat_format.prompt(kept)) + 20 <= context
        if dropped:
            assert len(chat_format.prompt(messages[2 * dropped - 2 :])) + 20 > context


def test_a_question_that_cannot_fit_is_refused_with_its_length(chat_format):
    messages = turns("Hello?", "Hello.", "fox " * 100)
    alone = len(chat_format.prompt(messages[2:]))
    with pytest.raises(UsageError, match=rf"the question takes {alone} tokens; .* holds 40: shorten it"):
        fit_history(chat_format, messages, context=50, reserve=10)


def test_no_question_is_refused(chat_format):
    with pytest.raises(UsageError, match="no question"):
        fit_history(chat_format, turns(system="Be brief."), context=50, reserve=10)


def test_the_conversation_handed_in_is_not_changed(chat_format):
    messages = turns("First?", "One.", "Second?")
    before = [dict(message) for message in messages]
    fit_history(chat_format, messages, context=len(chat_format.prompt(messages)) - 1, reserve=0)
    assert messages == before
