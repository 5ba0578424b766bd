"""The words of the sample world, in both languages."""

from typing import NamedTuple

EN, ZH = 0, 1  # a pair of texts is always (English, Chinese), and a language is an index into it
Pair = tuple[str, str]


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
