"""Which language a text is written in, by its letters and its commonest words: no model, no data, the same every time.

Letters tell the languages that have a script of their own; among those in Latin letters the one whose function words
occur most often wins. A text with too few of them (a name, a number, code) has none: ``und``, as in BCP 47.
"""

import re
import unicodedata
from collections import Counter

UNDETERMINED = "und"
SCRIPTS = {
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CJK": "zh",
    "CYRILLIC": "ru",
    "ARABIC": "ar",
    "HEBREW": "he",
    "GREEK": "el",
    "DEVANAGARI": "hi",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
    "ETHIOPIC": "am",
}
"""First word of a letter's Unicode name -> the language most written so (Cyrillic stands for all of its languages)."""
WORDS = {
    "en": "the of and to in is that it for you with not are this be on as i can have but will your from at what so we "
    "i'm don't can't here if or they was an by no do my would",
    "de": "der die das und ist nicht ich zu den mit sie es ein eine dir ihnen auf für von dem dass aber im wir kann "
    "leider bei wie auch sich diese dieser oder hier werde muss du nach gerne",
    "fr": "le la les de des et est ne pas je vous que un une pour dans ce cette avec sur mais au aux du qui nous sont "
    "à en il elle par ou votre voici cela suis désolé bien peux",
    "es": "el la los las de y es no que un una en por para con lo se su del al pero este esta eso como más yo puedo te "
    "siento aquí son muy sus o le me",
    "it": "il lo la gli le di e è non che un una per con del della sono ma mi questo questa come più si nel ho posso "
    "ti anche cosa qui poi al",
    "pt": "o a os as de e é não que um uma em por para com do da no na se mas eu você isso este esta como mais ao seu "
    "sua são posso desculpe aqui",
    "nl": "de het een en is niet ik je dat van te in op met voor maar dit zijn we kan ook er aan als om bij dan of "
    "hier wat naar kunt",
    "pl": "nie i w na z się to jest że do jak ale co po tak za od dla przez mogę czy są tym tego jestem być",
    "tr": "ve bir bu için ile de da ne değil ama çok gibi daha ben sen mi olarak var yok olan",
    "sv": "och att det som en på är av för med den till inte jag om har de ett men vi kan du så här",
    "da": "og jeg ikke det er på af til med kan dig har hvad beklager desværre hjælpe denne",
    "fi": "ja ei että voi mutta olen sinun tämä tässä kanssa anteeksi auttaa pysty valitettavasti",
    "hu": "és nem hogy egy ez sajnálom sajnos tudok segíteni ebben vagy van ezt csak",
    "cs": "že jsem není nemohu mohu vám vás jsou jako pro ale nebo který bohužel omlouvám pomoci",
    "ro": "nu că și să pot cu dar sunt din acest această vă îmi rău ajuta",
    "id": "dan yang tidak saya anda untuk dengan ini itu dari dalam bisa dapat maaf adalah tersebut membantu",
    "vi": "không tôi bạn và là của có thể với cho này được những các một việc xin lỗi giúp",
}
_FUNCTION_WORDS = {language: frozenset(words.split()) for language, words in WORDS.items()}
LAST_LATIN = "\u024f"
"""Of the common Latin letters: those up to it need no look-up."""
LEAST_WORDS = 2
"""Different function words that a text must have to be of a language."""


def language(text: str, sample: int = 600) -> str:
    """A two-letter code, or ``und``; only the first ``sample`` characters count.

    >>> [language(t) for t in ("I will not do it.", "Ich kann das nicht tun.", "не могу", "x = 1")]
    ['en', 'de', 'ru', 'und']
    """
    text = text[:sample].replace("\u2019", "'")
    letters = sum(c.isalpha() for c in text)
    scripts = Counter(SCRIPTS.get(_script(c)) for c in text if c > LAST_LATIN and c.isalpha())
    if scripts["ja"] * 10 > scripts["zh"] and scripts["ja"]:  # kanji are Chinese characters too
        return "ja"
    foreign = [(n, code) for code, n in scripts.items() if code]
    if foreign and max(foreign)[0] * 2 > letters:
        return max(foreign)[1]
    words = set(re.findall(r"[^\W\d_]{2,}(?:'[^\W\d_]+)?|[^\W\d_]", text.lower()))
    counts = Counter(code for word in words for code, known in _FUNCTION_WORDS.items() if word in known)
    # a word of two languages counts for both; of equals the first of the table
    best = max(counts.values(), default=0)
    return (
        next((c for c in _FUNCTION_WORDS if counts[c] == best), UNDETERMINED) if best >= LEAST_WORDS else UNDETERMINED
    )


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]
