"""The sample world's prose, to pretrain on: the same facts, sums and words as in the conversations, told."""

from etude.corpus.sample.scene import RELATIONS, Scene, Told, combinations_of, fact, tell
from etude.corpus.sample.skills import (
    a_list,
    and_the_other_animal,
    arithmetic,
    ask_about,
    count_aloud,
    recall,
    translate,
    unknown,
    working,
)
from etude.corpus.sample.words import ALL_WORDS, ANIMALS, EN, PLACES, QUALITIES, STRANGERS, THINGS, TREASURES, ZH, Pair


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
