"""The built-in world: the same from the same seed, well-formed, and truly held out."""

from collections import Counter

import pytest

from etude.corpus.conversations import check_order, to_messages
from etude.corpus.inputs import find_files
from etude.corpus.jsonl import Rejects, read_records
from etude.corpus.sample.scene import is_held_out
from etude.corpus.sample.skills import SKILLS
from etude.corpus.sample.world import (
    conversations,
    held_out_documents,
    held_out_questions,
    pretraining_documents,
    traces,
    write_sample,
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The records of every file, by name, and the folder they are in."""
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder)
    names = ("pretrain/pretrain_hq.jsonl", "sft/sft_mini_512.jsonl", "eval/questions.jsonl", "eval/text.jsonl")
    return folder, {name: [record for _, record in read_records(find_files([folder / name])[0], Rejects())] for name in names}


def turns(record: dict) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in record["conversations"]]


def test_a_seed_decides_everything():
    assert list(pretraining_documents(3, 50)) == list(pretraining_documents(3, 50)) != list(pretraining_documents(4, 50))
    assert list(conversations(3, 50)) == list(conversations(3, 50)) != list(conversations(4, 50))
    assert held_out_questions(3, 10) == held_out_questions(3, 10)


def test_every_conversation_is_well_formed(sample):
    for record in sample[1]["sft/sft_mini_512.jsonl"] + sample[1]["eval/questions.jsonl"]:
        messages = to_messages(record)
        check_order(messages)
        assert messages[-1]["role"] == "assistant"


def test_each_skill_has_its_questions_in_both_languages(sample):
    questions = sample[1]["eval/questions.jsonl"]
    assert Counter(question["skill"] for question in questions) == dict.fromkeys(SKILLS, 60)
    for skill in SKILLS:
        answers = [question["conversations"][-1]["content"] for question in questions if question["skill"] == skill]
        chinese = sum(any("\u4e00" <= character <= "\u9fff" for character in answer) for answer in answers)
        assert 20 <= chinese <= 60
    assert len({str(turns(question)) for question in questions}) == len(questions)


def test_what_is_asked_about_occurs_in_no_training_text(sample):
    """By the text itself, not by the generator's word for it."""
    _, files = sample
    texts = [document["text"] for document in files["pretrain/pretrain_hq.jsonl"]]
    texts += ["\n".join(f'"{content}"' for _, content in turns(record)) for record in files["sft/sft_mini_512.jsonl"]]
    everything = "\n\n".join(texts)
    for question in files["eval/questions.jsonl"]:
        assert is_held_out(tuple(question["key"]))
        for trace in traces(tuple(question["key"])):
            assert trace not in everything, (question["key"], trace)


def test_no_question_is_part_of_a_training_conversation(sample):
    _, files = sample
    asked = {str(turns(question)) for question in files["eval/questions.jsonl"]}
    lengths = {len(turns(question)) for question in files["eval/questions.jsonl"]}
    for record in files["sft/sft_mini_512.jsonl"]:
        said = turns(record)
        for length in lengths:
            for start in range(len(said) - length + 1):
                assert str(said[start : start + length]) not in asked


def test_held_out_documents_are_not_trained_on(sample):
    _, files = sample
    trained_on = {document["text"] for document in files["pretrain/pretrain_hq.jsonl"]}
    held_out = [document["text"] for document in files["eval/text.jsonl"]]
    assert len(held_out) == 300 and not trained_on.intersection(held_out)
    assert files["eval/text.jsonl"][:5] == held_out_documents(0, 5)


def test_equal_questions_have_equal_answers(sample):
    """Else exact match would be a matter of luck."""
    answers: dict[str, set[str]] = {}
    for record in sample[1]["sft/sft_mini_512.jsonl"] + sample[1]["eval/questions.jsonl"]:
        said = turns(record)
        for place, (role, content) in enumerate(said):
            if role == "assistant" and (place == 1 or (said[0][0] == "system" and place == 2)):
                answers.setdefault(said[place - 1][1], set()).add(content)
    assert max(map(len, answers.values())) == 1
