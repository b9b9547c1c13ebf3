r"""The answer that a response gives, and whether two answers are plainly the same.

Of a response the part after the last `</think>` counts. The answer is what stands in the last `\boxed{...}` or
`<answer>...</answer>`. Without one it is, of a response that ended by itself, the last number, or the whole text if the
task's answers are no numbers; a response that was cut off has none then.
"""

import re
from fractions import Fraction

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_NUMBER = re.compile(r"(?:(?<![\w.)])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?")
_PLAIN_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:/\d+)?|[-+]?\.\d+")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_NOISE = re.compile(
    r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;: ]|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\?[$%]|~"
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def extract_answer(response: str, *, complete: bool, numbers: bool = True) -> str | None:
    """The answer of a response, None if it gives none. `complete`: it was not cut off; `numbers`: answers are such."""
    text = response.rpartition("</think>")[2]
    tags = [(match.start(), match.group(1)) for match in _TAG.finditer(text)]
    explicit = max([*tags, *_boxed(text)], default=None)
    if explicit is not None:
        return explicit[1].strip() or None
    if not complete:
        return None
    if not numbers:
        return text.strip() or None
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def _boxed(text: str) -> list[tuple[int, str]]:
    r"""Where every `\boxed{...}` with balanced braces begins, and what it holds."""
    found = []
    for match in _BOXED.finditer(text):
        depth = 1
        for position in range(match.end(), len(text)):
            escaped = text[position - 1] == "\\"
            depth += {"{": 1, "}": -1}.get(text[position], 0) * (not escaped)
            if depth == 0:
                found.append((match.start(), text[match.end() : position]))
                break
    return found


def expected_answer(written: str) -> str:
    r"""The answer in a data set's column, which may hold a solution: after `####`, or in the last `\boxed{...}`."""
    marked = written.rpartition("####")[2].strip()
    boxed = _boxed(marked)
    return boxed[-1][1].strip() if boxed else marked


def normalised(answer: str) -> str:
    """An answer without what is only typography: spacing, delimiters of mathematics, units of angle, percent signs."""
    text = answer.strip()
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    text = _TEXT.sub(r"\1", text)
    text = _NOISE.sub("", text).replace("−", "-").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    text = re.sub(r"\s+", "", text).rstrip(".")
    if re.fullmatch(r"\([A-Za-z]\)", text):
        text = text[1]
    whole = _THOUSANDS.sub("", text)
    return whole if _PLAIN_NUMBER.fullmatch(whole) else text


def as_number(answer: str) -> Fraction | None:
    """The number that an answer plainly is: an integer, a decimal or a fraction. None for anything else."""
    text = normalised(answer)
    if not _PLAIN_NUMBER.fullmatch(text) or len(text) > 400:
        return None
    try:
        return Fraction(text.removesuffix("."))
    except (ValueError, ZeroDivisionError):
        return None


def plainly_same(answer: str, expected: str) -> bool | None:
    """Whether two answers are the same, as far as that can be told without mathematics; None where it cannot."""
    if normalised(answer) == normalised(expected):
        return True
    first, second = as_number(answer), as_number(expected)
    return None if first is None or second is None else first == second
