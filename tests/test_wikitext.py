"""Wikitext to prose: each construct with what a careful reader would write down, broken markup, and time."""

import pickle
import random
import time

import pytest

from etude.corpus.wiki.wikitext import Wikitext, WikitextOptions

# (markup, text)
INLINE = [
    ("'''Bread''' is a ''staple'' food.", "Bread is a staple food."),
    ("'''''Bread''''' and butter", "Bread and butter"),
    ("L'''Odyssée'' est un poème.", "L'Odyssée est un poème."),
    ("dell'''arte''' e l'''Iliade''", "dellarte e l'Iliade"),
    ("''''Quoted bold''' end", "'Quoted bold end"),
    ("rock 'n' roll and the '90s", "rock 'n' roll and the '90s"),
    ("[[bread]]", "bread"),
    ("[[Bread|the bread]]", "the bread"),
    ("[[loaf]]s of [[wheat]]en [[flour]]", "loafs of wheaten flour"),
    ("[[Bread#History|its history]]", "its history"),
    ("[[#History]]", "History"),
    ("[[Bread (food)|]]", "Bread"),
    ("[[Help:Bread (food)|]]", "Bread"),
    ("[[Help:Contents|the help]]", "the help"),
    ("[[:Category:Breads]]", "Category:Breads"),
    ("[[:fr:Pain|le pain]]", "le pain"),
    ("[[wikt:bread|bread]] and [[wikt:butter]]", "bread and butter"),
    ("[[Star Trek: Voyager]]", "Star Trek: Voyager"),
    ("[['''Bread''']]", "Bread"),
    ("[[C (programming language)|C]] is [[Computer programming|fun]].", "C is fun."),
    ("[[a|b|c]]", "b|c"),
    ("See [http://example.com the site] now.", "See the site now."),
    ("See [https://example.com/a?b=c&d=e] now.", "See now."),
    ("Write to [mailto:a@example.com Ann].", "Write to Ann."),
    ("[//example.com/ both ''ways'']", "both ways"),
    ("[http://example.com text with [brackets] in it]", "text with [brackets] in it"),
    ("It is at http://example.com/bread today.", "It is at http://example.com/bread today."),
    ("He wrote [sic] and [...] there.", "He wrote [sic] and [...] there."),
    ("Tom &amp; Jerry &ndash; 1940&nbsp;AD", "Tom & Jerry – 1940 AD"),
    ("&#65;&#x42; &eacute; &lt;b&gt;", "AB é <b>"),
    ("AT&T, R&D; &notanentity; x & y", "AT&T, R&D; &notanentity; x & y"),
    ("5 < 6 and 7 > 2", "5 < 6 and 7 > 2"),
    ("Put #include <stdio.h> first.", "Put #include <stdio.h> first."),
    ("soft&shy;ware", "software"),
    ("a<!-- hidden -->b", "ab"),
    ("one\n<!-- a line -->\ntwo", "one\ntwo"),
    ("<!-- [[x]] {{y}} <ref> -->text", "text"),
    ("H<sub>2</sub>O is water", "H2O is water"),
    ("about 10<sup>6</sup> cells", "about 10^6 cells"),
    ("the 19<sup>th</sup> century", "the 19th century"),
    ("an area of 5 km<sup>2</sup>", "an area of 5 km2"),
    ("x<sup>2</sup> + y<sup>2</sup>", "x^2 + y^2"),
    ("10<sup>&minus;3</sup>", "10^−3"),
    ('<small>small</small> <span style="color:red">red</span> <u>under</u>', "small red under"),
    ("one<br>two<br />three", "one\ntwo\nthree"),
    ("<ruby>漢<rp>(</rp><rt>かん</rt><rp>)</rp></ruby>字", "漢(かん)字"),
    ('<div class="a">A block.</div>', "A block."),
    ("__NOTOC__ text __NOEDITSECTION__", "text"),
    ("__БЕЗСЪДЪРЖАНИЕ__ текст", "текст"),
    ("the method __init__ and __FILE__", "the method __init__ and __FILE__"),
    ("Text   with\tmany    spaces", "Text with many spaces"),
    ("Wärme, naïve, Ω, ½, €, “quoted” — all stay…", "Wärme, naïve, Ω, ½, €, “quoted” — all stay…"),
    ("Здравей, свят! 123", "Здравей, свят! 123"),
    ("مرحبا بالعالم، שלום", "مرحبا بالعالم، שלום"),
    ("a|b and x = y", "a|b and x = y"),
    ("f(x) = print() is empty ()", "f(x) = print() is empty ()"),
    ("{curly} and { spaced }", "{curly} and { spaced }"),
]

REFERENCES_AND_TAGS = [
    ("Bread is old.<ref>{{cite book|title=Bread|page=3}}</ref> It is good.", "Bread is old. It is good."),
    ('Bread<ref name="a" /> is old.<ref name=b/>', "Bread is old."),
    ("Bread <ref>a note</ref>, and butter <ref>b</ref>.", "Bread, and butter."),
    ("Old.<ref group=n>[http://a.b c]\n* two\n</ref> New.", "Old. New."),
    ("Old.<REF>x</REF> New.", "Old. New."),
    ("A.<ref>see <b>x</b> < y</ref> B.", "A. B."),
    ("Text.\n<references />", "Text."),
    ("Text.\n<references>\n<ref name=a>x</ref>\n</references>", "Text."),
    ("where <math>x^2 +\n y</math> holds", "where x^2 + y holds"),
    ("<math display=block>\\frac{{a}}{b}</math>", "\\frac{{a}}{b}"),
    ("<chem>H2O</chem>", "H2O"),
    ("<nowiki>[[not a link]] ''nor this''</nowiki>", "[[not a link]] ''nor this''"),
    ("<nowiki>&lt;br&gt; and {{x}}</nowiki>", "<br> and {{x}}"),
    ("a<nowiki />b", "ab"),
    ("<nowiki>*</nowiki> no list", "* no list"),
    ("Call <code>a[i]['x'] = {{}}</code> now.", "Call a[i]['x'] = {{}} now."),
    ("<code><nowiki>{{x}}</nowiki></code>", "{{x}}"),
    ("<pre>\n  keep   this\n* so\n</pre>", "  keep   this\n* so"),
    (
        'So:\n<syntaxhighlight lang="python">\ndef f(x):\n    return [[x]]\n</syntaxhighlight>\nDone.',
        "So:\ndef f(x):\n    return [[x]]\nDone.",
    ),
    ('<source lang="c">int a = 1 &lt; 2;</source>', "int a = 1 &lt; 2;"),
    ("<gallery>\nFile:a.jpg|Words\n</gallery>After.", "After."),
    ("<timeline>\nx\n</timeline>\nAfter.", "After."),
    ("<poem>\nRoses are red\nViolets are blue\n</poem>", "Roses are red\nViolets are blue"),
    ("<blockquote>To be.</blockquote>", "To be."),
    ("<includeonly>hidden</includeonly><noinclude>shown</noinclude>", "shown"),
    ('<span style="display:none">key</span>Value', "Value"),
    ("<ul><li>one</li><li>two</li></ul>", "- one\n- two"),
]

NAMESPACES = [
    ("[[File:a.jpg|thumb|A [[loaf]] of {{nowrap|rye bread}}.]]Text.", "Text."),
    ("[[Image:a.jpg|thumb|See [http://a.b c]]]\nText.", "Text."),
    ("[[Файл:а.jpg|мини|Хляб]]Текст.", "Текст."),
    ("[[Картинка:а.jpg]]Текст.", "Текст."),
    ("[[Datei:a.jpg|mini|Ein [[Brot]]]]Text.", "Text."),
    ("[[Bild:a.jpg]]Text.", "Text."),
    ("[[Fichier:a.jpg|vignette|Du pain]]Texte.", "Texte."),
    ("[[ファイル:a.jpg|thumb|パン]]本文。", "本文。"),
    ("[[画像:a.jpg]]本文。", "本文。"),
    ("[[文件:a.jpg|缩略图|面包]]正文。", "正文。"),
    ("[[檔案:a.jpg]]正文。", "正文。"),
    ("[[Archivo:a.jpg]]Texto.", "Texto."),
    ("Text.\n[[Category:Breads]]\n[[Category:Foods|Bread]]", "Text."),
    ("Текст.\n[[Категория:Храни]]", "Текст."),
    ("Text.[[Kategorie:Brot]]", "Text."),
    ("正文。[[分类:食物]][[分類:食物]]", "正文。"),
    ("本文。[[カテゴリ:パン]]", "本文。"),
    ("Text.\n[[de:Brot]]\n[[zh:面包]]\n[[zh-min-nan:Pháng]]", "Text."),
    ("[[Media:a.ogg|listen]]", "listen"),
    ("[[User:Ann|Ann]]", "Ann"),
    ("[[image:a.jpg|thumb|{|\n| table in a caption\n|}\n]]After.", "After."),
]

BLOCKS = [
    ("== History ==\nIt is old.", "History\nIt is old."),
    ("Intro.\n==History==\n\nIt is old.", "Intro.\n\nHistory\nIt is old."),
    ("==A==\n===B===\nText.", "A\n\nB\nText."),
    ("==Empty==\n==Full==\nText.", "Full\nText."),
    ("==A==\n===Empty===\n==C==\nText.\n==End==", "C\nText."),
    ("== ''The'' [[Past|past]] ==\nText.", "The past\nText."),
    ("== A == <!-- note -->\nText.", "A\nText."),
    ("x == y\nand = z", "x == y\nand = z"),
    ("* one\n* two\n** deep\n# first", "- one\n- two\n- deep\n- first"),
    ("*one\n*\n*two", "- one\n- two"),
    (": indented\n:: more", "indented\nmore"),
    ("; Bread : a food", "Bread: a food"),
    (";Bread\n:A food.\n:Another.", "Bread: A food.\nAnother."),
    ("; A heading\nText.", "A heading\nText."),
    ("; see [http://a.b here] : there", "see here: there"),
    ("One.\n\n\n\n\nTwo.", "One.\n\nTwo."),
    ("One.\n----\nTwo.", "One.\nTwo."),
    (" preformatted text", "preformatted text"),
    ("One.\r\n\r\nTwo.", "One.\n\nTwo."),
    ("Text.\n== References ==\n* a\n=== Books ===\n* b\n== Legacy ==\nMore.", "Text.\n\nLegacy\nMore."),
    ("Text.\n==See also==\n* a\n==External links==\n* b", "Text."),
    ("Text.\n==Further reading==\n* a\n==Notes==\n{{reflist}}", "Text."),
    ("正文。\n== 参考文献 ==\n* 甲\n== 外部链接 ==\n* 乙", "正文。"),
    ("正文。\n== 參見 ==\n* 甲\n== 外部連結 ==\n* 乙\n== 歷史 ==\n很久。", "正文。\n\n歷史\n很久。"),
    ("Текст.\n== Външни препратки ==\n* a\n== Източници ==\n* b", "Текст."),
    ("Text.\n== Weblinks ==\n* a\n== Einzelnachweise ==\n<references />", "Text."),
    ("Texte.\n== Voir aussi ==\n* a\n== Liens externes ==\n* b", "Texte."),
    ("本文。\n== 脚注 ==\n<references/>\n== 関連項目 ==\n* 甲", "本文。"),
    ("== Culture ==\n=== Literature ===\nNovels.", "Culture\n\nLiterature\nNovels."),
    ("Before.\n{|\n! a !! b\n|-\n| 1 || 2\n|}\nAfter.", "Before.\nAfter."),
    ('Before.\n{| class="wikitable"\n|\n{|\n| inner\n|}\n| outer\n|}\nAfter.', "Before.\nAfter."),
    (":{|\n| a\n|}\nAfter.", "After."),
    ("{{clear}}{|\n| a\n|}\nAfter.", "After."),
    ("Before.<table><tr><td>a</td></tr></table>After.", "Before.\nAfter."),
    ("{|\n| a {{Infobox\n|x=1}} b\n|}\nAfter.", "After."),
    ("#REDIRECT [[Bread]]", ""),
    ("#重定向 [[面包]]", ""),
    ("#ПРЕНАСОЧВАНЕ [[Хляб]]", ""),
    ("", ""),
]

TEMPLATES = [
    ("{{Infobox food\n| name = Bread\n| made = {{start date|1900}}\n}}\nBread is food.", "Bread is food."),
    ("{{Unknown thing|with|words}}Text.", "Text."),
    ("Text{{citation needed|date=May 2010}} here.", "Text here."),
    ("Text {{citation needed}}. More {{sfn|Smith|2000}}, yes.", "Text. More, yes."),
    ("'''Albedo''' ({{IPAc-en|æ|l}}) is light.", "Albedo is light."),
    ("'''Anarchism''' (from Greek; {{IPA-el|a}}) is an idea.", "Anarchism (from Greek) is an idea."),
    ("'''X''' ({{IPA-el|a}}; from Greek) is", "X (from Greek) is"),
    ("'''X''' ({{a}}; {{b}}) is", "X is"),
    ("'''X''' (one, {{b}}, two) is", "X (one, two) is"),
    ("* {{vote}}, because\n* {{b}}\n* c", "- because\n- c"),
    ("面包（{{a}}）是食物。", "面包是食物。"),
    ("面包（英文，{{a}}）是食物。", "面包（英文）是食物。"),
    ("{{convert|5|km|mi}}", "5 km"),
    ("{{convert|5|to|10|km|mi|abbr=on}}", "5 to 10 km"),
    ("{{convert|5|-|10|sqmi|km2}}", "5–10 sq mi"),
    ("{{convert|6|ft|2|in|m}} tall", "6 ft 2 in tall"),
    ("{{convert|20|C|F}}", "20°C"),
    ("{{lang|fr|pain}}", "pain"),
    ("the {{lang-la|panis}} word", "the Latin: panis word"),
    ("the word ({{langx|de|Brot}})", "the word (German: Brot)"),
    ("{{lang-la|panis}}", "Latin: panis"),
    ("{{nowrap|10 am}} and {{small|tiny}}", "10 am and tiny"),
    ("{{nowrap|[[Bread|rye]] {{lang|de|Brot}}}}", "rye Brot"),
    ("{{nowrap|a{{=}}b}} {{nowrap|1=c=d}}", "a=b c=d"),
    ("on the day {{birth date|1990|1|2}} the", "on the day January 2, 1990 the"),
    ("on the day {{birth date and age|1990|1|2|df=y}} the", "on the day 2 January 1990 the"),
    ("the {{start date|1990|5}} issue", "the May 1990 issue"),
    ("in the year {{as of|2010|5|lc=y}} the", "in the year as of May 2010 the"),
    ("{{As of|2010}}, the town has", "As of 2010, the town has"),
    ("{{IPA|/brɛd/}}", "/brɛd/"),
    ("{{frac|1|2}} and {{frac|3|1|2}} and {{sfrac|5|6}}", "1/2 and 3 1/2 and 5/6"),
    ("{{abbr|ca.|circa}}", "ca."),
    ("{{circa|1900}}", "c. 1900"),
    ("{{fl.|1200}}", "fl. 1200"),
    ("{{quote|To be.|Hamlet}}", "To be.\n— Hamlet"),
    ("{{blockquote|text=To be.|author=W. S.|source=Hamlet}}", "To be.\n— W. S., Hamlet"),
    ("{{cquote|1=A=B}}", "A=B"),
    ("{{ubl|one|two}}", "- one\n- two"),
    ("{{plainlist|\n* one\n* two\n}}", "- one\n- two"),
    ("{{hlist|one|two}}", "one · two"),
    ("{{val|1.25|0.05|e=6|u=m}}", "1.25±0.05×10^6 m"),
    ("{{nihongo|bread|パン|pan}}", "bread (パン, pan)"),
    ("{{zh|s=面包|t=麵包|p=miànbāo}}", "simplified Chinese: 面包; traditional Chinese: 麵包; pinyin: miànbāo"),
    ("1900{{ndash}}1910{{snd}}then{{mdash}}now", "1900–1910 – then—now"),
    ("{{ill|Bread|de|Brot}} and {{interlanguage link|Rye|fr|Seigle|lt=rye}}", "Bread and rye"),
    ("{{sic}} {{sic|teh}}", "[sic] teh [sic]"),
    ("{{formatnum:1234567}} people", "1,234,567 people"),
    ("{{lc:BREAD}} {{ucfirst:bread}}", "bread Bread"),
    ("{{#if:x|yes|no}}Text.", "Text."),
    ("{{DEFAULTSORT:Bread}}Text.", "Text."),
    ("{{{1|default}}} text", "default text"),
    ("{{key press|Ctrl|C}}", "Ctrl+C"),
    ("{{font color|red|words}}", "words"),
    ("{{HMS|Victory|1765}} sank", "HMS Victory (1765) sank"),
    ("{{music|sharp}} {{pi}} {{angbr|a}}", "♯ π ⟨a⟩"),
    ("{{US$|10}} and {{€|5}}", "US$10 and €5"),
    ("{{flag|France}}", "France"),
    ("{{date|1|janvier|2000}}", "1 janvier 2000"),
    ("le {{s-|XIX}}", "le XIXe siècle"),
    ("{{仮リンク|パン屋|en|Bakery}}で", "パン屋で"),
    ("{{ruby|漢字|かんじ}}", "漢字（かんじ）"),
    ("{{цитат|Думи.}}", "Думи."),
    ("{{Template:Nowrap|words}}", "words"),
    ("{{nowrap\n|words\n}}", "words"),
]

CHINESE = [
    ("-{zh-hans:面包;zh-hant:麵包}-很好。", "面包很好。"),
    ("-{zh-cn:软件; zh-tw:軟體; zh-hk:軟件;}-很好。", "软件很好。"),
    ("-{zh-tw:軟體;zh-hk:軟件}-", "軟體"),
    ("-{A|zh-hans:面包;zh-hant:麵包}-很好。", "面包很好。"),
    ("-{H|zh-cn:博客;zh-tw:部落格}-正文。", "正文。"),
    ("-{T|zh-cn:博客;zh-tw:部落格}-正文。", "正文。"),
    ("-{R|原文}-照旧", "原文照旧"),
    ("-{原文}-照旧", "原文照旧"),
    ("-{zh-hans;zh-hant|原文}-照旧", "原文照旧"),
    ("空-{}-的", "空的"),
    ("-{zh:[[面包|包]];zh-hant:麵包}-", "包"),
    ("[[面包|-{zh-hans:面包;zh-hant:麵包}-]]", "面包"),
    ("{{lang|zh|-{面包}-}}", "面包"),
    ("-{zh-hans:{{lang|zh|面包}};zh-hant:麵包}-", "面包"),
    ("-{巨集=>zh-cn:宏;}-", "宏"),
    ("A-{{nowrap|b}}-c", "A-b-c"),
    ("'''面包'''（{{lang-en|bread}}），是食物。", "面包（英语：bread），是食物。"),
    ("{{link-en|面包店|Bakery}}", "面包店"),
    ("{{le|面包店|Bakery|店}}", "店"),
    ("{{tsl|en|Bakery|面包店}}", "面包店"),
    ("{{tsl|en|Bakery|面包店|店}}", "店"),
    ("{{bd|1900年|1月1日|1980年|2月2日|catIdx=M}}", "1900年1月1日－1980年2月2日"),
    ("生于{{birth date|1990|1|2}}。", "生于1990年1月2日。"),
    ("全角：１２３，“引号”《书名》……", "全角：１２３，“引号”《书名》……"),
]

# Broken on purpose; what is left should read well, and no markup should be left.
BROKEN = [
    ("An [[unclosed link here.\n\nNext.", "An unclosed link here.\n\nNext."),
    ("An {{unclosed template here.\n\nNext.", "An unclosed template here.\n\nNext."),
    ("A stray ]] and }} and |} end.", "A stray and and end."),
    ("'''Bold to the end.\nNext.", "Bold to the end.\nNext."),
    ("Text<ref>never closed. More.\n\nNext.", "Textnever closed. More.\n\nNext."),
    ("Text <!-- never closed. More.", "Text never closed. More."),
    ("{{Infobox\n| name = x\n| size = 5\n\nThe prose.", "Infobox\n\nThe prose."),
    ('{| class="x"\n| a\n| b\n\nThe prose.', "a\nb\n\nThe prose."),
    ("[http://a.b never closed\nNext.", "http://a.b never closed\nNext."),
    ("<div>open\nNext.</span></b>", "open\nNext."),
    ("-{zh-hans:开放\n下一行。", "zh-hans:开放\n下一行。"),
    ("{{nowrap|a [[b}} c.", "a b c."),
    ("== Half a heading\nText.", "== Half a heading\nText."),
]

SNIPPETS = [*INLINE, *REFERENCES_AND_TAGS, *NAMESPACES, *BLOCKS, *TEMPLATES, *CHINESE, *BROKEN]


@pytest.mark.parametrize(("markup", "text"), SNIPPETS)
def test_snippet(markup, text):
    assert Wikitext().clean(markup, title="Bread") == text


@pytest.mark.parametrize(
    ("variant", "text"),
    [
        ("zh", "甲"),
        ("zh-hans", "甲"),
        ("zh-cn", "甲"),
        ("zh-my", "甲"),
        ("zh-hant", "乙"),
        ("zh-tw", "乙"),
        ("zh-hk", "丙"),
        ("zh-mo", "丙"),
    ],
)
def test_variant_falls_back_to_its_nearest(variant, text):
    assert Wikitext(WikitextOptions(variant=variant)).clean("-{zh-hans:甲;zh-tw:乙;zh-hk:丙}-") == text


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant 'en' is not one of zh, zh-hans"):
        Wikitext(WikitextOptions(variant="en"))


def test_traditional_label():
    clean = Wikitext(WikitextOptions(variant="zh-tw")).clean
    assert clean("麵包（{{lang-en|bread}}）。") == "麵包（英語：bread）。"


TABLE = """Before.
{| class="wikitable" style="x"
|+ Breads
! scope="col" | Name !! Grain
|-
| [[Rye bread|Rye]] || style="a" | rye<ref>x</ref>
|-
| colspan=2 | {{nowrap|White}}
| wheat
more
|}
After."""


def test_tables_keep_cell_text():
    clean = Wikitext(WikitextOptions(tables=True)).clean
    assert clean(TABLE) == "Before.\n\nBreads\nName | Grain\nRye | rye\nWhite | wheat more\n\nAfter."
    assert clean("<table><tr><th>a</th><td>b</td></tr><tr><td>c</td></tr></table>") == "a | b\nc"
    assert clean('{|\n| colspan="2" {{x}} || a<br>b || style="c"|\n| d\n|}') == "a b | d"
    infobox = "{{Infobox food\n| name = Bread\n| image = a.jpg\n| grain = [[rye]]\n| empty =\n}}Text."
    assert clean(infobox) == "name: Bread\ngrain: rye\nText."
    assert Wikitext().clean(TABLE) == "Before.\nAfter."


def test_table_in_a_table_keeps_both_texts():
    text = Wikitext(WikitextOptions(tables=True)).clean("{|\n| a\n{|\n| b\n|}\n|-\n| c\n|}")
    assert text.split() == ["a", "b", "c"]


def test_sections_are_kept_on_request():
    markup = "Text.\n== References ==\n* a\n== 参考文献 ==\n* 乙"
    assert Wikitext(WikitextOptions(sections=True)).clean(markup) == "Text.\n\nReferences\n- a\n\n参考文献\n- 乙"


def test_namespaces_of_the_dump():
    markup = "[[Sfájl:a.jpg|x]][[Sortiment:b]]Text."
    assert Wikitext().clean(markup) == "xSortiment:bText."
    assert Wikitext(namespaces={6: ["Sfájl"], 14: ["Sortiment"]}).clean(markup) == "Text."
    assert Wikitext(namespaces={100: ["It"]}).clean("[[It: a word]]") == "It: a word"


def test_page_name():
    assert Wikitext().clean("{{PAGENAME}} is food.", title="Bread") == "Bread is food."


def test_worker_process_gets_an_equal_cleaner():
    cleaner = Wikitext(WikitextOptions(variant="zh-tw"), namespaces={6: ["Sfájl"]})
    assert pickle.loads(pickle.dumps(cleaner)).clean("[[Sfájl:x]]-{zh-tw:乙;zh-cn:甲}-") == "乙"  # noqa: S301


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("'''Mercury''' may be:\n* a\n{{disambig}}", True),
        ("{{Disambiguation|geo}}", True),
        ("{{hndis|name=Smith}}", True),
        ("'''水星'''：\n{{消歧义}}", True),
        ("{{消歧義}}", True),
        ("{{Begriffsklärung}}", True),
        ("{{homonymie}}", True),
        ("{{пояснение}}", True),
        ("{{Неоднозначность}}", True),
        ("{{aimai}}", True),
        ("{{曖昧さ回避}}", True),
        ("{{동음이의}}", True),
        ("__DISAMBIG__", True),
        ("{{other uses|Mercury (disambiguation)}} Text.", False),
        ("{{disambiguation needed}} Text.", False),
        ("Text about [[disambiguation]].", False),
    ],
)
def test_is_disambiguation(markup, expected):
    assert Wikitext().is_disambiguation(markup) is expected


OPENERS = [
    *(
        "{{",
        "[[",
        "{|",
        "\n{|",
        "<ref>",
        "'''",
        "''",
        "-{",
        "<!--",
        "[http://",
        "&",
        "<nowiki>",
        "<math>",
        "<pre>",
        "{{{",
        "<div",
    ),
    *(
        "}}",
        "]]",
        "\n|}",
        "}-",
        "-->",
        "</ref>",
        "<table>",
        "{{nowrap|",
        "[[File:a.jpg|thumb|",
        "<ref name=x",
        "{{Infobox\n| a = b\n",
    ),
    *("[http://a b [", "<gallery>", "{{quote|[[a|{{b|", "\n== a ==", "\n=", "__A", "(", '<b "', "&#", "\n;a:", "\n|", "-{H|"),
]
MARKER = "The marker sentence survives."


@pytest.mark.parametrize("opener", OPENERS)
def test_broken_markup_swallows_nothing(opener):
    text = Wikitext().clean(f"First words.\n\nSome text {opener} more text.\n\n{MARKER}\n\n== Next ==\nLast [[words]].")
    assert text.startswith("First words.")
    assert MARKER in text.split("\n")
    assert text.endswith("Last words.")
    assert not any(markup in text for markup in ("{{", "[[", "]]", "}}", "{|", "|}", "<ref>", "<!--"))


@pytest.mark.parametrize("opener", ["{{", "[[", "-{", "{{nowrap|"])
def test_unclosed_ends_at_a_heading(opener):
    """A stray end in a later section closes nothing."""
    text = Wikitext().clean(f"Some {opener} text.\n\n== Next ==\n{MARKER} }}}} ]] }}-\n\nLast.")
    assert MARKER in text
    assert text.endswith("Last.")


@pytest.mark.parametrize(
    "fragment", [*OPENERS, "[", "{", "<", "=", "~", " ", "\n", "\n*", "|", "<ref/> ,", "( ,", "<b><i>", "[[a|b]]"]
)
def test_time_is_linear(fragment):
    """300 kB of one fragment, alone and nested around a text: a quadratic step would take minutes."""
    count = 300_000 // len(fragment)
    closing = {"{": "}}", "[": "]]", "-": "}-"}.get(fragment[0], "</ref>")
    for page in (fragment * count, fragment * (count // 2) + MARKER + closing * (count // 2)):
        start = time.process_time()
        Wikitext(WikitextOptions(tables=True)).clean(page)
        assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("opening", "closing"), [("[[", "]]"), ("{{nowrap|", "}}"), ("[", "]"), ("\n{|\n|", "\n|}"), ("-{", "}-")]
)
def test_deep_nesting_keeps_the_text(opening, closing):
    page = opening * 10_000 + MARKER + closing * 10_000 + "\n\nAfter."
    text = Wikitext(WikitextOptions(tables=True)).clean(page)
    assert MARKER in text
    assert text.endswith("After.")


def test_random_markup_keeps_the_words_outside():
    """Fragments in any order, then a new section: its words survive, whatever was left open before."""
    fragments = [
        *OPENERS,
        "[[a]]",
        "[[a|b]]",
        "{{nowrap|a}}",
        "|",
        "=",
        "<ref>a</ref>",
        "words ",
        "面包",
        "\n",
        "\n\n",
        "</nowiki>",
        "<br>",
    ]
    fragments += [
        "</pre>",
        "</math>",
        "\n|-",
        "\n! a !! b",
        "||",
        "{{!}}",
        "{{=}}",
        ";",
        ":",
        "#",
        "*",
        "\x01\x02",
        "&amp;",
        "zh-cn:",
    ]
    random_ = random.Random(7)
    for tables in (False, True):
        cleaner = Wikitext(WikitextOptions(tables=tables))
        for round_ in range(300):
            noise = "".join(random_.choices(fragments, k=random_.randrange(1, 40)))
            text = cleaner.clean(f"Opening{round_} words.\n\n{noise}\n\n== Next ==\n\nMarker{round_} words.\n\n")
            assert f"Opening{round_} words." in text, noise
            assert f"Marker{round_} words." in text, noise
            cleaner.is_disambiguation(noise)
