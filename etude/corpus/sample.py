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

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from etude.corpus.jsonl import write_records

EN, ZH = 0, 1  # a pair of texts is always (English, Chinese), and a language is an index into it
Pair = tuple[str, str]
HELD_OUT_PERCENT = 10
DOCUMENTS, TALKS = 30_000, 36_000  # about 1.2 and 3.6 million tokens: one pass of each is a good first model
UNSEEN_SUMS = {(2, 7), (3, 5), (4, 9), (6, 8)}  # by hand, so that no number misses more than one; 7 + 2 and so on are seen


class Word(NamedTuple):
    """A word in both languages, with what is needed to count it; an animal has its home, food and talent besides."""

    en: str
    zh: str
    measure: str = "个"
    plural: str = ""
    home: Pair = ("", "")
    food: Pair = ("", "")
    can: Pair = ("", "")


def words(table: str) -> list[Word]:
    """One word a line; the fields after the plural, two by two, are pairs."""
    rows = [[field.strip() for field in line.split("|")] for line in table.strip().splitlines()]
    return [Word(*row[:4], *zip(row[4::2], row[5::2], strict=True)) for row in rows]


ANIMALS = words("""
    cat | 猫 | 只 | cats | in the old house | 老房子里 | fish | 鱼 | climb | 爬树
    dog | 狗 | 只 | dogs | on the farm | 农场里 | bones | 骨头 | guard the door | 看门
    rabbit | 兔子 | 只 | rabbits | on the meadow | 草地上 | carrots | 胡萝卜 | hop | 蹦蹦跳跳
    fox | 狐狸 | 只 | foxes | in the forest | 森林里 | berries | 浆果 | hide | 捉迷藏
    duck | 鸭子 | 只 | ducks | on the lake | 湖上 | snails | 田螺 | swim | 游泳
    horse | 马 | 匹 | horses | in the stable | 马棚里 | hay | 干草 | run fast | 跑得很快
    frog | 青蛙 | 只 | frogs | in the pond | 池塘里 | insects | 虫子 | jump | 跳得很高
    bird | 小鸟 | 只 | birds | in the tree | 树上 | seeds | 种子 | sing | 唱歌
    mouse | 老鼠 | 只 | mice | behind the wall | 墙洞里 | cheese | 奶酪 | dig | 打洞
    sheep | 羊 | 只 | sheep | on the hill | 山坡上 | grass | 青草 | make wool | 长羊毛
    panda | 熊猫 | 只 | pandas | in the bamboo grove | 竹林里 | bamboo | 竹子 | roll | 打滚
    monkey | 猴子 | 只 | monkeys | in the mountains | 大山里 | bananas | 香蕉 | swing | 荡秋千
    turtle | 乌龟 | 只 | turtles | by the sea | 海边 | leaves | 菜叶 | swim | 游泳
    squirrel | 松鼠 | 只 | squirrels | in the pine wood | 松林里 | nuts | 坚果 | climb | 爬树
    bee | 蜜蜂 | 只 | bees | in the hive | 蜂巢里 | nectar | 花蜜 | dance | 跳舞
    elephant | 大象 | 头 | elephants | on the grassland | 草原上 | sugar cane | 甘蔗 | carry wood | 搬木头
""")
THINGS = words("""
    ball | 球 | 个 | balls
    kite | 风筝 | 只 | kites
    book | 书 | 本 | books
    hat | 帽子 | 顶 | hats
    cup | 杯子 | 个 | cups
    lamp | 灯 | 盏 | lamps
    drum | 鼓 | 面 | drums
    bell | 铃铛 | 个 | bells
    boat | 船 | 条 | boats
    box | 盒子 | 个 | boxes
    key | 钥匙 | 把 | keys
    umbrella | 雨伞 | 把 | umbrellas
    chair | 椅子 | 把 | chairs
    clock | 钟 | 个 | clocks
    flag | 旗子 | 面 | flags
    scarf | 围巾 | 条 | scarves
    doll | 娃娃 | 个 | dolls
    bike | 自行车 | 辆 | bikes
""")
TREASURES = words("""
    apple | 苹果 | 个 | apples
    pear | 梨 | 个 | pears
    peach | 桃子 | 个 | peaches
    egg | 鸡蛋 | 个 | eggs
    flower | 花 | 朵 | flowers
    stone | 石头 | 块 | stones
    shell | 贝壳 | 个 | shells
    star | 星星 | 颗 | stars
    candle | 蜡烛 | 根 | candles
    cookie | 饼干 | 块 | cookies
""")
STRANGERS = words("""
    dragon | 龙 | 条 | dragons
    unicorn | 独角兽 | 只 | unicorns
    robot | 机器人 | 个 | robots
    pirate | 海盗 | 个 | pirates
    giant | 巨人 | 个 | giants
    whale | 鲸鱼 | 条 | whales
    camel | 骆驼 | 头 | camels
    penguin | 企鹅 | 只 | penguins
    tiger | 老虎 | 只 | tigers
    wizard | 巫师 | 个 | wizards
    dinosaur | 恐龙 | 只 | dinosaurs
    astronaut | 宇航员 | 个 | astronauts
    lion | 狮子 | 头 | lions
    mermaid | 美人鱼 | 条 | mermaids
    ghost | 幽灵 | 个 | ghosts
    kangaroo | 袋鼠 | 只 | kangaroos
    snowman | 雪人 | 个 | snowmen
    crocodile | 鳄鱼 | 条 | crocodiles
    queen | 女王 | 个 | queens
    shark | 鲨鱼 | 条 | sharks
    witch | 女巫 | 个 | witches
    zebra | 斑马 | 匹 | zebras
""")  # the world has heard of them, and knows nothing about them
COLOURS = [("red", "红色"), ("blue", "蓝色"), ("green", "绿色"), ("yellow", "黄色"), ("white", "白色"), ("black", "黑色"),
           ("purple", "紫色"), ("pink", "粉色")]  # fmt: skip
QUALITIES = [*COLOURS, ("big", "大大"), ("small", "小小"), ("old", "旧旧"), ("new", "崭新")]
NAMES = [language.split() for language in (
        """Anna Tom Lucy Ben Mia Jack Lily Sam Nora Leo Ella Max Rose Finn Ruby Hugo Emma Noah Ivy Luke Alice Oscar Clara
         Felix Daisy Henry Grace Peter Molly Simon Jane Oliver Sophie Adam Eva Paul Lena David Julia Martin Kate George
         Maya Robin Sara Victor Zoe Edward Tina Walter Betty Frank Holly Arthur Nina Toby Wendy Philip Carol Dennis Amy
         Carl Dora Eric Fiona Gary Helen Ian Judy Kevin Linda Mark Nancy Otto Penny Ralph Susan Tim Vera Will""",
         """小明 小美 小刚 小雨 小云 小月 小杰 小芳 小华 小林 小军 小丽 小强 小梅 小兰 小龙 小燕 小峰 小松 小青 小玉 小伟 小雪
         小霞 小文 小武 小宁 小安 小春 小秋 乐乐 豆豆 圆圆 贝贝 明明 亮亮 丽丽 冬冬 方方 佳佳 强强 晶晶 欢欢 阿宝 阿福 阿牛 阿珍
         阿强 阿秀 阿康 阿莲 阿庆 阿东 阿兰 阿文 阿香 大壮 大勇 大山 大川 志远 志明 思思 思远 若水 若兰 子轩 子涵 雅琴 雅文 文静
         文博 春生 春燕 海涛 海燕 建国 美玲 玉兰 秋菊""")]  # fmt: skip
PLACES = [("in the garden", "花园里"), ("in the kitchen", "厨房里"), ("at school", "学校里"), ("at the market", "市场上"),
          ("by the river", "河边"), ("on the bridge", "桥上"), ("in the library", "图书馆里"), ("on the beach", "沙滩上"),
          ("in the park", "公园里"), ("under the big tree", "大树下"), ("at the station", "车站里"),
          ("on the tower", "塔楼上"), ("at the bakery", "面包店里"), ("in the museum", "博物馆里"),
          ("on the train", "火车上"), ("at the theatre", "剧院里"), ("by the fountain", "喷泉旁"),
          ("in the attic", "阁楼上")]  # fmt: skip
ALL_WORDS = ANIMALS + THINGS + TREASURES


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


# ---- the six skills: each returns turns and the combinations they are made of, the one asked about first --------------

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


# ---- prose to pretrain on --------------------------------------------------------------------------------------------


def prose(scene: Scene, patterns: list[Pair], combinations: list[tuple], **values) -> Told:
    return Told([("", scene.say(*patterns, **values))], combinations)


WHEN = ("[One morning|One day|After breakfast|On a sunny afternoon|Late in the evening|When the rain had stopped|Last spring]",
        "[一天早上|有一天|吃过早饭|一个晴朗的下午|傍晚时分|雨停了以后|去年春天]")  # fmt: skip


def about_animals(scene: Scene) -> Told:
    sentences = []
    for animal in scene.rng.sample(ANIMALS, scene.rng.choice([1, 1, 2, 3])):
        for relation in scene.rng.sample(list(RELATIONS), scene.rng.choice([2, 3])):
            sentences.append(scene.say(RELATIONS[relation][2], it=animal, fact=getattr(animal, relation)))
        if scene.rng.random() < 0.4:
            sentences.append(scene.say(("[Have you ever seen one?|What a fine animal!|Children love it.]",
                                        "[你见过它吗？|多可爱的动物呀！|孩子们都喜欢它。]")))  # fmt: skip
    return Told([("", scene.join(*sentences))], [])


def finding(scene: Scene) -> Told:
    mine, yours, place = fact(scene, "has"), fact(scene, "has"), scene.rng.choice(PLACES)
    values = {"place": place, **mine.values, **{f"other_{key}": value for key, value in yours.values.items()}}
    patterns = [
        (WHEN[EN] + ", {name} was {place} and [found|saw] {one}.", WHEN[ZH] + "，{name}在{place}[发现|看见]了{one}。"),
        (('["What a lovely {thing}!" said {name}.|Nobody knew whose {thing} it was, so {name} kept it.'
         "|{name} took the {thing} home.]"),
         "[“多漂亮的{thing}呀！”{name}说。|没有人知道这是谁的{thing}，{name}就收下了。|{name}把{thing}带回了家。]"),
        ("[Then {other_name} came with {other_one}.|{other_name} was there too, and had {other_one}.]",
         "[这时{other_name}来了，带着{other_one}。|{other_name}也在那里，{other_name}有{other_one}。]"),
        (('["Who has the {other_thing}?" asked Grandmother. "{other_name} has the {other_thing}, and {name} has the {thing}."'
         '|"What colour is your {other_thing}?" "It is {other_colour}. And yours?" "Mine is {colour}."'
         "|They played until it was dark.|So {name} has {one}, and {other_name} has {other_one}.]"),
         ("[奶奶问：“谁有{other_thing}？”“{other_name}有{other_thing}，{name}有{thing}。”"
         "|“你的{other_thing}是什么颜色的？”“是{other_colour}的。你的呢？”“我的{thing}是{colour}的。”"
         "|他们一直玩到天黑。|就这样，{name}有{one}，{other_name}有{other_one}。]")),
    ]  # fmt: skip
    were_there = [("at", child.values["name"], place[EN]) for child in (mine, yours)]
    return prose(scene, patterns, [*combinations_of([mine, yours]), *were_there], **values)


def looking(scene: Scene) -> Told:
    """Someone looks for a friend: where each child is, and that one may not know."""
    seeker, friends, missing = scene.name(), [fact(scene, "at") for _ in range(scene.rng.choice([1, 2]))], scene.name()
    found = (('["Where is {name}?" "{name} is {place}."|{name} was not at home: {name} was {place}.'
             "|{name} had gone out and was {place}.]"),
             "[“{name}在哪里？”“{name}在{place}。”|{name}不在家，{name}在{place}。|{name}出门了，人在{place}。]")  # fmt: skip
    not_found = (('["And {name}?" "I don\'t know where {name} is."|Where was {name}? Nobody had told {seeker}.'
                 "|So they played together.]"),
                 "[“那{name}呢？”“我不知道{name}在哪里。”|{name}在哪里呢？没有人告诉{seeker}。|于是大家一起玩。]")  # fmt: skip
    text = [scene.say((WHEN[EN] + ", {seeker} looked for a friend.", WHEN[ZH] + "，{seeker}想找朋友玩。"), seeker=seeker),
            *[scene.say(found, **friend.values) for friend in friends],
            scene.say(not_found, name=missing, seeker=seeker)]  # fmt: skip
    known = [friend.values["name"] for friend in friends]
    return Told([("", scene.join(*text))], [*combinations_of(friends), ("not told", "at", missing, *known)])


def remembering(scene: Scene) -> Told:
    """Facts, and then all of them once more in another order: what was told can be told again."""
    facts = [fact(scene, kind) for kind in scene.rng.choices(["has", "at"], k=scene.rng.choice([2, 3, 3, 4]))]
    again = [scene.join(*ask_about(scene, each)) for each in scene.rng.sample(facts, len(facts))]
    bridge = scene.say(("[Do you remember it all?|Now close your eyes.|Now tell it to me again.]",
                        "[都记住了吗？|现在闭上眼睛想一想。|再说一遍给我听。]"))  # fmt: skip
    return Told([("", scene.join(tell(scene, facts), bridge, *again))], combinations_of(facts))


def visiting(scene: Scene) -> Told:
    animal, (quality, noun) = scene.rng.choice(ANIMALS), (scene.rng.choice(QUALITIES), scene.rng.choice(THINGS))
    patterns = [
        (WHEN[EN] + ", {name} [went to visit|went to see] the {it}.", WHEN[ZH] + "，{name}去[看望|看]{it}。"),
        ("[The {it} lives {home}.|It was not far: the {it} lives {home}.]", "[{it}住在{home}。|路不远，{it}住在{home}。]"),
        (('[{name} brought {food}, because that is what the {it} eats.'
         '|"Have some {food}," said {name}. The {it} eats {food}.]'),
         "[{name}带来了{food}，因为{it}吃{food}。|“请吃{food}吧。”{name}说。{it}吃{food}。]"),
        (('[The {it} can {can}, and {name} laughed and laughed.|"Look, I can {can}!" said the {it}.'
         "|On the way home {name} saw {one}.]"),
         "[{it}会{can}，{name}笑个不停。|“看，我会{can}！”{it}说。|回家的路上，{name}看见了{one}。]"),
    ]  # fmt: skip
    return prose(scene, patterns, [("phrase", quality[EN], noun.en)], name=scene.name(), it=animal, home=animal.home,
                 food=animal.food, can=animal.can, one=scene.one(quality, noun))  # fmt: skip


def counting_aloud(scene: Scene) -> Told:
    items, combinations = a_list(scene)
    patterns = [
        (
            "[{name} counted the words in the book|{name} learned to count|Let us count with {name}]: {aloud}.",
            "[{name}数着书里的词|{name}在学数数|我们和{name}一起数]：{aloud}，",
        ),
        ("There are {number}.", "一共{number}个。"),
    ]
    return prose(scene, patterns, combinations, name=scene.name(), aloud=count_aloud(scene, items), number=len(items))


def adding(scene: Scene) -> Told:
    text, combinations = [], []
    for _ in range(scene.rng.choice([1, 2, 3])):
        a, b = scene.rng.randint(1, 9), scene.rng.randint(1, 9)
        noun = scene.rng.choice(TREASURES)
        text.append(scene.say(
            (("[{name} has {some} and finds {b} more: {working}. {name} has {all}.|{working}."
             "|{some} and {others} make {all}: {working}.]"),
             "[{name}有{some}，又找到了{b}{measure}：{working}，{name}有{all}。|{working}。|{some}加上{others}是{all}：{working}。]"),
            name=scene.name(), b=b, working=working(a, b), some=scene.several(a, noun), others=scene.several(b, noun),
            all=scene.several(a + b, noun), measure=noun.measure))  # fmt: skip
        combinations.append(("+", a, b))
    return Told([("", scene.join(*text))], combinations)


def dictionary(scene: Scene) -> Told:
    text, combinations = [], []
    for noun in scene.rng.sample(ALL_WORDS, scene.rng.choice([2, 3, 4])):
        en, zh = noun.en, noun.zh
        if scene.rng.random() < 0.6:
            quality = scene.rng.choice(QUALITIES)
            (en, zh), combinations = scene.phrase(quality, noun), [*combinations, ("phrase", quality[EN], noun.en)]
        text.append(scene.say(
            (('[In Chinese, "{en}" is "{zh}".|In English, "{zh}" is "{en}".|"{zh}" means "{en}".'
             '|Chinese children say "{zh}" for "{en}".]'),
             ("[“{en}”的中文是“{zh}”。|“{zh}”的英语是“{en}”。|“{zh}”用英语说就是“{en}”。"
             "|英国孩子把“{zh}”叫作“{en}”。]")), en=en, zh=zh))  # fmt: skip
    return Told([("", scene.join(*text))], combinations)


def wondering(scene: Scene) -> Told:
    stranger, relation = scene.rng.choice(STRANGERS), scene.rng.choice(list(RELATIONS))
    answer = scene.say(RELATIONS[relation][3], it=stranger)
    question = scene.say(RELATIONS[relation][0], it=stranger)
    text = scene.say((WHEN[EN] + ", {name} asked: \"{question}\" \"{answer}\" said Grandmother. \"It is not of our world.\"",
                      WHEN[ZH] + "，{name}问：“{question}”奶奶说：“{answer}我们的世界里没有它。”"),
                     name=scene.name(), question=question, answer=answer)  # fmt: skip
    return Told([("", text)], [("stranger", scene.language, relation, stranger.en)])


def lesson(scene: Scene) -> Told:
    """A teacher asks and a child answers: the questions of the conversations, met in a story first."""
    turns, combinations = scene.rng.choice([arithmetic, translate, recall, unknown, and_the_other_animal])(scene)
    name = scene.name()
    text = [scene.say(("[The teacher asks|Grandmother asks]: {question} {name} answers: {answer}",
                       "[老师问|奶奶问]：{question}{name}答：{answer}"), question=question, name=name, answer=answer)
            for question, answer in turns]  # fmt: skip
    return Told([("", scene.join(*text))], combinations)


def about_etude(scene: Scene) -> Told:
    sentences = [
        ("[Etude is a small language model.|There is a small language model, and its name is Etude.]",
         "[Etude是一个小小的语言模型。|有一个小小的语言模型，它的名字是Etude。]"),
        ("[It learned from the stories of a little made-up world.|The stories of a little made-up world taught it to speak.]",
         "[它是从一个小小世界的故事里学会的。|一个小小世界的故事教会了它说话。]"),
        ("[Etude can chat, count, add and translate words.|It likes to chat, count, add and translate words.]",
         "[Etude会聊天、数数、做加法和翻译词语。|它喜欢聊天、数数、做加法和翻译词语。]"),
        ("[When it does not know something, it says so.|What it was not told, it does not know.]",
         "[不知道的事，它就说不知道。|没有人告诉过它的事，它不知道。]"),
        (("[The user asks, and the assistant answers: that assistant is Etude."
         "|A system of numbers, a user, an assistant: so one talks with Etude.]"),
         "[user提问，assistant回答，这个assistant就是Etude。|你是user，Etude是assistant，大家一起聊天。]"),
    ]  # fmt: skip
    return prose(scene, scene.rng.sample(sentences, scene.rng.choice([2, 3, 4])), [])


PROSE = {about_animals: 3, finding: 4, looking: 3, remembering: 6, visiting: 3, counting_aloud: 3, adding: 4,
         dictionary: 4, lesson: 5, wondering: 2, about_etude: 1}  # fmt: skip


# ---- records ---------------------------------------------------------------------------------------------------------


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
