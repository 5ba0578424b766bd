"""Exact match: each answer belongs to its question, whatever the batches."""

import pytest
from conftest import write_jsonl

from etude.errors import DataError
from etude.evaluation import Answer, ExactMatch, ask, read_questions
from etude.generation.text import TextModel


@pytest.fixture
def model(tiny_model, tokenizer):
    return TextModel(tiny_model, tokenizer)


def question(text: str, answer: str, skill: str = "one") -> dict:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return {"skill": skill, "conversations": turns}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_answers_are_those_of_asking_one_by_one(model, tmp_path, batch_size):
    texts = ["the fox?", "a", "Where does the dog live?", "狐狸", "12 + 34?", "she sells"]
    path = write_jsonl(tmp_path / "q.jsonl", (question(text, "x" * number) for number, text in enumerate(texts, 1)))
    questions = read_questions([str(path)])
    found = ask(model, questions, batch_size)
    longest = max(len(model.tokenizer.encode("x" * number)) for number in range(1, len(texts) + 1)) + 16
    for text, answer in zip(texts, found.answers, strict=True):
        (alone,) = model.replies([model.chat_ids(text)], temperature=0, max_new_tokens=longest)
        assert (answer.question, answer.given, answer.ended) == (text, alone.text, alone.finish_reason == "stop")


def test_shares():
    answers = [Answer("a", "?", "x", "x ", True), Answer("a", "?", "x", "y", True), Answer("b", "?", "x", "x", False)]
    found = ExactMatch(answers)
    assert (found.overall, found.ended, found.by_skill) == (2 / 3, 2 / 3, {"a": 0.5, "b": 1.0})


def test_bad_questions_are_named(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [question("a", "b"), {"conversations": []}])
    with pytest.raises(DataError, match=r"q\.jsonl:2"):
        read_questions([str(path)])
    assert len(read_questions([str(path)], max_bad=1)) == 1
