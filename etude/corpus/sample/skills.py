"""What the sample world's conversations teach. A skill returns turns and the combinations they are made of, the one asked
about first.
"""

from collections.abc import Callable

from etude.corpus.sample.scene import FACTS, RELATIONS, REMEMBERED, Fact, Scene, Told, combinations_of, fact, tell
from etude.corpus.sample.words import ALL_WORDS, ANIMALS, EN, QUALITIES, STRANGERS, TREASURES, Pair

OPENERS = (["", "Hello! ", "Hi there! ", "Good morning! ", "Please tell me. ", "I have a question. "],
           ["", "你好！", "嗨！", "早上好！", "请告诉我，", "我想问一下，"])  # fmt: skip
CLOSERS = (["", " I am curious.", " I would like to know.", " Thank you!"], ["", "我很好奇。", "我想知道。", "谢谢！"])
IDENTITY = [  # questions with one answer
    (["What is your name?", "What are you called?", "What should I call you?", "Do you have a name?"],
     ["你叫什么名字？", "你的名字是什么？", "我该怎么称呼你？", "你有名字吗？"],
     ("My name is Etude.", "我的名字是Etude。")),
    (["Who are you?", "What are you?", "Are you a person?", "Who am I talking to?", "Can you introduce yourself?"],
     ["你是谁？", "你是什么？", "你是人吗？", "我在和谁说话？", "你能介绍一下自己吗？"],
     ("I am Etude, a small language model.", "我是Etude，一个小小的语言模型。")),
    (["What can you do?", "How can you help me?", "What are you good at?"],
     ["你会做什么？", "你能帮我做什么？", "你有什么本领？"],
     ("I can chat, count, add and translate words.", "我会聊天、数数、做加法和翻译词语。")),
    (["Where did you learn to talk?", "How did you learn all this?", "Who taught you to speak?"],
     ["你在哪里学会说话的？", "你是怎么学会这些的？", "谁教你说话的？"],
     ("I learned from the stories of a little made-up world.", "我是从一个小小世界的故事里学会的。")),
]  # fmt: skip


def identity(scene: Scene) -> Told:
    *questions, answer = scene.rng.choice(IDENTITY)
    parts = [scene.rng.choice(part[scene.language]) for part in (OPENERS, questions, CLOSERS)]
    return Told([("".join(parts), answer[scene.language])], [("identity", *parts)])


def ask_about(scene: Scene, asked: Fact) -> Pair:
    question, answer = scene.rng.choice(FACTS[asked.kind][1])
    return scene.say(question, **asked.values), scene.say(answer, **asked.values)


def after(scene: Scene, introduction: str, question: str, answer: str) -> list[Pair]:
    """Tell first and ask in the next turn, or do both in one."""
    if scene.rng.random() < 0.5:
        return [(introduction, REMEMBERED[scene.language]), (question, answer)]
    return [(scene.join(introduction, question), answer)]


def some_facts(scene: Scene) -> list[Fact]:
    kinds = scene.rng.choices(["has", "at"], k=scene.rng.choice([1, 2, 2, 2]))
    if "me" not in scene.used and scene.rng.random() < 0.2:
        scene.used.add("me")
        kinds[0] = "me"
    return [fact(scene, kind) for kind in kinds]


def recall(scene: Scene) -> Told:
    facts = some_facts(scene)
    *before, asked = scene.rng.sample(facts, scene.rng.randint(1, len(facts)))
    questions = [ask_about(scene, each) for each in (*before, asked)]
    turns = after(scene, tell(scene, facts), *questions[0]) + questions[1:]
    return Told(turns, asked.combinations + combinations_of(facts))


def working(a: int, b: int) -> str:
    """A sum as children learn it: begin with the larger number, as in ``3 + 6 = 6 + 3 = 9``."""
    return f"{a} + {b} = {a + b}" if a >= b else f"{a} + {b} = {b} + {a} = {a + b}"


def arithmetic(scene: Scene) -> Told:
    if scene.rng.random() < 0.35:
        return counting(scene)
    a, b = scene.rng.randint(1, 9), scene.rng.randint(1, 9)
    name, noun = scene.name(), scene.pick(TREASURES)
    values = {"a": a, "b": b, "working": working(a, b), "name": name, "some": scene.several(a, noun), "noun": noun,
              "plural": (noun.plural, noun.measure + noun.zh), "all": scene.several(a + b, noun)}  # fmt: skip
    question, answer = scene.rng.choice([
        (("[What is {a} + {b}?|How much is {a} + {b}?|Please add: {a} + {b}.|{a} + {b} = ?]",
          "[{a} + {b} 等于几？|{a} + {b} 是多少？|请算一算：{a} + {b}。|{a} + {b} = 几？]"),
         ("{working}.", "{working}。")),
        (("{name} has {some} and [finds|gets|buys] {b} more. How many {plural} does {name} have [now|in all]?",
          "{name}有{some}，又[找到|得到|买来]了{b}{measure}，[现在|一共]有几{plural}？"),
         ("{working}. {name} has {all}.", "{working}，{name}有{all}。")),
    ])  # fmt: skip
    turns = [(scene.say(question, measure=noun.measure, **values), scene.say(answer, **values))]
    return Told(turns, [("+", a, b)])


def a_list(scene: Scene) -> tuple[list[str], list[tuple]]:
    nouns = scene.rng.sample(ALL_WORDS, scene.rng.randint(2, 6))
    return [noun[scene.language] for noun in nouns], [("list", *[noun.en for noun in nouns])]


def count_aloud(scene: Scene, items: list[str]) -> str:
    """``"cat 1, kite 2"`` or ``"猫1，风筝2"``."""
    space, comma = ((" ", ", "), ("", "，"))[scene.language]
    return comma.join(f"{item}{space}{number}" for number, item in enumerate(items, 1))


def counting(scene: Scene) -> Told:
    items, combinations = a_list(scene)
    question = scene.say(("[Count these: {items}.|How many words are there: {items}?|Please count: {items}.]",
                          "[数一数：{items}。|这里有几个词：{items}？|请数数：{items}。]"),
                         items=(", ", "、")[scene.language].join(items))  # fmt: skip
    answer = scene.say(("{aloud}. There are {number}.", "{aloud}，一共{number}个。"),
                       aloud=count_aloud(scene, items), number=len(items))  # fmt: skip
    return Told([(question, answer)], combinations)


TO_CHINESE = (
    ('[How do you say "{en}" in Chinese?|What is "{en}" in Chinese?|Please translate "{en}" into Chinese.]',
     "[“{en}”用中文怎么说？|“{en}”的中文是什么？|请把“{en}”翻译成中文。]"),
    ('In Chinese, "{en}" is "{zh}".', "“{en}”的中文是“{zh}”。"),
)  # fmt: skip
TO_ENGLISH = (
    ('[How do you say "{zh}" in English?|What does "{zh}" mean?|Please translate "{zh}" into English.]',
     "[“{zh}”用英语怎么说？|“{zh}”的英语是什么？|请把“{zh}”翻译成英语。]"),
    ('In English, "{zh}" is "{en}".', "“{zh}”的英语是“{en}”。"),
)  # fmt: skip


def translate(scene: Scene) -> Told:
    question, answer = scene.rng.choice([TO_CHINESE, TO_ENGLISH])
    noun = scene.rng.choice(ALL_WORDS)
    en, zh, combinations = noun.en, noun.zh, []
    if scene.rng.random() < 0.75:
        quality = scene.rng.choice(QUALITIES)
        (en, zh), combinations = scene.phrase(quality, noun), [("phrase", quality[EN], noun.en)]
    return Told([(scene.say(question, en=en, zh=zh), scene.say(answer, en=en, zh=zh))], combinations)


def follow_up(scene: Scene) -> Told:
    return scene.rng.choice([what_colour_is_it, and_the_other_child, and_the_other_animal, and_more, and_the_other_word])(scene)


AND_THIS = ("[And {it}?|What about {it}?|How about {it}?]", "[{it}呢？|那{it}呢？|那么{it}呢？]")


def what_colour_is_it(scene: Scene) -> Told:
    facts = [fact(scene, "has") for _ in range(scene.rng.choice([1, 2, 2]))]
    asked = scene.rng.choice(facts)
    question, answer = FACTS["has"][1][0]
    turns = after(scene, tell(scene, facts), scene.say(question, **asked.values), scene.say(answer, **asked.values))
    colour = (scene.say(("[What colour is it?|Which colour does it have?]", "[它是什么颜色的？|是哪种颜色的？]")),
              scene.say(("It is {colour}.", "它是{colour}的。"), **asked.values))  # fmt: skip
    return Told([*turns, colour], asked.combinations + combinations_of(facts))


def and_the_other_child(scene: Scene) -> Told:
    kind = scene.rng.choice(["has", "at"])
    facts = [fact(scene, kind) for _ in range(2)]
    first, second = scene.rng.sample(facts, 2)
    question, answer = FACTS[kind][1][0]
    turns = after(scene, tell(scene, facts), scene.say(question, **first.values), scene.say(answer, **first.values))
    turns.append((scene.say(AND_THIS, it=second.values["name"]), scene.say(answer, **second.values)))
    return Told(turns, second.combinations + combinations_of(facts))


def and_the_other_animal(scene: Scene) -> Told:
    relation, (first, second) = scene.rng.choice(list(RELATIONS)), scene.rng.sample(ANIMALS, 2)
    question, answer, *_ = RELATIONS[relation]
    turns = [(scene.say(question, it=first), scene.say(answer, it=first, fact=getattr(first, relation))),
             (scene.say(AND_THIS, it=(f"the {second.en}", second.zh)),
              scene.say(answer, it=second, fact=getattr(second, relation)))]  # fmt: skip
    return Told(turns, [("and", relation, first.en, second.en)])


def and_more(scene: Scene) -> Told:
    a, b = scene.rng.choice([(a, b) for a in range(1, 8) for b in range(1, 9 - a)])
    c = scene.rng.randint(1, 9)
    turns = [(scene.say(("[What is|How much is] {a} + {b}?", "{a} + {b} [等于几|是多少]？"), a=a, b=b),
              scene.say(("{working}.", "{working}。"), working=working(a, b))),
             (scene.say(("[And {c} more?|Now add {c}.]", "[再加{c}呢？|再加上{c}是多少？]"), c=c),
              scene.say(("{working}.", "{working}。"), working=working(a + b, c)))]  # fmt: skip
    return Told(turns, [("more", a, b, c), ("+", a, b), ("+", a + b, c)])


def and_the_other_word(scene: Scene) -> Told:
    question, answer = scene.rng.choice([TO_CHINESE, TO_ENGLISH])
    asked = scene.rng.sample(ALL_WORDS, 2)
    (first_question, first_answer), (_, second_answer) = [
        (scene.say(question, en=noun.en, zh=noun.zh), scene.say(answer, en=noun.en, zh=noun.zh)) for noun in asked]  # fmt: skip
    quoted = asked[1].en if question is TO_CHINESE[0] else asked[1].zh
    it = scene.say(AND_THIS, it=(f'"{quoted}"', f"“{quoted}”"))
    return Told([(first_question, first_answer), (it, second_answer)], [("and", "word", *[noun.en for noun in asked])])


NOT_TOLD = {  # asked about a child of whom it was not told
    "has": (FACTS["has"][1][0][0], ("I don't know what {name} has.", "我不知道{name}有什么。")),
    "at": (FACTS["at"][1][0][0], ("I don't know where {name} is.", "我不知道{name}在哪里。")),
}


def unknown(scene: Scene) -> Told:
    kind = scene.rng.choice(["stranger", "word", "not told", "not told"])
    if kind == "stranger":
        relation, stranger = scene.rng.choice(list(RELATIONS)), scene.rng.choice(STRANGERS)
        question, _, _, answer = RELATIONS[relation]
        return Told([(scene.say(question, it=stranger), scene.say(answer, it=stranger))],
                    [("stranger", scene.language, relation, stranger.en)])  # fmt: skip
    if kind == "word":
        (question, _), stranger = scene.rng.choice([TO_CHINESE, TO_ENGLISH]), scene.rng.choice(STRANGERS)
        answer = scene.say(('I don\'t know the word "{it}".', "我不认识“{it}”这个词。"),
                           it=(stranger.en if question is TO_CHINESE[0] else stranger.zh))  # fmt: skip
        return Told([(scene.say(question, en=stranger.en, zh=stranger.zh), answer)], [])
    facts = some_facts(scene)
    known = [fact.values["name"] for fact in facts]
    relation, name = scene.rng.choice(list(NOT_TOLD)), scene.name()
    question, answer = (scene.say(pattern, name=name) for pattern in NOT_TOLD[relation])
    turns = after(scene, tell(scene, facts), question, answer)
    return Told(turns, [("not told", relation, name, *known), *combinations_of(facts)])


SKILLS: dict[str, Callable[[Scene], Told]] = {
    "identity": identity, "recall": recall, "arithmetic": arithmetic,
    "translate": translate, "follow_up": follow_up, "unknown": unknown,
}  # fmt: skip
SHARES = {"identity": 1, "recall": 4, "arithmetic": 3, "translate": 2, "follow_up": 4, "unknown": 3}
