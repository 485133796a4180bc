"""Texts on which tokenizers go wrong: scripts, emoji, combining marks, white space, digits, code, and random mixtures of them.

In: texts of special tokens, which are mixed in. Out: strings. Equal seeds give equal strings.
"""

# ruff: noqa: RUF001 - characters that look like others are the point

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

FIXED = (
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "a",
    " a",
    "a ",
    "  two   spaces,  then 42 and\ta tab\r\n\n\nend ",
    "Hello world! 123 1234567890 3.14159 1,000,000 0x7f 1e-5",
    "I'll we've IT'S they'RE you'D 'm don't 'twas rock'n'roll ''quotes''",
    "CamelCaseWords and snake_case_names, SCREAMING_CASE, kebab-case; HTTPServer2 iPhone15Pro",
    "def f(x: int) -> str:\n    if x >= 10:\n        return f'{x!r}'\n\n\treturn None  # done\n",
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; }\n\n\n\n}\n",
    "<table><tr><td>1</td></tr></table> &amp; <b>bold</b>",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\temp\\new",
    "Café déjà vu, naïve façade — “quotes” … «guillemets» ‘single’",
    "e\u0301 a\u0308 n\u0303 o\u0302\u0323 are decomposed, \u00e9 \u00e4 \u00f1 \u1ed9 are not",
    "\ufb01 \u2460 \u00bd \u2167 \u00b2 \uff21\uff22\uff23 \uff11\uff12\uff13 have compatibility forms",
    "日本語のテキスト、中文文本，한국어 텍스트 — 漢字かな交じり文",
    "\u1112\u1161\u11ab\u1100\u116e\u11a8 decomposed Hangul, \ufa0e\ufa1f compatibility ideographs",
    "Русский текст, ქართული, Ελληνικά, עברית, العربية, हिन्दी, ไทย, አማርኛ",
    "כ\u05b0\u05bc\u05ea\u05b4\u05d9\u05d1 and م\u064f\u062d\u064e\u0645\u0651\u064e\u062f with points, क\u094dष ligature",
    "🦙👩\u200d👩\u200d👧 🏳️\u200d🌈 👍🏽 🇩🇪🇯🇵 1\ufe0f\u20e3 ☃ ☃\ufe0f",
    "١٢٣ ०१२ ੧੨ 𝟙𝟚𝟛 ½ ⅷ ٣٫١٤ 12345678901234567890",
    "zero\u200bwidth \u200e\u200f marks \u00ad soft\u00adhyphen \ufeff bom \u2060 joiner",
    "no\u00a0break em\u2003space line\u2028sep par\u2029sep \u3000 ideographic \x0b\x0c \x85 \x1c\x1d",
    "control \x00 \x01 \x1b[0m \x7f bytes",
    "private \ue000 \uf8ff \U000f0000 and unassigned \u0378 \U000e0fff, last \U0010ffff, replacement \ufffd",
    "\u2581 the\u2581space \u2581\u2581 of SentencePiece \u0120 \u010a and of GPT-2",
    "Ċ Ġ ĉ <0x0A> <0xE2> <unk0> [UNK] ▁▁▁",
    "x" * 300,
    "ab" * 200,
    " " * 70 + "indented" + "\n" * 40 + "\t" * 35 + "end",
    "a\n b\n  c\n   d \n  \n e  \n\n   f",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň. Đây là tiếng Việt. İstanbul'da ığdır",
    "ǅ ǆ Ǆ ʰ ˈ ᵃ ª º ﬁ ß ẞ ſ K Å Ω",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α∧¬β → ∑ᵢ xᵢ² ≤ √2·π; €5, £3, ¥100, 50%",
    "$$E = mc^2$$ \\begin{align} \\frac{a}{b} \\end{align} ~~~ ``` *** --- +++ ___ !!! ??? ...",
    "|a|b|c|\n|-|-|-|\n| 1 | 2 | 3 |\n\n- [x] item\n  - sub\n",
)

_PARTS = (
    *(
        "the",
        "The",
        " the",
        "ing",
        " of",
        "'s",
        "'LL",
        "I've",
        "x1",
        "HTTP",
        "camelCase",
        "_",
        "__init__",
        "été",
        "naïve",
    ),
    *("1", "12", "123", "1234", "0", "٣", "½", "3.5", "१२"),
    *(
        " ",
        "  ",
        "   ",
        "    ",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\t",
        "\t\t",
        " \n",
        "\n ",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x85",
    ),
    *("日本", "語", "中文", "한국", "Рус", "ский", "עב", "العر", "हि", "न्दी", "ไทย", "ß", "ſ", "ǅ", "ʰ"),
    *("🦙", "👩\u200d👧", "👍🏽", "🇩🇪", "\ufe0f", "\u0301", "\u0308", "\u0323", "\u200d", "\ufeff", "\u00ad"),
    *(
        ".",
        ",",
        "...",
        "!",
        "?!",
        "(",
        ")",
        "{}",
        "=>",
        "//",
        "/*",
        "\\n",
        '"',
        "'",
        "`",
        "<",
        ">",
        "</",
        "$",
        "€",
        "~",
        "^",
    ),
    *("\u2581", "\u0120", "\x00", "\x7f", "\ue000", "\U0010ffff", "\ufffd", "<0x41>"),
)


def random_texts(count: int, special: Sequence[str] = (), seed: int = 0) -> list[str]:
    """Strings of up to 40 parts, one in ten of which is a special token, if there are any."""
    draw = random.Random(seed)
    out = []
    for _ in range(count):
        parts = draw.choices(_PARTS, k=draw.randint(1, 40))
        for at in range(len(parts)):
            if special and draw.random() < 0.1:
                parts[at] = draw.choice(special)
            elif draw.random() < 0.05:
                parts[at] = _any_character(draw)
        out.append("".join(parts))
    return out


def _any_character(draw: random.Random) -> str:
    """A code point of the first planes, surrogates left out."""
    number = draw.choice((draw.randrange(0x20, 0x250), draw.randrange(0x250, 0xD800), draw.randrange(0xE000, 0x1FB00)))
    return chr(number)


def hard_texts(special: Sequence[str] = (), count: int = 400, seed: int = 0) -> list[str]:
    """The fixed ones, the special tokens with and without neighbours, and `count` random ones."""
    around = [text for token in special for text in (token, f"a{token}b", f" {token} ", f"{token}{token}\n{token} x")]
    return [*FIXED, *around, *random_texts(count, special, seed)]


def training_lines() -> list[str]:
    """Text to train a small tokenizer on: this project's documentation and the texts above."""
    root = Path(__file__).resolve().parents[2]
    lines = [line for path in sorted((root / "docs").glob("*.md")) for line in path.read_text().splitlines()]
    return [*lines, *(line for text in FIXED for line in text.split("\n"))]
