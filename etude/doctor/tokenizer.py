"""A tokenizer folder: does text survive, does text stay text, and is the chat template the format that training uses."""

from pathlib import Path

from etude.chat import ChatFormat
from etude.corpus.conversations import Messages
from etude.doctor.data import comes_back, control_tokens
from etude.doctor.report import Report
from etude.errors import VerificationError
from etude.tokenizer import DOCUMENT_END, Tokenizer
from etude.training.tokenizer import HARD_TEXTS, verify_round_trip

CONVERSATION: Messages = [
    {"role": "system", "content": "Be brief. 简短。"},
    {"role": "user", "content": "  Hello, 世界!\n 2 + 2?"},
    {"role": "assistant", "content": "4 🙂 "},
    {"role": "user", "content": "谢谢"},
    {"role": "assistant", "content": "不客气。"},
]  # spaces at the ends, since templates of elsewhere like to strip them


def look_at_tokenizer(folder: str | Path, report: Report) -> Tokenizer | None:
    """Examine a folder; the tokenizer, or None where it cannot even be read."""
    tokenizer = None
    with report.examining("tokenizer"):
        tokenizer = Tokenizer(folder)
        _ = tokenizer.eos_id, tokenizer.pad_id, tokenizer.special_ids
        report.ok("tokenizer", f"{len(tokenizer):,} tokens")
    if tokenizer is None:
        return None
    with report.examining("round trip"):
        _look_at_round_trips(tokenizer, report)
    with report.examining("control tokens"):
        _look_at_control_tokens(tokenizer, report)
    with report.examining("padding"):
        _look_at_padding(tokenizer, report)
    if tokenizer.settings.get("chat_template"):
        look_at_template(tokenizer, report)
    else:
        report.not_looked("chat template", "this tokenizer has none, so it cannot be used for SFT or chat")
    return tokenizer


def _look_at_round_trips(tokenizer: Tokenizer, report: Report) -> None:
    changed = [text for text in HARD_TEXTS if not comes_back(tokenizer, text)]
    if changed:
        report.bad(
            "round trip",
            f"{len(changed)} of {len(HARD_TEXTS)} hard texts do not come back from their tokens, the first: {changed[0][:40]!r}; a "
            "model can neither read nor write what is lost; train the tokenizer anew, without a normaliser",
        )
        return
    try:
        for text in HARD_TEXTS:
            verify_round_trip(tokenizer, text)
    except VerificationError as error:
        report.warn(
            "round trip", f"{error} (forms of a character that look alike are made one, or spaces at the ends are lost)"
        )
    else:
        report.ok("round trip", f"{len(HARD_TEXTS)} hard texts come back byte for byte")


def _look_at_control_tokens(tokenizer: Tokenizer, report: Report) -> None:
    """Somebody who types ``<|im_end|>`` must not end a turn. A token that is in the vocabulary, but not marked special, would."""
    tokens = control_tokens(tokenizer)
    forged = [name for name, number in tokens.items() if number in tokenizer.encode(f"a {name} b")]
    torn = [name for name, number in tokens.items() if tokenizer.encode_template(name) != [number]]
    if forged:
        report.bad(
            "control tokens",
            f"{', '.join(forged)} typed as text becomes the control token, so data and users can end or open turns; "
            'mark it "special": true in tokenizer.json',
        )
    if torn:
        report.bad(
            "control tokens", f"{', '.join(torn)} in the chat template is not one token; check added_tokens in tokenizer.json"
        )
    if not forged and not torn:
        report.ok("control tokens", f"{len(tokens)} of them; typed as text they stay text")


def _look_at_padding(tokenizer: Tokenizer, report: Report) -> None:
    eos, pad = tokenizer.eos_id, tokenizer.pad_id
    if eos == pad:
        report.bad(
            "padding",
            f"pad and eos are one token ({tokenizer.decode([eos])!r}): trainers that leave padding out of the loss leave out the end of "
            f"every reply, too, and the model never stops; name another pad_token in tokenizer_config.json ({DOCUMENT_END}, say)",
        )
    else:
        report.ok("padding", f"pad ({tokenizer.decode([pad])!r}) is not eos ({tokenizer.decode([eos])!r})")


def look_at_template(tokenizer: Tokenizer, report: Report) -> None:
    """The ids that training makes, against what any program gets that renders the template and encodes the text."""
    format = ChatFormat(tokenizer)
    conversations = []
    for messages in (CONVERSATION, CONVERSATION[1:]):
        try:
            format.encode(messages)
            conversations.append(messages)
        except Exception as error:  # a template may refuse a system turn; then it is not used with one
            if messages is not CONVERSATION:
                with report.examining("chat template"):
                    raise error
    problems: dict[str, None] = {}
    with report.examining("chat template"):
        for messages in conversations:
            for problem in _problems_of_template(format, messages):
                problems[problem] = None
        for problem in problems:
            report.bad("chat template", problem)
    if conversations and not problems:
        report.ok("chat template", "renders what training learns, and a prompt ends where the reply begins")


def _problems_of_template(format: ChatFormat, messages: Messages) -> list[str]:
    tokenizer, found = format.tokenizer, []
    chat = format.encode(messages)
    rendered = tokenizer.render(tuple((message["role"], message["content"]) for message in messages))
    if tokenizer.decode(chat.ids) != rendered:
        found.append(
            "it rewrites contents (strips or changes them), so what training learns is not what chat programs send; "
            "let it write message['content'] as it is"
        )
    elif tokenizer.encode_template(rendered) != chat.ids:
        found.append(
            "rendered and encoded it gives other ids than training learns: its words run into the contents' tokens; "
            "set them apart by special tokens"
        )
    prompt, reply = format.prompt(messages[:-1]), chat.ends[-2]
    begins = reply + chat.mask[reply:].index(True)
    if chat.ids[: len(prompt)] != prompt:
        found.append(
            "its generation prompt is not how a reply begins in training, so the model is asked in a form it has never seen; "
            "make add_generation_prompt write just what comes before a reply"
        )
    elif len(prompt) != begins:
        found.append(
            f"its generation prompt ends {begins - len(prompt)} tokens before a reply begins in training, so the model has to write the "
            "template's own words; check add_generation_prompt"
        )
    if chat.ids[chat.ends[-1] - 1] != tokenizer.eos_id:
        found.append(
            f"a reply ends with {tokenizer.decode([chat.ids[chat.ends[-1] - 1]])!r} in training, but eos is "
            f"{tokenizer.decode([tokenizer.eos_id])!r}, so programs that wait for eos do not stop; make eos_token the template's end"
        )
    return found
