"""A conversation that outgrows the context: which turns a model still sees."""

from etude.chat import ChatFormat
from etude.corpus.conversations import Messages
from etude.errors import UsageError


def fit_history(chat_format: ChatFormat, messages: Messages, context: int, reserve: int) -> tuple[Messages, int]:
    """The newest turns whose prompt leaves ``reserve`` of ``context`` tokens for the reply, and how many were dropped.

    Dropped are whole turns, a question with its answer, the oldest first. The system turn and the last question stay;
    where even these do not fit, :class:`UsageError` is raised.
    """
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if not starts:
        raise UsageError("there is no question to answer")
    system = messages[: starts[0]]
    for dropped, start in enumerate(starts):
        kept = [*system, *messages[start:]]
        length = len(chat_format.prompt(kept))
        if length + reserve <= context:
            return kept, dropped
    raise UsageError(
        f"the question takes {length} tokens; with {reserve} for the reply the model's context holds "
        f"{max(context - reserve, 0)}: shorten it"
    )
