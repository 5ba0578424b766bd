"""What a call of a template shows: a function for each kind of templates, from the call to its words.

Which template is of which kind is in the table of :mod:`etude.corpus.wiki.templates`.
"""

from collections.abc import Callable

from etude.corpus.wiki.calls import Call
from etude.corpus.wiki.names import LANGUAGE_NAMES, TRADITIONAL_LABELS

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
