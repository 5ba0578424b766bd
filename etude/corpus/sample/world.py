"""The built-in sample world: a few hundred words of Chinese and English in which every stage can show that it learns.

Some children, animals and things, in two languages: small enough that a tiny model learns it within minutes on a
laptop, rich enough that memorising is not enough. Three kinds of records come out of it:

- documents to pretrain on: stories, facts, counting, sums and translations in prose;
- conversations to fine-tune on, which mix six skills: identity, recall, arithmetic, translate, follow_up, unknown;
- held-out questions of the same skills.

**Held out means an unseen combination of seen parts.** Every sentence reports the combinations it is made of, such as
``("has", "Tom", "red", "kite")`` or ``("+", 3, 5)``. :func:`is_held_out` puts a fixed share of all combinations aside by
their hash, whatever the seed: training text is drawn again until it holds none of them, and a question is held out
exactly when the combination it asks about is one of them while its other combinations are not.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from etude.corpus.jsonl import write_records
from etude.corpus.sample.scene import SYSTEM, Scene, Told, is_held_out
from etude.corpus.sample.skills import SHARES, SKILLS
from etude.corpus.sample.stories import PROSE
from etude.corpus.sample.words import ALL_WORDS, COLOURS, EN, PLACES, QUALITIES, ZH, Pair

DOCUMENTS, TALKS = 30_000, 36_000  # about 1.2 and 3.6 million tokens: one pass of each is a good first model


def seen(make: Callable[[Scene], Told], rng: random.Random, language: int, used: set) -> Told:
    """Draw until nothing is held out: what may be trained on. ``used`` grows by the words that were used."""
    while True:
        scene = Scene(rng, language, set(used))
        told = make(scene)
        if not any(map(is_held_out, told.combinations)):
            used |= scene.used
            return told


def unseen(make: Callable[[Scene], Told], rng: random.Random, language: int) -> Told:
    """Draw until what is asked about is held out, and nothing else is: an unseen combination of seen parts."""
    while True:
        told = make(Scene(rng, language))
        key, *others = told.combinations or [()]
        if key and is_held_out(key) and not any(is_held_out(other) for other in others if other != key):
            return told


def messages(turns: list[Pair]) -> list[dict]:
    return [{"role": role, "content": content} for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)]  # fmt: skip


def pretraining_documents(seed: int = 0, count: int = DOCUMENTS) -> Iterator[dict]:
    """Stories and facts, as ``{"text": ...}``."""
    rng = random.Random(f"documents {seed}")
    for _ in range(count):
        (make,) = rng.choices(list(PROSE), list(PROSE.values()))
        yield {"text": seen(make, rng, rng.choice([EN, ZH]), set()).turns[0][1]}


def conversations(seed: int = 0, count: int = TALKS) -> Iterator[dict]:
    """Conversations of one to four skills, as ``{"conversations": [{"role": ..., "content": ...}, ...]}``."""
    rng = random.Random(f"conversations {seed}")
    for _ in range(count):
        language, used, turns = rng.choice([EN, ZH]), set(), []
        system = [{"role": "system", "content": SYSTEM[language]}] if rng.random() < 0.1 else []
        for skill in rng.choices(list(SHARES), list(SHARES.values()), k=rng.choice([1, 2, 2, 3, 3, 4])):
            turns += seen(SKILLS[skill], rng, language, used).turns
            language = 1 - language if rng.random() < 0.1 else language
        yield {"conversations": system + messages(turns)}


def held_out_questions(seed: int = 0, per_skill: int = 60) -> list[dict]:
    """Questions, half of them in each language, whose last message is the expected answer.

    ``key`` names the combination asked about; :func:`traces` says how it would show itself in a text.
    """
    rng, questions = random.Random(f"questions {seed}"), {}
    for skill, make in SKILLS.items():
        for number in range(per_skill):
            for _ in range(1000):
                told = unseen(make, rng, (EN, ZH)[number % 2])
                if str(told.turns) not in questions:
                    break
            else:
                raise ValueError(f"per_skill ({per_skill}) is more than the world holds: {skill} ends after {number}")
            record = {"skill": skill, "key": list(told.combinations[0]), "conversations": messages(told.turns)}
            questions[str(told.turns)] = record
    return list(questions.values())


def traces(key: tuple) -> list[str]:
    """Strings of which a text would hold one, if it told, asked or answered the combination ``key``."""
    kind, *parts = key
    nouns = {noun.en: noun for noun in ALL_WORDS}
    scene = Scene(random.Random(0), EN)
    match kind, parts:
        case "has", (name, colour, thing):
            en, zh = scene.one((colour, dict(COLOURS)[colour]), nouns[thing])
            return [f"{name} has {en}", f"{name} has got {en}", f"{name}有{zh}", f"{name}得到了{zh}",
                    f"{name}'s {thing} is {colour}", f"{name}的{nouns[thing].zh}是{dict(COLOURS)[colour]}"]  # fmt: skip
        case "at", (name, place):
            return [f"{name} is {place}", f"{name} was {place}", f"{name}在{dict(PLACES)[place]}"]
        case "phrase", (quality, noun):
            return list(scene.phrase((quality, dict(QUALITIES)[quality]), nouns[noun]))
        case "+", (a, b):
            return [f"{a} + {b}"]
        case "list", names:
            en, zh = ", ".join(names), "、".join(nouns[name].zh for name in names)
            return [f": {en}.", f": {en}?", f"：{zh}。", f"：{zh}？"]
        case "identity", (opener, question, closer):
            return [f'"{opener}{question}{closer}"']  # quoted, as a whole message
    return []


def held_out_documents(seed: int = 0, count: int = 300) -> list[dict]:
    """Documents of the same world that :func:`pretraining_documents` does not hold, to measure the loss on."""
    trained_on = {document["text"] for document in pretraining_documents(seed)}
    others = (document for document in pretraining_documents(seed + 1) if document["text"] not in trained_on)
    return list(itertools.islice(others, count))


def write_sample(folder: str | Path, seed: int = 0) -> dict[str, int]:
    """Write the world's four files under ``folder``, each whole or not at all; return how many records each holds."""
    files = {
        "pretrain/pretrain_hq.jsonl": pretraining_documents(seed),
        "sft/sft_mini_512.jsonl": conversations(seed),
        "eval/questions.jsonl": held_out_questions(seed),
        "eval/text.jsonl": held_out_documents(seed),
    }
    return {name: write_records(Path(folder) / name, records) for name, records in files.items()}
