"""What the common inline templates of Wikipedia show: ``{{convert|5|km}}`` is "5 km", ``{{lang|fr|oui}}`` is "oui".

A template's text lives on another page of the wiki, so this is a table of the ones that carry words of the sentence they
stand in. A name that is not in the table, as of an infobox, a citation or a notice, renders as None and is dropped.
"""

import re
from collections.abc import Callable

from etude.corpus.wiki import renderers as show
from etude.corpus.wiki.calls import Call


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


def table(entries: dict[str, Callable[[Call], str | None]]) -> dict[str, Callable[[Call], str | None]]:
    """One entry a name; the keys are lists of names that render alike."""
    return {name.strip().replace("_", " "): render for names, render in entries.items() for name in names.split()}


FIRST, SECOND, THIRD = show.argument(1), show.argument(2), show.argument(3)

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
        lang3""": show.last,
        "transl transliteration translit xlit tlit m+j mention": show.last,
        "linktext": show.joined(" "),
        "font": show.last,
        "sup smallsup superscript su": show.between("^"),
        "keypress key_press key": show.joined("+"),
        "sic": show.sic,
        "angbr angle_bracket angbr_ipa vr": show.between("⟨", "⟩"),
        "gloss literal_gloss": show.between("‘", "’"),
        "lit literal literal_translation literally": show.between("lit. '", "'"),
        "trans": show.between("'", "'"),
        # signs
        "! pipe": show.constant("|"),
        "= equals": show.constant("="),
        "( (( )) ) {{ }} !) (! !-": show.constant(""),
        "' apostrophe": show.constant("'"),
        '\'" ""\'': show.constant("'\""),
        "-' '-": show.constant("'"),
        "* bullet": show.constant("•"),
        "snd spnd sndash spaced_ndash spaced_en_dash dash snds": show.constant(" – "),
        "ndash en_dash – nsndns": show.constant("–"),
        "mdash em_dash — mdashb": show.constant("—"),
        "spaced_mdash snmd smd": show.constant(" — "),
        "nbsp space spaces nnbsp thin_space thinsp hair_space hsp 0ws pad en_space em_space": show.constant(" "),
        "· • dot dotsep middot interpunct ·w •w bull": show.constant(" · "),
        "minus −": show.constant("−"),
        "times": show.constant("×"),
        "plusminus +- ±": show.constant("±"),
        "ellipsis ... …": show.constant("…"),
        "pi π": show.constant("π"),
        "degree deg": show.constant("°"),
        "number_sign hash #": show.constant("#"),
        "numero numéro": lambda call: f"No. {call.at(1)}".strip(),
        "n°": lambda call: f"no {call.at(1)}".strip(),
        "br break crlf newline": show.constant("\n"),
        "pb paragraph_break parabr paragraph": show.constant("\n\n"),
        "music": lambda call: {"flat": "♭", "b": "♭", "sharp": "♯", "#": "♯", "natural": "♮"}.get(call.at(1), call.at(1)),
        # numbers and measures
        "convert cvt conv": show.convert,
        "val": show.val,
        "frac sfrac fraction frc bruch mfrac tfrac dfrac xfrac": show.fraction,
        "sqrt radical square_root": show.between("√"),
        "e": show.between("×10^"),
        "10^": show.between("10^"),
        "formatnum num formatnum: nombre number": show.format_number,
        "unité unite nb": show.joined(" "),
        "duration": show.duration,
        "height": show.height,
        "chem nuclide simplenuclide": show.joined(""),
        "us$ usd": show.currency("US$"),
        "a$ aud": show.currency("A$"),
        "c$ cad can$": show.currency("C$"),
        "hk$": show.currency("HK$"),
        "nt$ twd": show.currency("NT$"),
        "£ gbp pound_sterling": show.currency("£"),
        "€ eur euro": show.currency("€"),
        "¥ jpy jp¥ cny cn¥ rmb": show.currency("¥"),
        "inr ₹ indian_rupee": show.currency("₹"),
        "krw": show.currency("₩"),
        "$": show.currency("$"),
        # dates
        """birth_date birth_date_and_age bda dob birth-date birth-date_and_age death_date death_date_and_age dda death-date
        death-date_and_age start_date start_date_and_age start-date end_date end-date end_date_and_age date dts film_date
        release_date geburtsdatum date_de_naissance date_de_mort release_date_and_age 出生日期 死亡日期 出生日期和年齡 出生日期与年龄
        死亡日期与年龄 死亡日期和年齡 生年月日と年齢 没年齢 launch_date""": show.date,
        "as_of since 截至": show.as_of,
        "age age_in_years": show.age,
        "bd 生卒": show.chinese_life,
        "circa c. ca.": show.circa,
        "floruit fl. fl": show.between("fl. "),
        "reign r.": show.reign,
        "siècle siecle s-": show.french_century,
        "b. born": show.between("b. "),
        "d. died": show.between("d. "),
        "bce": lambda call: f"{call.at(1)} BCE".strip(),
        "ce": lambda call: f"{call.at(1)} CE".strip(),
        "bc": lambda call: f"{call.at(1)} BC".strip(),
        "ad": lambda call: f"AD {call.at(1)}".strip(),
        # languages
        "langx lang-x": show.labelled_by_code,
        "zh": show.chinese,
        "nihongo japanese_name": show.nihongo,
        "nihongo3": show.nihongo_romaji_first,
        "japonais": show.nihongo,
        "korean": show.korean,
        "ruby ruby-ja ruby-zh ルビ ふりがな 読み仮名 読み仮名_ruby不使用 furigana": show.reading,
        # links
        "tsl translink 跨語言": show.translated_link,
        "ill illm ilh 仮リンク interlanguage_link interlanguage_link_multi ill2 link-interwiki ilm": show.interlanguage_link,
        "le 绿链 綠連": show.green_link,
        "нп нп1 нп2 нп3 нп4 нп5 не_переведено не_переведено_2 не_переведено_3 не_переведено_5": show.not_translated,
        "isbn": show.between("ISBN "),
        "oeis": show.between("OEIS: "),
        "us_patent": show.between("U.S. Patent "),
        "bibleverse bibleref bibleverse-lb bibleref2": lambda call: f"{call.at(1)} {call.at(2)}".strip(),
        "unichar": show.character,
        "url": show.argument(2, 1),
        "harvtxt harvard_citation_text harvcoltxt citet": show.author_year,
        "sortname": lambda call: f"{call.at(1)} {call.at(2)}".strip(),
        "marriage": FIRST,
        "ship": show.named_ship,
        "hms uss hmas hmcs ins ss rms mv usns hmnzs sms": show.ship,
        "sclass sclass2": lambda call: f"{call.at(1)}-class {call.at(2)}",
        "comment": FIRST,
        # blocks
        """quote blockquote bquote cquote quotation quotation2 quote2 cite_quote pull_quote rquote poemquote quoteblock verse
        centered_pull_quote cita cita_larga zitat zitat-en цитата начало_цитаты citation_bloc цитат 引用
        格言 引文""": show.quotation,
        "citation": show.french_or_english_citation,
        "ubl unbulleted_list ublist ubt bulleted_list blist ordered_list unordered_list numbered_list olist": show.lines,
        "hlist": show.dotted,
        """plainlist flatlist columns-list columns_list columns multi-column_list colonnes poem indented_plainlist
        多列 unindent""": show.block,
        # variables and functions
        "pagename fullpagename basepagename pagenamee seitenname subpagename": lambda call: call.title,
        "!!": show.constant("||"),
        "lc": lambda call: call.at(1).lower(),
        "uc": lambda call: call.at(1).upper(),
        "lcfirst": lambda call: call.at(1)[:1].lower() + call.at(1)[1:],
        "ucfirst": lambda call: call.at(1)[:1].upper() + call.at(1)[1:],
    }
)
# What a name with a space or a quote in it would break up above.
RENDERERS |= {
    "' \"": show.constant("' \""),
    "\" '": show.constant("\" '"),
    '"': show.between("„", "“"),
    "no.": show.between("No. "),
}

PREFIXES: tuple[tuple[str, Callable[[Call], str | None]], ...] = (
    ("lang-", show.labelled),
    ("link-", show.interlanguage_link),
    ("script/", FIRST),
)
