"""Names that wikis give to things, in the languages with the largest Wikipedias: namespaces, sections, templates.

A dump's siteinfo names its own namespaces; these tables add the aliases that pages use besides, and what siteinfo does
not hold. All names are casefolded.
"""


def _words(text: str) -> frozenset[str]:
    """The names in ``text``, set apart by white space; an underscore in a name is a space."""
    return frozenset(name.replace("_", " ") for name in text.split())


def _names(text: str) -> frozenset[str]:
    """The names in ``text``, set apart by commas and line ends."""
    return frozenset(name.strip() for line in text.splitlines() for name in line.split(",") if name.strip())


# File and image links are dropped, with their captions.
FILE_NAMESPACES = _words(
    """file image archivo imagen fichier datei bild immagine ficheiro imagem arquivo bestand afbeelding plik grafika
    fil billede tiedosto kuva fájl kép soubor fișier fişier imagine dosya resim berkas gambar tập_tin hình tệp датотека слика
    файл картинка изображение зображення выява αρχείο εικόνα dosiero fitxer imatge fitxategi irudi slika datoteka súbor obrázok
    ملف صورة پرونده تصویر קובץ תמונה चित्र চিত্র படிமம் ไฟล์ ภาพ 파일 그림 文件 檔案 档案 图像 圖像 图片 圖片 ファイル 画像
    ֆայլ պատկեր ფაილი сүрет vaizdas attēls pilt fail skrá mynd íomhá delwedd skeudenn"""
)
CATEGORY_NAMESPACES = _words(
    """category categoría catégorie kategorie categoria categorie kategoria kategori luokka kategória категория категорија
    категорія катэгорыя κατηγορία kategorio kategorija kategoria thể_loại หมวดหมู่ 분류 分类 分類 カテゴリ تصنيف رده קטגוריה श्रेणी
    বিষয়শ্রেণী பகுப்பு կատեգորիա კატეგორია санат kategorie flokkur catagóir categori rummad"""
)

# [[fr:Titre]] is a link to the same page in another language, which a reader sees outside the text.
LANGUAGE_PREFIXES = _words(
    """aa ab ace ady af ak als alt am ami an ang ar arc ary arz as ast atj av avk awa ay az azb ba ban bar bat-smg bcl be
    be-tarask be-x-old bg bh bi bjn blk bm bn bo bpy br bs bug bxr ca cbk-zam cdo ce ceb ch chr chy ckb co cr crh cs csb cu cv
    cy da dag de din diq dsb dty dv dz ee el eml en eo es et eu ext fa ff fi fiu-vro fj fo fr frp frr fur fy ga gag gan gcr gd
    gl glk gn gom gor got gu guc gur gv ha hak haw he hi hif hr hsb ht hu hy hyw ia id ie ig ik ilo inh io is it iu ja jam jbo
    jv ka kaa kab kbd kbp kcg kg ki kk kl km kn ko koi krc ks ksh ku kv kw ky la lad lb lbe lez lfn lg li lij lld lmo ln lo lt
    ltg lv mad mai map-bms mdf mg mhr mi min mk ml mn mni mnw mr mrj ms mt mwl my myv mzn nah nap nds nds-nl ne new nia nl nn
    no nov nqo nrm nso nv ny oc olo om or os pa pag pam pap pcd pcm pdc pfl pi pih pl pms pnb pnt ps pt pwn qu rm rmy rn ro
    roa-rup roa-tara ru rue rw sa sah sat sc scn sco sd se sg sh shi shn si simple sk skr sl sm smn sn so sq sr srn ss st stq
    su sv sw szl szy ta tay tcy te tet tg th ti tk tl tn to tpi tr trv ts tt tum tw ty tyv udm ug uk ur uz ve vec vep vi vls
    vo wa war wo wuu xal xh xmf yi yo za zea zh zh-classical zh-min-nan zh-yue zu"""
)
# [[wikt:word]] stands in the text; what it shows is the part behind the prefix.
PROJECT_PREFIXES = _words(
    """w wikt wiktionary b wikibooks q wikiquote s wikisource n wikinews v wikiversity voy wikivoyage m meta metawikimedia
    d wikidata c commons species wikispecies mw mediawikiwiki f foundation phab bugzilla gerrit toollabs tools"""
)

SECTIONS = _names(
    """
    references, reference, external links, external link, see also, further reading, notes, notes and references, bibliography
    references and notes, sources, footnotes, citations, works cited, notes and citations, references and sources
    sources and references, external sources, general references, cited sources, cited works, notes and sources, explanatory notes
    selected bibliography, additional reading, related pages, other websites, references and further reading, footnotes and references
    further reading and references, bibliography and further reading, further reading and external links, in-line notes and references
    参考文献, 參考文獻, 参考资料, 參考資料, 参考来源, 參考來源, 参考, 參考, 参考书目, 參考書目, 参考文献与注释, 注释, 註釋, 注釋, 注释与参考文献
    脚注, 腳註, 脚註, 腳注, 注脚, 註腳, 备注, 備註, 注, 註, 资料来源, 資料來源, 来源, 來源, 引用, 引注, 出处, 出處, 注解, 註解, 参考注释, 文献, 文獻
    外部链接, 外部連結, 外部連接, 外部连接, 外部链结, 外部鏈接, 外部鏈結, 参见, 參見, 参看, 參看, 参阅, 參閱, 相关条目, 相關條目, 另见, 另見
    延伸阅读, 延伸閱讀, 扩展阅读, 擴展閱讀, 进一步阅读, 進一步閱讀, 深入阅读, 深入閱讀, 相关链接, 相關連結, 相关页面, 相關頁面
    关联项目, 關聯項目, 関連項目, 外部リンク, 出典, 注釈, 関連文献, 関連書籍, 関連人物, 脚注・出典, 参考資料, 注釈・出典
    einzelnachweise, weblinks, siehe auch, literatur, quellen, anmerkungen, fußnoten, belege, nachweise, anmerkungen und einzelnachweise
    références, voir aussi, liens externes, lien externe, notes et références, bibliographie, articles connexes, sources et références
    annexes, notes, lien web, liens web, pour approfondir
    referencias, véase también, enlaces externos, bibliografía, notas, notas y referencias, fuentes, lecturas adicionales
    note, collegamenti esterni, voci correlate, altri progetti, bibliografia, riferimenti, annotazioni, fonti, esplicative
    referências, ver também, ligações externas, bibliografia, notas e referências, leitura adicional, notas de rodapé, fontes
    примечания, ссылки, литература, см. также, источники, библиография, сноски, комментарии и примечания, дополнительная литература
    примітки, посилання, література, див. також, джерела, виноски
    бележки, външни препратки, източници, вижте също, литература, бележки и източници, използвана литература, препратки, виж още
    външни връзки, допълнителна литература, бележки под линия
    przypisy, linki zewnętrzne, zobacz też, bibliografia, uwagi, źródła, literatura
    referenties, externe links, externe link, zie ook, bronnen, bronnen, noten en/of referenties, voetnoten, literatuur
    referenser, externa länkar, se även, källor, noter, litteratur, fotnoter, vidare läsning
    referanser, eksterne lenker, se også, kilder, referencer, eksterne henvisninger, henvisninger, litteratur, eksterne links
    lähteet, aiheesta muualla, katso myös, viitteet, kirjallisuutta, viitteet ja lähteet
    reference, externí odkazy, související články, poznámky, literatura, odkazy, externé odkazy, pozri aj, iné projekty
    források, jegyzetek, további információk, kapcsolódó szócikkek, külső hivatkozások, lásd még, irodalom
    kaynakça, dış bağlantılar, ayrıca bakınız, notlar, konuyla ilgili yayınlar, referanslar
    tham khảo, liên kết ngoài, xem thêm, chú thích, đọc thêm, ghi chú, nguồn
    referensi, pranala luar, lihat pula, lihat juga, catatan, catatan kaki, bacaan lanjutan, daftar pustaka, rujukan, pautan luar
    각주, 외부 링크, 같이 보기, 참고 문헌, 참고 자료, 참고문헌, 주석, 출처, 주해, 더 읽어보기, 바깥 고리
    المراجع, مراجع, وصلات خارجية, روابط خارجية, انظر أيضًا, انظر أيضا, المصادر, مصادر, هوامش, ملاحظات
    منابع, پیوند به بیرون, جستارهای وابسته, پانویس, یادداشت‌ها, برای مطالعهٔ بیشتر
    הערות שוליים, קישורים חיצוניים, ראו גם, לקריאה נוספת, ביאורים
    παραπομπές, εξωτερικοί σύνδεσμοι, δείτε επίσης, βιβλιογραφία, πηγές, σημειώσεις
    legături externe, vezi și, bibliografie, note bibliografice, referințe
    спољашње везе, види још, референце, референци, напомене, надворешни врски, поврзано, наводи
    enllaços externs, vegeu també, referències, bibliografia, notes
    อ้างอิง, แหล่งข้อมูลอื่น, ดูเพิ่ม, เชิงอรรถ, सन्दर्भ, बाहरी कड़ियाँ, इन्हें भी देखें
    """
)

# Of those, the names that below the second level head prose, as on the literature of a country.
SUBJECTS = _names(
    "literatur, literatura, literatuur, litteratur, литература, література, irodalom, kirjallisuutta, sources, fuentes, bronnen"
)

DISAMBIGUATION_TEMPLATES = _names(
    """
    disambig, disambiguation, disambiguation page, dab, disamb, hndis, geodis, human name disambiguation, place name disambiguation
    letter disambiguation, letter-number combination disambiguation, mathematical disambiguation, airport disambiguation, schooldis
    number disambiguation, school disambiguation, hospital disambiguation, callsigndis, letter-numbercombdisambig, mathdab, numberdis
    disambig-cleanup, disambiguation cleanup, road disambiguation, roaddis, species latin name disambiguation, hndis-cleanup, geodis-cleanup
    genus disambiguation, taxonomy disambiguation, chinese title disambig, biology disambiguation, disamb-term, music disambiguation
    消歧义, 消歧義, 消歧义页, 消歧義頁, 消歧, 歧义, 歧義, 人名消歧义, 人名消歧義, 地名消歧义, 地名消歧義, 多義, 多义, 车站消歧义, 道路消歧义
    學校消歧義, 学校消歧义, 字母数字消歧义, 数字消歧义, 曖昧さ回避, aimai, 人名の曖昧さ回避, 地名の曖昧さ回避, 同名の人物, 同名の作品
    begriffsklärung, homonymie, bandeau homonymie, paronymie, toponymie, patronymie, desambiguación, desambiguacion, des
    disambigua, desambiguação, desambiguacao, desambig, dezambiguizare, dezambig, doorverwijspagina, dp, ujednoznacznienie, disambigr
    неоднозначность, многозначность, неоднозначност, пояснение, пояснителна страница, многозначност, вишезначна одредница, појаснување
    багатозначність, неадназначнасць, förgrening, gren, grensida, namnförgrening, ortnamn, flertydig, peker, pekerside, täsmennyssivu
    rozcestník, rozlišovacia stránka, egyért, egyértelműsítő lap, egyért-redir, anlam ayrımı, anlamayrım, định hướng, trang định hướng
    disambiguasi, disambigasi, nyahkekaburan, 동음이의, 동음이의어 문서, 동명이인, توضيح, صفحة توضيح, ابهام‌زدایی, ابهام زدایی, گنگی‌زدایی
    פירושונים, αποσαφήνιση, desambiguació, argipen, homonimo, razločitev, višeznačna odrednica, razvrstavanje, täpsustus, täpsustuslehekülg
    nuorodinis straipsnis, nuorodinis, nozīmju atdalīšana, मुख्य बहुविकल्पी, बहुविकल्पी शब्द, แก้กำกวม, দ্ব্যর্থতা নিরসন, பக்கவழி நெறிப்படுத்தல்
    """
)

# __NOTOC__ and the like. Their translations are all upper case, or in a script that has no case.
MAGIC_WORDS = _words(
    """TOC NOTOC FORCETOC NOEDITSECTION NEWSECTIONLINK NONEWSECTIONLINK NOGALLERY HIDDENCAT EXPECTUNUSEDCATEGORY INDEX NOINDEX
    NOCONTENTCONVERT NOCC NOTITLECONVERT NOTC STATICREDIRECT DISAMBIG START END NOGLOBAL ARCHIVEDTALK NOTALK EXPECTWITHOUTSCANS
    EXPECTUNUSEDTEMPLATE INHALTSVERZEICHNIS SOMMAIRE AUCUNSOMMAIRE"""
)

REDIRECTS = (
    "redirect|重定向|重新導向|転送|リダイレクト|weiterleitung|redirection|redirección|redireccion|rinvia|redirecionamento|"
    "перенаправление|перенапр|перенаправлення|пренасочване|виж|преусмери|преусмјери|doorverwijzing|patrz|przekieruj|omdirigering|"
    "ohjaus|uudelleenohjaus|přesměruj|presmeruj|átirányítás|yönlendirme|đổi|alih|넘겨주기|تحويل|تغییرمسیر|הפניה|ανακατευθυνση|เปลี่ยนทาง"
)

# ISO 639 code -> (English name, Chinese name): the label that {{lang-la|…}} and {{langx|la|…}} put before the words.
LANGUAGE_NAMES = {
    code: (english, chinese)
    for code, english, chinese in (
        entry.split(":")
        for entry in _words(
            """
        af:Afrikaans:南非语 akk:Akkadian:阿卡德语 am:Amharic:阿姆哈拉语 ang:Old_English:古英语 ar:Arabic:阿拉伯语 arc:Aramaic:亚拉姆语
        az:Azerbaijani:阿塞拜疆语 be:Belarusian:白俄罗斯语 ber:Berber_languages:柏柏尔语 bg:Bulgarian:保加利亚语 bn:Bengali:孟加拉语
        bo:Tibetan:藏语 br:Breton:布列塔尼语 ca:Catalan:加泰罗尼亚语 cop:Coptic:科普特语 cs:Czech:捷克语 cy:Welsh:威尔士语 da:Danish:丹麦语
        de:German:德语 el:Greek:希腊语 en:English:英语 eo:Esperanto:世界语 es:Spanish:西班牙语 et:Estonian:爱沙尼亚语 eu:Basque:巴斯克语
        fa:Persian:波斯语 fi:Finnish:芬兰语 fr:French:法语 fro:Old_French:古法语 ga:Irish:爱尔兰语 gd:Scottish_Gaelic:苏格兰盖尔语
        gl:Galician:加利西亚语 grc:Ancient_Greek:古希腊语 grc-gre:Ancient_Greek:古希腊语 haw:Hawaiian:夏威夷语 he:Hebrew:希伯来语
        hi:Hindi:印地语 hr:Croatian:克罗地亚语 hu:Hungarian:匈牙利语 hy:Armenian:亚美尼亚语 id:Indonesian:印尼语 is:Icelandic:冰岛语
        it:Italian:意大利语 ja:Japanese:日语 ka:Georgian:格鲁吉亚语 kk:Kazakh:哈萨克语 km:Khmer:高棉语 ko:Korean:韩语 ku:Kurdish:库尔德语
        la:Latin:拉丁语 lb:Luxembourgish:卢森堡语 lo:Lao:老挝语 lt:Lithuanian:立陶宛语 lv:Latvian:拉脱维亚语 mi:Māori:毛利语
        mk:Macedonian:马其顿语 mn:Mongolian:蒙古语 ms:Malay:马来语 mt:Maltese:马耳他语 my:Burmese:缅甸语 ne:Nepali:尼泊尔语 nl:Dutch:荷兰语
        no:Norwegian:挪威语 non:Old_Norse:古诺尔斯语 oc:Occitan:奥克语 pl:Polish:波兰语 ps:Pashto:普什图语 pt:Portuguese:葡萄牙语
        ro:Romanian:罗马尼亚语 ru:Russian:俄语 sa:Sanskrit:梵语 sh:Serbo-Croatian:塞尔维亚-克罗地亚语 sk:Slovak:斯洛伐克语 sl:Slovene:斯洛文尼亚语
        sq:Albanian:阿尔巴尼亚语 sr:Serbian:塞尔维亚语 sv:Swedish:瑞典语 sw:Swahili:斯瓦希里语 ta:Tamil:泰米尔语 te:Telugu:泰卢固语 th:Thai:泰语
        tl:Tagalog:他加禄语 tr:Turkish:土耳其语 uk:Ukrainian:乌克兰语 ur:Urdu:乌尔都语 uz:Uzbek:乌兹别克语 vi:Vietnamese:越南语
        yi:Yiddish:意第绪语 zh:Chinese:汉语"""
        )
    )
}
TRADITIONAL_LABELS = str.maketrans(
    "语亚马腊兰罗爱尔乌韩麦纳维缅图汉卢挝达奥盖诺苏简丹荷伦泰济卫",
    "語亞馬臘蘭羅愛爾烏韓麥納維緬圖漢盧撾達奧蓋諾蘇簡丹荷倫泰濟衛",
)

# Chinese variants: what to show when the page has no text for the wanted one, in order.
VARIANT_FALLBACKS = {
    "zh": ("zh-hans", "zh-hant", "zh-cn", "zh-tw", "zh-hk", "zh-sg", "zh-mo", "zh-my"),
    "zh-hans": ("zh-cn", "zh-sg", "zh-my", "zh"),
    "zh-hant": ("zh-tw", "zh-hk", "zh-mo", "zh"),
    "zh-cn": ("zh-hans", "zh-sg", "zh-my", "zh"),
    "zh-sg": ("zh-my", "zh-hans", "zh-cn", "zh"),
    "zh-my": ("zh-sg", "zh-hans", "zh-cn", "zh"),
    "zh-tw": ("zh-hant", "zh-hk", "zh-mo", "zh"),
    "zh-hk": ("zh-mo", "zh-hant", "zh-tw", "zh"),
    "zh-mo": ("zh-hk", "zh-hant", "zh-tw", "zh"),
}
