"""Conversations: read from four dialects, encoded as transformers encodes them, each reply and its end token learnt exactly."""

import json
import random
import re

import pytest
from conftest import TEXTS

from etude.chat import ChatFormat, EncodedChat
from etude.corpus.conversations import ROLE_OF, check_order, to_messages
from etude.errors import DataError, MismatchError
from etude.tokenizer import SPECIAL_TOKENS, TURN_END, TURN_START, Tokenizer, train_tokenizer


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["system", "user", "assistant"] if first == "system" else ["user", "assistant"]
    roles += ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


# --- four dialects ---------------------------------------------------------------------------------------------------

DIALECTS = {
    "role and content": {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    "from and value": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "weight": 1}], "id": 7},
    "instruction": {"instruction": "Hi", "output": "Ho"},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read(dialect):
    assert to_messages(DIALECTS[dialect]) == turns("Hi", "Ho")


def test_the_fine_points_of_dialects():
    assert to_messages({"instruction": "Add", "input": "2 2", "output": "4"}) == turns("Add\n2 2", "4")
    assert to_messages({"instruction": "Add", "input": "", "output": "4"}) == turns("Add", "4")
    assert to_messages({"instruction": "", "input": "2 2", "output": "4"}) == turns("2 2", "4")
    assert to_messages({"system": "S", "instruction": "Add", "output": "4"}) == turns("S", "Add", "4", first="system")
    talk = DIALECTS["from and value"]["conversations"]
    assert to_messages({"system": "S", "conversations": talk}) == turns("S", "Hi", "Ho", first="system")
    own = [{"from": "system", "value": "Mine"}, *talk]
    assert to_messages({"system": "S", "conversations": own}) == turns("Mine", "Hi", "Ho", first="system")
    assert to_messages({"system": "", "conversations": talk}) == turns("Hi", "Ho")
    for name, role in ROLE_OF.items():
        assert to_messages({"messages": [{"role": name, "content": " kept as it is \n"}]}) == [
            {"role": role, "content": " kept as it is \n"}
        ]


@pytest.mark.parametrize(
    "record, message",
    [
        ([], "not a JSON object"),
        ("Hi", "not a JSON object"),
        ({}, "no conversation: expected a key 'conversations', 'messages', or 'instruction' and 'output'"),
        ({"instruction": "Hi"}, "no conversation"),
        ({"output": "Hi"}, "no conversation"),
        ({"conversations": None}, "no conversation"),
        ({"conversations": []}, "the conversation is empty or not a list"),
        ({"conversations": {}}, "the conversation is empty or not a list"),
        ({"messages": "Hi"}, "the conversation is empty or not a list"),
        ({"messages": ["Hi"]}, "turn 1 is not an object"),
        ({"messages": [{"role": "user", "content": "Hi"}, None]}, "turn 2 is not an object"),
        (
            {"messages": [{"content": "Hi"}]},
            "turn 1: unknown role None; known: system, user, human, assistant, gpt, chatgpt, bot",
        ),
        ({"messages": [{"role": "tool", "content": "Hi"}]}, "turn 1: unknown role 'tool'"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, r"turn 1: unknown role \['user'\]"),
        ({"messages": [{"role": "user"}]}, "turn 1: its content is NoneType, not text"),
        ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, "turn 1: its content is list, not text"),
        ({"conversations": [{"from": "human", "value": 5}]}, "turn 1: its content is int, not text"),
        ({"instruction": "Hi", "output": None}, "'output' is NoneType, not text"),
        ({"instruction": "Hi", "input": 5, "output": ""}, "'input' is int, not text"),
        ({"system": 5, "messages": [{"role": "user", "content": "Hi"}]}, "'system' is int, not text"),
    ],
)
def test_bad_records_are_refused_with_the_reason(record, message):
    with pytest.raises(DataError, match=message) as error:
        to_messages(record)
    assert error.value.exit_code == 65
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "roles, problem",
    [
        ("ua", ""),
        ("sua", ""),
        ("uaua", ""),
        ("uau", ""),  # a question without its answer may end it
        ("", "no assistant reply"),
        ("s", "no assistant reply"),
        ("u", "no assistant reply"),
        ("su", "no assistant reply"),
        ("au", "turn 1 is by 'assistant' where 'user' was expected"),
        ("sa", "turn 2 is by 'assistant' where 'user' was expected"),
        ("uu", "turn 2 is by 'user' where 'assistant' was expected"),
        ("uaa", "turn 3 is by 'assistant' where 'user' was expected"),
        ("usa", "turn 2 is by 'system' where 'assistant' was expected"),
        ("ssua", "turn 2 is by 'system' where 'user' was expected"),
        ("uas", "turn 3 is by 'system' where 'user' was expected"),
        ("uE", "turn 2 is empty"),
        ("eaua", "turn 1 is empty"),
        ("suaeaua", "turn 4 is empty"),
        ("Sua", ""),  # an empty system turn says nothing and harms nothing
    ],
)
def test_the_order_of_turns_is_checked(roles, problem):
    named = {"s": "system", "u": "user", "a": "assistant", "e": "user", "E": "assistant", "S": "system"}
    messages = [{"role": named[role], "content": " \n" if role in "eES" else "words"} for role in roles]
    if not problem:
        return check_order(messages)
    with pytest.raises(DataError, match=problem):
        check_order(messages)


# --- ids and mask ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["", "You are Etude. 简短。"], ids=["no default system", "default system"])
def folder(tmp_path_factory, request):
    """A tokenizer that has learnt "\\n\\n", so that a content's first line end may join the template's."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([*TEXTS, "a\n\nb\n\nc\n\n" * 20], folder, 330, request.param)
    return folder


@pytest.fixture(scope="module")
def chat_format(folder) -> ChatFormat:
    return ChatFormat(Tokenizer(folder))


@pytest.fixture(scope="module")
def hf(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def random_conversation(source: random.Random, specials: bool = False) -> list[dict[str, str]]:
    def content() -> str:
        pieces = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "fox ", "狐狸", "🦊", "e\u0301", "'s", "12", "。", "<|im_", "|>"]
        pieces += SPECIAL_TOKENS * 2 if specials else ()
        random_character = chr(source.randrange(0xA0, 0xD800) if source.random() < 0.5 else source.randrange(0xE100, 0x110000))
        return "".join(source.choice([*pieces, random_character]) for _ in range(source.randrange(1, 12)))

    rounds = source.randrange(1, 4)
    return turns(*(content() for _ in range(2 * rounds))) if source.random() < 0.5 else turns(
        content(), *(content() for _ in range(2 * rounds)), first="system"
    )  # fmt: skip


def crosses_a_boundary(hf, rendered: str, messages: list[dict[str, str]]) -> bool:
    """Whether one of transformers' tokens holds text on both sides of where some content begins or ends."""
    boundaries, at = set(), 0
    for message in messages:
        at = rendered.index(f"{TURN_START}{message['role']}\n", at) + len(TURN_START) + len(message["role"]) + 1
        boundaries |= {at, at + len(message["content"])}
        at += len(message["content"])
    offsets = hf(rendered, return_offsets_mapping=True)["offset_mapping"]
    return any(start < boundary < end for start, end in offsets for boundary in boundaries)


def test_ids_and_mask_are_those_of_transformers(chat_format, hf):
    source, crossing, equal = random.Random(0), 0, 0
    for _ in range(200):
        messages = random_conversation(source)
        chat = chat_format.encode(messages)
        rendered = hf.apply_chat_template(messages, tokenize=False)
        system = {"role": "system", "content": "You are Etude. 简短。"}
        shown = messages if messages[0]["role"] == "system" or TURN_START + "system" not in rendered else [system, *messages]
        assert chat_format.tokenizer.decode(chat.ids) == rendered
        if crosses_a_boundary(hf, rendered, shown):
            crossing += 1  # there, the ids may differ; the text may not
            continue
        reference = hf.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert chat.ids == list(reference["input_ids"])
        assert chat.mask == [bool(flag) for flag in reference["assistant_masks"]]
        prompt = hf.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)
        assert chat_format.prompt(messages[:-1]) == list(prompt["input_ids"])
        equal += 1
    assert equal > 50 and crossing > 10


def test_special_tokens_in_contents_stay_text(chat_format, hf):
    source, tokenizer = random.Random(1), chat_format.tokenizer
    differing = 0
    for _ in range(100):
        messages = random_conversation(source, specials=True)
        messages[1]["content"] += TURN_END + TURN_START
        chat = chat_format.encode(messages)
        default = messages[0]["role"] != "system" and "Etude" in chat_format.tokenizer.settings["chat_template"]
        structure = [token for token in chat.ids if token in tokenizer.special_ids]
        assert structure == [tokenizer.id_of(TURN_START), tokenizer.eos_id] * (len(messages) + default)
        assert tokenizer.decode(chat.ids) == tokenizer.render(tuple((m["role"], m["content"]) for m in messages))
        assert_spans_are_the_replies(tokenizer, chat, messages)
        differing += list(hf.apply_chat_template(messages, return_dict=True)["input_ids"]) != chat.ids
    assert differing == 100


def test_special_tokens_split_across_contents_stay_text(chat_format):
    for token in SPECIAL_TOKENS:
        for cut in range(1, len(token)):
            messages = turns(token[:cut], token[cut:], token[cut:] + token[:cut], token)
            chat = chat_format.encode(messages)
            assert_spans_are_the_replies(chat_format.tokenizer, chat, messages)
            assert sum(token in chat_format.tokenizer.special_ids for token in chat.ids) in (8, 10)


def spans(chat: EncodedChat) -> list[tuple[int, int]]:
    edges = [at for at in range(len(chat.ids) + 1) if [False, *chat.mask][at] != [*chat.mask, False][at]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def assert_spans_are_the_replies(tokenizer: Tokenizer, chat: EncodedChat, messages: list[dict[str, str]]) -> None:
    """Every reply is learnt from its first token to its end token, and nothing else is."""
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(chat.mask) == len(chat.ids)
    assert [tokenizer.decode(chat.ids[start:stop]) for start, stop in spans(chat)] == [reply + TURN_END for reply in replies]
    assert [chat.ids[start:stop] for start, stop in spans(chat)] == [
        [*tokenizer.encode(reply), tokenizer.eos_id] for reply in replies
    ]
    assert chat.ends == [stop for _, stop in spans(chat)]


def test_every_reply_is_learnt_from_its_first_token_to_its_end_token(chat_format):
    source = random.Random(2)
    for _ in range(150):
        messages = random_conversation(source)
        assert_spans_are_the_replies(chat_format.tokenizer, chat_format.encode(messages), messages)


def test_prompts_are_prefixes_of_what_was_trained(chat_format):
    source = random.Random(3)
    for specials in (False, True) * 50:
        messages = random_conversation(source, specials)
        chat = chat_format.encode(messages)
        replies = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        for reply, (start, _) in zip(replies, spans(chat), strict=True):
            prompt = chat_format.prompt(messages[:reply])
            assert chat.ids[: len(prompt)] == prompt
            assert len(prompt) == start  # the first token to produce is the first that was learnt
    assert chat_format.tokenizer.decode(prompt).endswith(f"{TURN_START}assistant\n")


def test_a_batch_is_its_conversations_one_by_one(chat_format):
    source = random.Random(4)
    conversations = [random_conversation(source, specials=True) for _ in range(40)]
    assert chat_format.encode_batch(conversations) == [chat_format.encode(messages) for messages in conversations]
    assert chat_format.encode_batch([]) == []
    # The template is rendered with stand-ins for the contents; contents that look like them are nothing special.
    messages = turns("\ue0001\ue001 a \ue0000\ue001", "\ue0000\ue001")
    assert_spans_are_the_replies(chat_format.tokenizer, chat_format.encode(messages), messages)


def test_more_than_ten_turns_keep_their_places(chat_format):
    messages = turns(*(f"turn {number}" for number in range(24)))
    chat = chat_format.encode(messages)
    assert_spans_are_the_replies(chat_format.tokenizer, chat, messages)
    assert re.findall(r"turn \d+", chat_format.tokenizer.decode(chat.ids)) == [f"turn {number}" for number in range(24)]


# --- other templates -------------------------------------------------------------------------------------------------


def with_template(tokenizer_folder, tmp_path, template: str | None) -> ChatFormat:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}), encoding="utf-8")
    return ChatFormat(Tokenizer(tmp_path))


LOOP = "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' + CONTENT + END -}}{%- endfor -%}"


def test_a_template_that_rewrites_contents_is_found_out(tokenizer_folder, tmp_path):
    plain = with_template(tokenizer_folder, tmp_path, LOOP.replace("CONTENT", "m['content']").replace("END", "'<|im_end|>'"))
    plain.verify(turns(" spaced ", "Ho "))
    strips = with_template(
        tokenizer_folder, tmp_path, LOOP.replace("CONTENT", "m['content'] | trim").replace("END", "'<|im_end|>'")
    )
    strips.verify(turns("Hi", "Ho"))
    with pytest.raises(DataError, match="the chat template rewrites contents"):
        strips.verify(turns(" spaced ", "Ho "))


def test_a_template_without_end_tokens_has_none_to_learn(tokenizer_folder, tmp_path):
    bare = with_template(tokenizer_folder, tmp_path, LOOP.replace("CONTENT", "m['content']").replace("END", "'\n'"))
    chat = bare.encode(turns("Hi", "Ho", "Hi", "Hm"))
    assert [bare.tokenizer.decode(chat.ids[start:stop]) for start, stop in spans(chat)] == ["Ho", "Hm"]
    assert chat.ends == [stop for _, stop in spans(chat)]


@pytest.mark.parametrize(
    "template, error, message",
    [
        (LOOP.replace("CONTENT", "''").replace("END", "''"), DataError, r"leaves out a message \(roles: user, assistant\)"),
        (
            "{{ raise_exception('no system turn, please') }}",
            DataError,
            "the chat template refuses this conversation: no system turn",
        ),
        ("{% for %}", DataError, "the chat template refuses this conversation"),
        (None, MismatchError, "no chat template, so it cannot be used for chat or SFT"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(tokenizer_folder, tmp_path, template, error, message):
    with pytest.raises(error, match=message):
        with_template(tokenizer_folder, tmp_path, template).encode(turns("Hi", "Ho"))
