"""What the common inline templates of Wikipedia show: ``{{convert|5|km}}`` is "5 km", ``{{lang|fr|oui}}`` is "oui".

A template's text lives on another page of the wiki, so this is a table of the ones that carry words of the sentence they
stand in. A name that is not in the table, as of an infobox, a citation or a notice, renders as None and is dropped.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from etude.corpus.wiki.names import LANGUAGE_NAMES, TRADITIONAL_LABELS


@dataclass
class Call:
    """One use of a template: its casefolded name, its arguments, and what it must know of the page."""

    name: str
    positional: list[str]
    named: dict[str, str]
    title: str  # of the page
    language: str  # of the page, as far as it can be told: "zh", "en" or ""
    variant: str  # of Chinese

    def at(self, *positions: int) -> str:
        """The first of the positional arguments, counted from 1, that is there and not blank; else ""."""
        for position in positions:
            if position <= len(self.positional) and (value := self.positional[position - 1].strip()):
                return value
        return ""

    def get(self, *names: str) -> str:
        """The first of the named arguments that is there and not blank; else ""."""
        for name in names:
            if value := self.named.get(name, "").strip():
                return value
        return ""


def parse_call(body: str, title: str, language: str, variant: str) -> Call:
    """Read ``name|positional|key=value``. ``1=`` and so on are positional, as in MediaWiki."""
    name, *arguments = body.split("|")
    positional: list[str] = []
    named: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            positional.append(argument)
        elif (key := key.strip()).isdecimal() and 0 < int(key[:3]) < 100:
            while len(positional) < int(key[:3]):
                positional.append("")
            positional[int(key[:3]) - 1] = value
        else:
            named[key.casefold()] = value
    return Call(template_name(name), positional, named, title, language, variant)


def template_name(name: str) -> str:
    """The name as the tables have it. ``{{Template:Foo_bar}}`` is ``foo bar``."""
    name = name.strip().replace("_", " ").casefold()
    return name[9:].strip() if name.startswith("template:") else name


def renderer(name: str) -> Callable[[Call], str] | None:
    """The function that renders the template of this (normal) name; None for one that is dropped."""
    if found := RENDERERS.get(name):
        return found
    for prefix, render in PREFIXES:
        if name.startswith(prefix):
            return render
    return None


def infobox(call: Call) -> str:
    """The filled-in rows of an infobox, one a line. Only asked for where the text of tables is."""
    rows = [
        f"{key.strip().replace('_', ' ')}: {' '.join(value.split())}"
        for key, value in call.named.items()
        if value.strip() and not re.search(r"image|logo|photo|map|size|width|align|style|color|colour|图|圖|снимка|файл", key)
    ]
    return "\n" + "\n".join(rows) + "\n"


def is_infobox(name: str) -> bool:
    return any(word in name for word in ("infobox", "taxobox", "speciesbox", "信息框", "資訊框", "инфокутия", "карточка"))


# Dates ----------------------------------------------------------------------------------------------------------------

MONTHS = ("January", "February", "March", "April", "May", "June", "July")
MONTHS += ("August", "September", "October", "November", "December")


def date_text(year: str, month: str, day: str, call: Call) -> str:
    """A date in the page's language. Parts that are no numbers are kept as they stand."""
    parts = [part for part in (year, month, day) if part]
    if not all(part.isdecimal() for part in parts):
        return " ".join(reversed(parts) if parts[0].isdecimal() and len(parts[0]) == 4 else parts)
    if call.language == "zh":
        return "".join(str(int(part)) + unit for part, unit in zip(parts, "年月日", strict=False))
    if not month or not 1 <= int(month) <= 12:
        return year
    if call.language == "en":
        name = MONTHS[int(month) - 1]
        if not day:
            return f"{name} {year}".strip()
        if call.get("df")[:1] in ("y", "t", "1"):
            return f"{int(day)} {name} {year}".strip()
        return f"{name} {int(day)}, {year}" if year else f"{name} {int(day)}"
    return "-".join(part.zfill(2) for part in parts)


def date(call: Call) -> str:
    return date_text(call.at(1), call.at(2), call.at(3), call)


def as_of(call: Call) -> str:
    if alternative := call.get("alt"):
        return alternative
    when = date(call)
    if call.language == "zh":
        return f"截至{when}".translate(TRADITIONAL_LABELS)
    words = "since" if call.get("since") else "as of"
    return f"{words if call.get('lc') else words.capitalize()} {when}"


def age(call: Call) -> str:
    """Full years between two dates; "" without the second, which would be the day of reading."""
    numbers = [value.strip() for value in call.positional]
    if len(numbers) < 6 or not all(value.isdecimal() for value in numbers[:6]):
        return ""
    born, other = ([int(value) for value in numbers[start : start + 3]] for start in (0, 3))
    return str(other[0] - born[0] - (other[1:] < born[1:]))


def chinese_life(call: Call) -> str:
    """{{bd|1900年|1月1日|1980年|2月2日|catIdx=…}}"""
    birth, death = call.at(1) + call.at(2), call.at(3) + call.at(4)
    return f"{birth}－{death}" if death else f"{birth}－"


# Numbers and units ----------------------------------------------------------------------------------------------------

UNITS = {"sqmi": "sq mi", "sqft": "sq ft", "sqyd": "sq yd", "sqkm": "km2", "cuft": "cu ft", "cumi": "cu mi", "cuin": "cu in"}
UNITS |= {"c": "°C", "f": "°F", "°c": "°C", "°f": "°F", "usgal": "US gal", "impgal": "imp gal", "nmi": "nmi", "kph": "km/h"}
UNITS |= {"m3": "m3", "cuyd": "cu yd", "sqin": "sq in", "hp-metric": "PS", "lt": "long tons", "st": "short tons", "lk": "lk"}
COMPOUND_UNITS = {("ft", "in"), ("lb", "oz"), ("st", "lb"), ("mi", "yd"), ("mi", "ft"), ("yd", "ft"), ("mi", "chain")}
RANGES = {"to": " to ", "-": "–", "–": "–", "and": " and ", "or": " or ", "x": " × ", "×": " × ", "by": " by ", "xx": " × "}
RANGES |= {"to(-)": " to ", "+/-": " ± ", "±": " ± ", "+": " + ", "to about": " to about ", "and(-)": " and "}


def convert(call: Call) -> str:
    """The measure as the source has it, ``{{convert|5|to|10|km|mi}}`` "5 to 10 km". The converted one is not computed."""
    values = [value.strip() for value in call.positional]
    text, index = values[0] if values else "", 1
    while index < len(values):
        if values[index] in RANGES and index + 1 < len(values):
            text += RANGES[values[index]] + values[index + 1]
            index += 2
            continue
        unit = UNITS.get(values[index].lower(), values[index])
        text += unit if unit.startswith("°") else " " + unit
        # {{convert|5|ft|10|in|m}}: more of the same measure, not what to convert it to
        follows = values[index + 1 : index + 3]
        is_measure = len(follows) == 2 and follows[0].replace(".", "").isdecimal()
        if is_measure and (values[index], follows[1]) in COMPOUND_UNITS:
            text += f" {follows[0]} {follows[1]}"
        break
    return text


def val(call: Call) -> str:
    """{{val|1.25|0.05|e=6|u=m}} is "1.25±0.05×10^6 m"."""
    text = call.at(1)
    if call.at(2):
        text += f"+{call.at(2).lstrip('+')}−{call.at(3).lstrip('-−')}" if call.at(3) else f"±{call.at(2)}"
    if exponent := call.get("e"):
        text += f"×10^{exponent}"
    unit = call.get("u", "ul", "up", "upl")
    return call.get("p") + text + (unit if unit in ("%", "°", "°C") else f" {unit}" if unit else "") + call.get("s")


def fraction(call: Call) -> str:
    parts = [part.strip() for part in call.positional if part.strip()]
    if len(parts) < 2:
        return f"1/{parts[0]}" if parts else ""
    return f"{parts[0]}/{parts[1]}" if len(parts) == 2 else f"{parts[0]} {parts[1]}/{parts[2]}"


def format_number(call: Call) -> str:
    digits = call.at(1)
    whole, point, decimals = digits.partition(".")
    return f"{int(whole):,}{point}{decimals}" if whole.isdecimal() and len(whole) < 100 else digits


def duration(call: Call) -> str:
    hours, minutes, seconds = call.get("h") or call.at(1), call.get("m") or call.at(2), call.get("s") or call.at(3)
    return ":".join(part.zfill(2) if index else part for index, part in enumerate(p for p in (hours, minutes, seconds) if p))


def height(call: Call) -> str:
    return " ".join(f"{call.named[unit].strip()} {unit}" for unit in ("m", "cm", "ft", "in") if call.get(unit))


def currency(symbol: str) -> Callable[[Call], str]:
    return lambda call: symbol + call.at(1)


# Languages ------------------------------------------------------------------------------------------------------------


def language_label(code: str, call: Call) -> str:
    """ "Latin: " before the words, on pages in English and Chinese; on others the words go alone."""
    names = LANGUAGE_NAMES.get(code.lower()) or LANGUAGE_NAMES.get(code.lower().partition("-")[0])
    if not names or not call.language or call.get("label") == "none" or call.get("links") == "none":
        return ""
    if call.language == "en":
        return f"{names[0]}: "
    return (names[1].translate(TRADITIONAL_LABELS) if traditional(call.variant) else names[1]) + "："


def traditional(variant: str) -> bool:
    return variant in ("zh-hant", "zh-tw", "zh-hk", "zh-mo")


def labelled(call: Call) -> str:
    """{{lang-la|verbum}}, the code in the name."""
    return labelled_text(call.name[5:], call.at(1), call)


def labelled_by_code(call: Call) -> str:
    """{{langx|la|verbum}}"""
    return labelled_text(call.at(1), call.get("text") or call.at(2), call)


def labelled_text(code: str, text: str, call: Call) -> str:
    gloss = call.get("lit", "translation")
    return (language_label(code, call) + text + (f", lit. '{gloss}'" if gloss else "")) if text else ""


def chinese(call: Call) -> str:
    """{{zh|s=…|t=…|p=…}}"""
    keys = (("c", "Chinese"), ("s", "simplified Chinese"), ("t", "traditional Chinese"), ("p", "pinyin"), ("w", "Wade–Giles"))
    keys += (("hp", "pinyin"), ("j", "Jyutping"), ("y", "Yale"), ("poj", "Pe̍h-ōe-jī"), ("l", "lit."))
    if call.get("labels") == "no":
        return "; ".join(call.get(key) for key, _ in keys if call.get(key))
    return "; ".join(
        f"{label} {call.get(key)}" if key == "l" else f"{label}: {call.get(key)}" for key, label in keys if call.get(key)
    )


def nihongo(call: Call) -> str:
    """{{nihongo|English|漢字|rōmaji|extra}} is "English (漢字, rōmaji, extra)"."""
    return with_bracket(call.at(1), [call.at(2), call.at(3), call.get("lead", "extra") or call.at(4)])


def nihongo_romaji_first(call: Call) -> str:
    return with_bracket(call.at(3), [call.at(2), call.at(1)])


def with_bracket(text: str, others: list[str]) -> str:
    inside = ", ".join(other for other in others if other)
    if not text:
        return inside
    return f"{text} ({inside})" if inside else text


def korean(call: Call) -> str:
    parts = [("Korean", call.get("hangul") or call.at(1)), ("Hanja", call.get("hanja") or call.at(2)), ("RR", call.get("rr"))]
    parts.append(("MR", call.get("mr")))
    return "; ".join(f"{label}: {text}" for label, text in parts if text)


def reading(call: Call) -> str:
    """{{ruby|漢字|かんじ}}"""
    return f"{call.at(1)}（{call.at(2)}）" if call.at(2) else call.at(1)


# Links and lists ------------------------------------------------------------------------------------------------------


def translated_link(call: Call) -> str:
    """{{tsl|en|English title|中文标题|显示}}: the local words, as {{link-en|中文|English}} has them first."""
    return call.get("lt", "label", "d") or call.at(4, 3, 2)


def interlanguage_link(call: Call) -> str:
    """{{ill|Title|de|Titel|lt=words}}, {{仮リンク|表題|en|Title|label=…}}, {{link-en|标题|Title}}"""
    return call.get("lt", "label", "display", "d") or call.at(1)


def green_link(call: Call) -> str:
    """{{le|标题|Title|显示}}"""
    return call.get("lt", "label") or call.at(3, 1)


def not_translated(call: Call) -> str:
    """{{нп5|Заглавие|текст|en|Title}}"""
    return call.get("текст") or call.at(2, 1)


def lines(call: Call) -> str:
    items = [item.strip() for item in call.positional if item.strip()]
    return "\n" + "\n".join(item if item[0] in "*#" else f"* {item}" for item in items) + "\n" if items else ""


def dotted(call: Call) -> str:
    return " · ".join(item.strip() for item in call.positional if item.strip())


def block(call: Call) -> str:
    content = call.get("content", "list") or next((value.strip() for value in reversed(call.positional) if value.strip()), "")
    return f"\n{content}\n" if content else ""


def quotation(call: Call) -> str:
    """The words on lines of their own, then "— author, source"."""
    text = call.get("text", "quote", "content", "текст", "zitat", "texto") or call.at(1)
    by = [call.get("author", "sign", "by", "автор", "autor", "auteur") or call.at(2)]
    by.append(call.get("source", "title", "источник", "quelle") or call.at(3))
    by_line = ", ".join(part for part in by if part)
    return f"\n{text}\n" + (f"— {by_line}\n" if by_line else "") if text else ""


def french_or_english_citation(call: Call) -> str | None:
    """A quotation in French, {{citation|mots}}; a reference, with named arguments only, in English."""
    return f"« {call.at(1)} »" if call.at(1) else None


# Plain ones -----------------------------------------------------------------------------------------------------------


def argument(*positions: int) -> Callable[[Call], str]:
    return lambda call: call.at(*positions)


def constant(text: str) -> Callable[[Call], str]:
    return lambda call: text


def between(before: str, after: str = "") -> Callable[[Call], str]:
    return lambda call: f"{before}{call.at(1)}{after}" if call.at(1) else ""


def joined(separator: str) -> Callable[[Call], str]:
    return lambda call: separator.join(value.strip() for value in call.positional if value.strip())


def last(call: Call) -> str:
    return next((value.strip() for value in reversed(call.positional) if value.strip()), "")


def sic(call: Call) -> str:
    if call.get("hide"):
        return "".join(call.positional[:2])
    return f"{call.at(1)} [sic]" if call.at(1) else "[sic]"


def reign(call: Call) -> str:
    return f"r. {call.at(1)}–{call.at(2)}" if call.at(2) else f"r. {call.at(1)}"


def circa(call: Call) -> str:
    dates = [value.strip() for value in call.positional if value.strip()]
    return "c. " + " – c. ".join(dates[:2]) if dates else "c."


def ship(call: Call) -> str:
    """{{HMS|Victory|1765}}; the prefix is the template's name."""
    return f"{call.name.upper()} {call.at(1)}" + (f" ({call.at(2)})" if call.at(2) else "")


def named_ship(call: Call) -> str:
    """{{ship|HMS|Victory|1765}}"""
    return f"{call.at(1)} {call.at(2)}".strip() + (f" ({call.at(3)})" if call.at(3) else "")


def french_century(call: Call) -> str:
    """{{s-|XIX}}, {{siècle|XIX}}"""
    return f"{call.at(1)}{'er' if call.at(1) == 'I' else 'e'} siècle"


def character(call: Call) -> str:
    return f"U+{call.at(1).upper()} {call.at(2)}".strip()


def author_year(call: Call) -> str:
    """{{harvtxt|Smith|Jones|2005}} is "Smith & Jones (2005)"."""
    *authors, year = [value.strip() for value in call.positional if value.strip()] or [""]
    return f"{' & '.join(authors)} ({year})" if authors else year


def table(entries: dict[str, Callable[[Call], str | None]]) -> dict[str, Callable[[Call], str | None]]:
    """One entry a name; the keys are lists of names that render alike."""
    return {name.strip().replace("_", " "): render for names, render in entries.items() for name in names.split()}


FIRST, SECOND, THIRD = argument(1), argument(2), argument(3)

RENDERERS: dict[str, Callable[[Call], str | None]] = table(
    {
        # the words themselves, in some style
        """nowrap nobr nobreak small smaller big bigger large larger midsize smallcaps sc smallcaps2 sc2 caps allcaps noitalic
        noitalics nobold normal italic italics italic_title strong em mono monospace code codes tt var math mvar bigmath tmath
        abbr abbrlink tooltip hover visible_anchor vanchor longitem center centre nihongo2 nihongo_foot unicode polytonic ipa
        api ipa2 phonetic sub not_a_typo proper_name typo as_written char samp kbd dfn term
        defn native_phrase indented block_indent indent wrap nastaliq hebrew heb jpn
        專名號 专名号 僅 s текст не_переводить nowr
        僻字 僻字2 tl tlx tlc
        chem2 format_price annotated_link country flag flagu flagcountry flagcu flagg
        fb fbw nts ntss number_table_sorting railgauge track_gauge kein_umbruch ohne_umbruch
        wikt w2 italique gras""": FIRST,
        "font_color fontcolor font_colour color colour background_color bgcolor resize font_size fs align sort": SECOND,
        """lang lang2 wikt-lang langue rtl-lang script langr taal лang 語言 语言
        lang3""": last,
        "transl transliteration translit xlit tlit m+j mention": last,
        "linktext": joined(" "),
        "font": last,
        "sup smallsup superscript su": between("^"),
        "keypress key_press key": joined("+"),
        "sic": sic,
        "angbr angle_bracket angbr_ipa vr": between("⟨", "⟩"),
        "gloss literal_gloss": between("‘", "’"),
        "lit literal literal_translation literally": between("lit. '", "'"),
        "trans": between("'", "'"),
        # signs
        "! pipe": constant("|"),
        "= equals": constant("="),
        "( (( )) ) {{ }} !) (! !-": constant(""),
        "' apostrophe": constant("'"),
        '\'" ""\'': constant("'\""),
        "-' '-": constant("'"),
        "* bullet": constant("•"),
        "snd spnd sndash spaced_ndash spaced_en_dash dash snds": constant(" – "),
        "ndash en_dash – nsndns": constant("–"),
        "mdash em_dash — mdashb": constant("—"),
        "spaced_mdash snmd smd": constant(" — "),
        "nbsp space spaces nnbsp thin_space thinsp hair_space hsp 0ws pad en_space em_space": constant(" "),
        "· • dot dotsep middot interpunct ·w •w bull": constant(" · "),
        "minus −": constant("−"),
        "times": constant("×"),
        "plusminus +- ±": constant("±"),
        "ellipsis ... …": constant("…"),
        "pi π": constant("π"),
        "degree deg": constant("°"),
        "number_sign hash #": constant("#"),
        "numero numéro": lambda call: f"No. {call.at(1)}".strip(),
        "n°": lambda call: f"no {call.at(1)}".strip(),
        "br break crlf newline": constant("\n"),
        "pb paragraph_break parabr paragraph": constant("\n\n"),
        "music": lambda call: {"flat": "♭", "b": "♭", "sharp": "♯", "#": "♯", "natural": "♮"}.get(call.at(1), call.at(1)),
        # numbers and measures
        "convert cvt conv": convert,
        "val": val,
        "frac sfrac fraction frc bruch mfrac tfrac dfrac xfrac": fraction,
        "sqrt radical square_root": between("√"),
        "e": between("×10^"),
        "10^": between("10^"),
        "formatnum num formatnum: nombre number": format_number,
        "unité unite nb": joined(" "),
        "duration": duration,
        "height": height,
        "chem nuclide simplenuclide": joined(""),
        "us$ usd": currency("US$"),
        "a$ aud": currency("A$"),
        "c$ cad can$": currency("C$"),
        "hk$": currency("HK$"),
        "nt$ twd": currency("NT$"),
        "£ gbp pound_sterling": currency("£"),
        "€ eur euro": currency("€"),
        "¥ jpy jp¥ cny cn¥ rmb": currency("¥"),
        "inr ₹ indian_rupee": currency("₹"),
        "krw": currency("₩"),
        "$": currency("$"),
        # dates
        """birth_date birth_date_and_age bda dob birth-date birth-date_and_age death_date death_date_and_age dda death-date
        death-date_and_age start_date start_date_and_age start-date end_date end-date end_date_and_age date dts film_date
        release_date geburtsdatum date_de_naissance date_de_mort release_date_and_age 出生日期 死亡日期 出生日期和年齡 出生日期与年龄
        死亡日期与年龄 死亡日期和年齡 生年月日と年齢 没年齢 launch_date""": date,
        "as_of since 截至": as_of,
        "age age_in_years": age,
        "bd 生卒": chinese_life,
        "circa c. ca.": circa,
        "floruit fl. fl": between("fl. "),
        "reign r.": reign,
        "siècle siecle s-": french_century,
        "b. born": between("b. "),
        "d. died": between("d. "),
        "bce": lambda call: f"{call.at(1)} BCE".strip(),
        "ce": lambda call: f"{call.at(1)} CE".strip(),
        "bc": lambda call: f"{call.at(1)} BC".strip(),
        "ad": lambda call: f"AD {call.at(1)}".strip(),
        # languages
        "langx lang-x": labelled_by_code,
        "zh": chinese,
        "nihongo japanese_name": nihongo,
        "nihongo3": nihongo_romaji_first,
        "japonais": nihongo,
        "korean": korean,
        "ruby ruby-ja ruby-zh ルビ ふりがな 読み仮名 読み仮名_ruby不使用 furigana": reading,
        # links
        "tsl translink 跨語言": translated_link,
        "ill illm ilh 仮リンク interlanguage_link interlanguage_link_multi ill2 link-interwiki ilm": interlanguage_link,
        "le 绿链 綠連": green_link,
        "нп нп1 нп2 нп3 нп4 нп5 не_переведено не_переведено_2 не_переведено_3 не_переведено_5": not_translated,
        "isbn": between("ISBN "),
        "oeis": between("OEIS: "),
        "us_patent": between("U.S. Patent "),
        "bibleverse bibleref bibleverse-lb bibleref2": lambda call: f"{call.at(1)} {call.at(2)}".strip(),
        "unichar": character,
        "url": argument(2, 1),
        "harvtxt harvard_citation_text harvcoltxt citet": author_year,
        "sortname": lambda call: f"{call.at(1)} {call.at(2)}".strip(),
        "marriage": FIRST,
        "ship": named_ship,
        "hms uss hmas hmcs ins ss rms mv usns hmnzs sms": ship,
        "sclass sclass2": lambda call: f"{call.at(1)}-class {call.at(2)}",
        "comment": FIRST,
        # blocks
        """quote blockquote bquote cquote quotation quotation2 quote2 cite_quote pull_quote rquote poemquote quoteblock verse
        centered_pull_quote cita cita_larga zitat zitat-en цитата начало_цитаты citation_bloc цитат 引用
        格言 引文""": quotation,
        "citation": french_or_english_citation,
        "ubl unbulleted_list ublist ubt bulleted_list blist ordered_list unordered_list numbered_list olist": lines,
        "hlist": dotted,
        """plainlist flatlist columns-list columns_list columns multi-column_list colonnes poem indented_plainlist
        多列 unindent""": block,
        # variables and functions
        "pagename fullpagename basepagename pagenamee seitenname subpagename": lambda call: call.title,
        "!!": constant("||"),
        "lc": lambda call: call.at(1).lower(),
        "uc": lambda call: call.at(1).upper(),
        "lcfirst": lambda call: call.at(1)[:1].lower() + call.at(1)[1:],
        "ucfirst": lambda call: call.at(1)[:1].upper() + call.at(1)[1:],
    }
)
# What a name with a space or a quote in it would break up above.
RENDERERS |= {"' \"": constant("' \""), "\" '": constant("\" '"), '"': between("„", "“"), "no.": between("No. ")}

PREFIXES: tuple[tuple[str, Callable[[Call], str | None]], ...] = (
    ("lang-", labelled),
    ("link-", interlanguage_link),
    ("script/", FIRST),
)
