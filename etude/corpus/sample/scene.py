"""A stretch of talk in the sample world: its language, its randomness, the facts that are told in it, and what is held out."""

import hashlib
import random
import re
from typing import NamedTuple

from etude.corpus.sample.words import COLOURS, EN, NAMES, PLACES, THINGS, ZH, Pair, Word

HELD_OUT_PERCENT = 10
UNSEEN_SUMS = {(2, 7), (3, 5), (4, 9), (6, 8)}  # by hand, so that no number misses more than one; 7 + 2 and so on are seen


def is_held_out(combination: tuple) -> bool:
    """Whether a combination is kept for the held-out questions: a property of the combination alone, not of a seed."""
    if combination[0] == "+":
        return combination[1:] in UNSEEN_SUMS
    digest = hashlib.sha256("/".join(map(str, combination)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


class Told(NamedTuple):
    """A few turns or a piece of prose, and the combinations it is made of; the first is the one asked about."""

    turns: list[Pair]  # (user, assistant); prose is one turn without a user
    combinations: list[tuple]


class Scene:
    """One stretch of talk: its language, its randomness, and the words that were already used in it."""

    def __init__(self, rng: random.Random, language: int, used: set | None = None):
        self.rng, self.language = rng, language
        self.used = set() if used is None else used

    def pick(self, choices: list):
        """Something that was not yet used here, so that a question has one answer."""
        chosen = self.rng.choice([choice for choice in choices if choice not in self.used])
        self.used.add(chosen)
        return chosen

    def name(self) -> str:
        return self.pick(NAMES[self.language])

    def say(self, *patterns: Pair, **values) -> str:
        """Fill patterns such as ``"[Hello|Hi], {name}!"``; pairs among the values speak the scene's language."""
        text = self.join(*[pattern[self.language] for pattern in patterns])
        while "[" in text:
            text = re.sub(r"\[([^\[\]]*)\]", lambda match: self.rng.choice(match[1].split("|")), text)
        spoken = {key: value[self.language] if isinstance(value, tuple) else value for key, value in values.items()}
        return text.format(**spoken)

    def join(self, *sentences: str) -> str:
        return ("" if self.language == ZH else " ").join(sentences)

    def phrase(self, quality: Pair, noun: Word) -> Pair:
        return f"{quality[EN]} {noun.en}", f"{quality[ZH]}的{noun.zh}"

    def one(self, quality: Pair, noun: Word) -> Pair:
        en, zh = self.phrase(quality, noun)
        return f"{'an' if en[0] in 'aeiou' else 'a'} {en}", f"一{noun.measure}{zh}"

    def several(self, number: int, noun: Word) -> Pair:
        return f"{number} {noun.en if number == 1 else noun.plural}", f"{number}{noun.measure}{noun.zh}"


# ---- facts that hold everywhere, and facts that are told -------------------------------------------------------------

RELATIONS = {  # asked, answered, told in prose, and answered about a stranger
    "home": (
        ("[Where does the {it} live?|Where is the home of the {it}?|Do you know where the {it} lives?]",
         "[{it}住在哪里？|{it}的家在哪里？|你知道{it}住在哪里吗？]"),
        ("The {it} lives {fact}.", "{it}住在{fact}。"),
        ("[The {it} lives {fact}.|The home of the {it} is {fact}.|If you look {fact}, you may meet the {it}.]",
         "[{it}住在{fact}。|{it}的家在{fact}。|去{fact}看看，你会遇见{it}。]"),
        ("I don't know where the {it} lives.", "我不知道{it}住在哪里。"),
    ),
    "food": (
        ("[What does the {it} eat?|What food does the {it} like?|Can you tell me what the {it} eats?]",
         "[{it}吃什么？|{it}喜欢吃什么？|你能告诉我{it}吃什么吗？]"),
        ("The {it} eats {fact}.", "{it}吃{fact}。"),
        ("[The {it} eats {fact}.|The {it} likes {fact} best of all.|When the {it} is hungry, it looks for {fact}.]",
         "[{it}吃{fact}。|{it}最爱吃{fact}。|{it}饿了，就去找{fact}吃。]"),
        ("I don't know what the {it} eats.", "我不知道{it}吃什么。"),
    ),
    "can": (
        ("[What can the {it} do?|What is the {it} good at?|Do you know what the {it} can do?]",
         "[{it}会做什么？|{it}有什么本领？|你知道{it}会做什么吗？]"),
        ("The {it} can {fact}.", "{it}会{fact}。"),
        ("[The {it} can {fact}.|Look, the {it} can {fact}!|Everyone knows that the {it} can {fact}.]",
         "[{it}会{fact}。|快看，{it}会{fact}！|大家都知道{it}会{fact}。]"),
        ("I don't know what the {it} can do.", "我不知道{it}会做什么。"),
    ),
}  # fmt: skip
SYSTEM = ("You are Etude, a small language model.", "你是Etude，一个小小的语言模型。")
REMEMBERED = ("Thank you, I will remember that.", "谢谢，我记住了。")
FACTS = {  # how it is told, and what can be asked about it: (question, answer)
    "has": (
        ("[{name} has {one}.|{name} has got {one}.]", "[{name}有{one}。|{name}得到了{one}。]"),
        [(("[What does {name} have?|What has {name} got?|Do you remember what {name} has?]",
           "[{name}有什么？|{name}有什么东西？|你还记得{name}有什么吗？]"),
          ("{name} has {one}.", "{name}有{one}。")),
         (("[What colour is {name}'s {thing}?|Which colour does {name}'s {thing} have?]",
           "[{name}的{thing}是什么颜色的？|{name}的{thing}是哪种颜色的？]"),
          ("{name}'s {thing} is {colour}.", "{name}的{thing}是{colour}的。")),
         (("[Who has the {thing}?|Whose is the {thing}?]", "[谁有{thing}？|{thing}是谁的？]"),
          ("{name} has the {thing}.", "{name}有{thing}。"))],
    ),
    "at": (
        ("[{name} is {place}.|{name} is {place} now.]", "[{name}在{place}。|{name}现在在{place}。]"),
        [(("[Where is {name}?|Where can I find {name}?|Do you remember where {name} is?]",
           "[{name}在哪里？|在哪里能找到{name}？|你还记得{name}在哪里吗？]"),
          ("{name} is {place}.", "{name}在{place}。"))],
    ),
    "me": (
        ("[My name is|I am] {name} and I have {one}.", "[我叫|我是]{name}，我有{one}。"),
        [(("[What is my name?|Do you remember my name?]", "[我叫什么名字？|你还记得我的名字吗？]"),
          ("Your name is {name}.", "你叫{name}。")),
         (("[What do I have?|Do you remember what I have?]", "[我有什么？|你还记得我有什么吗？]"),
          ("You have {one}.", "你有{one}。"))],
    ),
}  # fmt: skip


class Fact(NamedTuple):
    """Something told about one child, ``kind`` being one of FACTS."""

    kind: str
    values: dict
    combinations: list[tuple]


def fact(scene: Scene, kind: str) -> Fact:
    name = scene.name()
    if kind == "at":
        place = scene.rng.choice(PLACES)
        return Fact(kind, {"name": name, "place": place}, [("at", name, place[EN])])
    colour, thing = scene.rng.choice(COLOURS), scene.pick(THINGS)
    values = {"name": name, "colour": colour, "thing": thing[:2], "one": scene.one(colour, thing)}
    return Fact(kind, values, [("has", name, colour[EN], thing.en), ("phrase", colour[EN], thing.en)])


def tell(scene: Scene, facts: list[Fact]) -> str:
    return scene.join(*[scene.say(FACTS[fact.kind][0], **fact.values) for fact in facts])


def combinations_of(facts: list[Fact]) -> list[tuple]:
    return [combination for fact in facts for combination in fact.combinations]
