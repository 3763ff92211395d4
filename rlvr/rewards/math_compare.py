"""Two mathematical answers compared as text: cleaned, as exact numbers, part by part. No sympy, no processes.

What is left undecided (two expressions) is collected for the symbolic workers; what might be misread is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARS = 4300  # longer answers are only compared as strings; also Python's limit on converting digits
MAX_PARSED_CHARS = 400  # longer ones do not reach the parser
MAX_DEPTH = 12  # nesting of brackets
MAX_ITEMS = 30  # elements of a list or tuple
MAX_EXPONENT = 4000  # decimal exponent of an exact number

# --- clean ------------------------------------------------------------------------------------------------------------

# Code point by code point: Unicode normalisation would turn the square in "5²" into a digit.
_FOLD = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | {
    0x2212: "-", 0xFE63: "-", 0x00A0: " ", 0x2009: r"\,", 0x202F: r"\,", 0x3000: " ", 0x00D7: r"\times ",
    0x00B7: r"\cdot ", 0x00F7: "/", 0x03C0: r"\pi ", 0x221E: r"\infty ", 0x2264: r"\le ", 0x2265: r"\ge ",
    0x00B0: r"^\circ ", 0x222A: r"\cup ",
}  # fmt: skip
_SPACE = r"\{,\}|,\\!|\\[,!;: ]|~"
_New = str | Callable[[re.Match[str]], str]
_NEW_NOTATION: list[tuple[str, _New]] = [
    (rf"(?<![0-9.,])[0-9]{{1,3}}(?:(?:{_SPACE})[0-9]{{3}})+(?![0-9])", lambda m: re.sub(_SPACE, "", m[0])),
    (r"\\(?:left|right|[bB]ig+[lr]?)(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])|(?<!\\)\\!", ""),
    (r"\\?\$|(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\s+", " "),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
    (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9])(?![0-9])", r"\1{\2}"),
    (r"\\sqrt\s*([0-9])(?![0-9])", r"\\sqrt{\1}"),
    (r"_\s*\{\s*\\(?:text|mathrm)\s*\{\s*([A-Za-z0-9]+)\s*\}\s*\}", r"_{\1}"),
    (r",?\s*\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s(?:and|or)\s", " , "),
    (r"\\lbrace(?![a-zA-Z])", r"\\{"), (r"\\rbrace(?![a-zA-Z])", r"\\}"),
    (r"\\(?:infin|infty)(?![a-zA-Z])", r"\\infty"), (r"\\(leq|geq)(?![a-zA-Z])", lambda m: m[0][:-1]),
]  # fmt: skip
_REWRITES = [(re.compile(pattern), new) for pattern, new in _NEW_NOTATION]
_WRAPS = [re.compile(p, re.DOTALL) for p in (
    r"\$\$?([^$]*)\$\$?", r"\\\(((?:(?!\\[()]).)*)\\\)", r"\\\[((?:(?!\\[\[\]]).)*)\\\]",
    r"\\text\s*\{\s*([0-9.,/]+)\s*\}", r"\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)(?<!\\)\}",
)]  # fmt: skip
_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\[{}\\]|[{}]")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf)\s*\{([^{}\\$]*)\}")
_UNIT = re.compile(r"(?P<body>.*[0-9}).a-zA-Z])\s*(?:\^\s*(?:\\circ|\{\s*\\circ\s*\})|(?P<pct>\\?%)|"
                   r"\\(?:text|mbox)\s*\{(?P<name>[^{}\\$0-9]*)\}(?:\^\{?[23]\}?)?)", re.DOTALL)  # fmt: skip
_NO_UNIT = frozenset(
    (
        "hundred thousand million billion trillion dozen mod base over times plus minus squared cubed half pi factorial "
        "percent per or and if for when is not "
    ).split()
)


def last_box(text: str) -> str | None:
    """Content of the balanced box that ends last, hence the outer one of nested boxes."""
    opened: list[int | None] = []  # where the content of a box starts; None for other braces
    found = None
    for token in _BOX_TOKENS.finditer(text):
        if token[0] == "}":
            if opened and (begin := opened.pop()) is not None:
                found = (begin, token.start())
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append(token.end() if len(token[0]) > 1 else None)
    return text[found[0] : found[1]] if found else None


def clean(text: str) -> str:
    """The same answer in one notation: no wrappers, no spacing commands, no thousands separators, plain ``\\frac``."""
    text = text.translate(_FOLD).strip()
    for _ in range(MAX_DEPTH):
        before = text
        text = text.strip().rstrip(".") if not text.endswith("..") else text.strip()
        for wrap in _WRAPS:
            match = wrap.fullmatch(text)
            text = match[1] if match else text
        box = re.match(r"\\(?:boxed|fbox)\s*\{", text)
        if box and last_box(text) == text[box.end() : -1]:
            text = text[box.end() : -1]
        if text == before:
            break
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text.strip(" €£¥₹")


def split_unit(text: str) -> tuple[str, str]:
    """Body and unit ("" for none). Units are ``\\text``, ``\\mbox``, degree and percent tokens, never bare letters."""
    match = _UNIT.fullmatch(text)
    if match is None:
        return text, ""
    name = match["name"]
    if name is None and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        return text, ""  # an angle in degrees inside a function is not a unit of the whole
    if name is None:
        return match["body"], "%" if match["pct"] else "degree"
    words = re.findall("[a-z]+", name.lower())
    if name.strip() in ("percent", "%"):
        return match["body"], "%"
    if not words or _NO_UNIT & set(words) or (len("".join(words)) == 1 and name.strip() not in "mgshLNJWV"):
        return text, ""
    return match["body"], " ".join(word.rstrip("s") or word for word in words)


def canonical(text: str) -> str:
    """For string equality: spaces go, except where they part letters or digits."""
    return re.sub(r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])", "", text)


# --- exact numbers --------------------------------------------------------------------------------------------------

_N = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_S = r"\s*[-+]?\s*"
_NUMBER = re.compile(
    rf"(?P<sign>{_S})(?:(?P<power>10)\^\{{?(?P<pexp>{_S}[0-9]{{1,5}})\}}?|"
    rf"(?P<num>{_N}|[0-9]{{1,3}}(?:,[0-9]{{3}})+(?:\.[0-9]*)?)"
    rf"(?:\s*(?:[eE]|(?:\\times|\\cdot|\*)\s*10\s*\^)\s*(?:\{{(?P<exp1>{_S}[0-9]{{1,5}})\s*\}}|(?P<exp2>[-+]?[0-9]{{1,5}})))?|"
    rf"(?P<whole>[0-9]+)?\s*\\frac\s*\{{(?P<top>{_S}{_N})\s*\}}\s*\{{(?P<bottom>{_S}{_N})\s*\}}|"
    rf"(?:(?P<whole2>[0-9]+)\s+)?(?P<top2>{_N})\s*/\s*(?P<bottom2>{_S}{_N})|"
    r"(?P<head>[0-9]*)\.(?P<fixed>[0-9]*)\\overline\s*\{(?P<repeat>[0-9]+)\})"
)


def rational(text: str) -> Fraction | None:
    """An integer, decimal, fraction, mixed number, scientific or repeating decimal as an exact number, else None."""
    if len(text) > MAX_CHARS or (match := _NUMBER.fullmatch(text)) is None:
        return None
    part = {name: re.sub(r"[\s,]", "", value) for name, value in match.groupdict().items() if value is not None}
    if "power" in part or "num" in part:
        exponent = int(part.get("pexp") or part.get("exp1") or part.get("exp2") or 0)
        if abs(exponent) > MAX_EXPONENT:
            return None
        value = Fraction(part.get("num", "1")) * Fraction(10) ** exponent
    elif "repeat" in part:
        scale, repeat = 10 ** len(part["fixed"]), part["repeat"]
        value = (int(part["head"] + part["fixed"] or 0) + Fraction(int(repeat), 10 ** len(repeat) - 1)) / scale
    else:
        top, bottom = Fraction(part.get("top") or part["top2"]), Fraction(part.get("bottom") or part["bottom2"])
        whole = part.get("whole") or part.get("whole2")
        if bottom == 0 or (whole is not None and (top < 0 or bottom < 0)):
            return None
        value = int(whole or 0) + top / bottom
    return -value if "-" in part["sign"] else value


# --- structure ------------------------------------------------------------------------------------------------------

Pair = tuple[str, str]  # (answer, gold), both cleaned and without structure: for the workers
Known = dict[Pair, tuple[bool, str]]  # what the workers said
Word = tuple[bool | None, str]  # equal, wrong or (None) up to the workers; why

_BRACKETS = re.compile(r"\\[{}]|[()\[\]{}]|,|;|\\cup(?![a-zA-Z])|\\.", re.DOTALL)
_LEFT_SIDE = re.compile(r"\s*(\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?(?:\([a-z](?:,\s*[a-z])*\))?)\s*=\s*([^=<>]+)", re.ASCII)
_FUNCTIONS = ("sqrt sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp frac binom ").split()
_COMMANDS = frozenset(
    (
        "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi varphi chi "
        "psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega hbar ell times cdot div infty le ge lt gt ne neq begin "
        "end mathbb setminus emptyset lceil rceil lfloor rfloor "
    ).split()
) | frozenset(_FUNCTIONS)
_MISREAD = [(re.compile(pattern), why) for pattern, why in [
    (r"[^\x20-\x7e]", "a character outside the parser's alphabet"),
    (r"^\[.*\]$", "a single value in square brackets"),
    (r"[0-9)}\]]\s*_", "a subscript on a number"),  # the parser drops number bases
    (r"[0-9]\s+[0-9.]|\.\s*[0-9]*\s*\.", "numbers side by side"),  # read as mixed numbers
    (r"['\"%#@`?:;]|\\[^a-zA-Z\\{}]", "a sign the parser drops"),
    (r"(?<![0-9.])(?=[0-9.]{15})[0-9]*\.", "a decimal of too many digits"),
    (r"[0-9]\.?[eE][-+]?[0-9]", "scientific notation inside an expression"),
    (r"\^\s*\{?\s*[-+]?\s*[0-9]{4}", "an exponent out of bounds"),
    (r"\^\s*(?:\{[^{}a-zA-Z]*|[0-9]\s*)\^|(?:\^\s*\{[^{}]*){2}\^", "stacked exponents"),
    (r"[0-9]{4}\s*!|[)}!]\s*!", "a factorial out of bounds"),
    (r"\\binom\s*\{\s*[0-9]{4}", "a binomial out of bounds"),
    (r"[0-9]\s*\\frac\s*\{\s*[0-9]+\s*\}\s*\{\s*[0-9]+\s*\}|\\sqrt\s*[0-9]|\\frac\s*[^\s{]", "ambiguous notation"),
]]  # fmt: skip
_MATRIX = re.compile(r"\\(?:begin|end)\s*\{[pb]matrix\}")
_NAME = re.compile(rf"(?<![\\A-Za-z])(?!(?:{'|'.join(_FUNCTIONS)})(?![A-Za-z]))[A-Za-z]{{4,}}")


def split(text: str, separators: tuple[str, ...]) -> list[str] | None:
    """Parts of ``text`` between separators outside all brackets; None when the brackets do not nest."""
    parts, start, stack = [], 0, 0
    for token in _BRACKETS.finditer(text):
        mark = token[0].lstrip("\\") if token[0] in (r"\{", r"\}") else token[0]
        if mark in ("(", "[", "{"):
            stack += 1
        elif mark in (")", "]", "}"):
            stack -= 1
        elif stack == 0 and mark in separators:
            parts.append(text[start : token.start()])
            start = token.end()
        if not 0 <= stack <= MAX_DEPTH:
            return None
    return [part.strip() for part in [*parts, text[start:]]] if stack == 0 else None


def same(answer: str, gold: str, known: Known, ask: list[Pair]) -> Word:
    """Compare two cleaned answers part by part; what the workers decide is read from ``known`` or put in ``ask``."""
    if answer and canonical(answer) == canonical(gold):
        return True, "equal as strings"
    if (word := _same_text(answer, gold)) is not None:
        return word
    sides = [_LEFT_SIDE.fullmatch(text) for text in (answer, gold)]
    if (
        "=" not in answer
        or "=" not in gold
        or (sides[0] is not None and sides[1] is not None and canonical(sides[0][1]) == canonical(sides[1][1]))
    ):
        answer, gold = (side[2].strip() if side else text for side, text in zip(sides, (answer, gold), strict=True))
    (answer, answer_unit), (gold, gold_unit) = split_unit(answer), split_unit(gold)
    if answer_unit and gold_unit and answer_unit != gold_unit:
        return False, f"units differ: {answer_unit}, {gold_unit}"
    a, g = rational(answer), rational(gold)
    if a is not None and g is not None:
        return a == g, "equal as exact rationals" if a == g else "different as exact rationals"
    for separators in ((",", ";"), (r"\cup",)):
        left, right = _items(answer, separators), _items(gold, separators)
        if left is None or right is None:
            return False, "brackets do not nest"
        if len(left) > 1 or len(right) > 1:
            names = {match[1] for item in right if (match := _LEFT_SIDE.fullmatch(item))}
            return _same_items(left, right, len(names) > 1, known, ask)
        answer, gold = left[0], right[0]
    groups = [_group(text) for text in (answer, gold)]
    if any(group and len(group[1]) > 1 for group in groups):
        if not all(groups) or groups[0][::2] != groups[1][::2]:  # type: ignore[index]
            return False, "brackets differ"
        return _same_items(groups[0][1], groups[1][1], True, known, ask)  # type: ignore[index]
    if any(group and group[0] == "(" for group in groups):
        bare = [group[1][0] if group and group[0] == "(" else text for group, text in zip(groups, (answer, gold))]  # noqa: B905
        return same(bare[0], bare[1], known, ask)
    if answer and canonical(answer) == canonical(gold):
        return True, "equal as strings"
    for side, text in (("gold", gold), ("answer", answer)):
        if why := _refusal(text):
            return False, f"different as strings, and the {side} is not parsed: {why}"
    if (answer, gold) not in known:
        ask.append((answer, gold))
    return known.get((answer, gold), (None, "up to the symbolic comparison"))


def _same_text(answer: str, gold: str) -> Word | None:
    """Words and choices; None when neither side is text. Letters are never multiplied: "east" is not "seat"."""
    wrapped = [_TEXT.fullmatch(text) for text in (answer, gold)]
    if any(match and re.search("[A-Za-z]", match[1]) for match in wrapped):
        plain = [match[1] if match else text for match, text in zip(wrapped, (answer, gold), strict=True)]
    elif all(re.fullmatch(r"[A-Za-z][a-z]{3,}(?: [a-z]+)*", text) for text in (answer, gold)):
        plain = [answer, gold]
    else:
        return None
    plain = [re.sub(r"\(([A-Za-z])\)", r"\1", " ".join(text.split()).rstrip(".")) for text in plain]
    equal = plain[0] == plain[1] or (len(plain[0]) > 1 and plain[0].casefold() == plain[1].casefold())
    return equal, "equal as text" if equal else "different as text"


def _items(text: str, separators: tuple[str, ...]) -> list[str] | None:
    """Elements of a list: a set loses its braces, "a \\pm b" becomes two, a number keeps its commas."""
    if rational(text) is not None:
        return [text]
    group = _group(text)
    parts = group[1] if group and group[0] == r"\{" else split(text, separators)
    if parts is None:
        return None
    pm = re.compile(r"\\pm(?![a-zA-Z])")
    return [pm.sub(sign, part) for part in parts for sign in ("+-" if len(pm.findall(part)) == 1 else "+")
            ] if all(len(pm.findall(part)) < 2 for part in parts) else parts  # fmt: skip


def _group(text: str) -> tuple[str, list[str], str] | None:
    """(opening bracket, elements, closing bracket) of a tuple, interval or set that is the whole text."""
    match = re.fullmatch(r"(\(|\[|\\\{)(.*)(\)|\]|\\\})", text, re.DOTALL)
    parts = split(match[2], (",", ";")) if match else None
    return (match[1], parts, match[3]) if match and parts else None


def _same_items(answer: list[str], gold: list[str], ordered: bool, known: Known, ask: list[Pair]) -> Word:
    """Element by element; unordered: as multisets."""
    if len(answer) != len(gold) or len(gold) > MAX_ITEMS:
        return False, f"{len(answer)} elements against {len(gold)}"
    left, pending = dict(enumerate(answer)), []
    for place, g in enumerate(gold):
        found: list[tuple[int, list[Pair], bool | None]] = []
        for i in [place] if ordered else list(left):
            wanted: list[Pair] = []
            found.append((i, wanted, same(left[i], g, known, wanted)[0]))
        certain = [i for i, _, equal in found if equal]
        if certain:
            del left[certain[0]]
        elif any(equal is None for _, _, equal in found):
            pending += [pair for _, wanted, equal in found if equal is None for pair in wanted]
        else:
            return False, f"no element equals {g[:40]!r}"
    ask += pending
    return (None, "up to the symbolic comparison") if pending else (True, "equal element by element")


def _refusal(text: str) -> str | None:
    """Why the parser must not see this text: it would take long, or read something else than what is written."""
    if not text or len(text) > MAX_PARSED_CHARS:
        return "empty" if not text else f"over {MAX_PARSED_CHARS} characters"
    bare = _MATRIX.sub(" ", text).replace("\\\\", ",") if _MATRIX.search(text) else text
    unknown = set(re.findall(r"\\([a-zA-Z]+)", bare)) - _COMMANDS
    if unknown:
        return f"\\{min(unknown)} is not in the list of commands read reliably"
    if bare == text and "&" in text:
        return "a sign the parser drops"
    for pattern, why in _MISREAD:
        if pattern.search(bare):
            return why
    return "a word" if _NAME.search(bare) else None
