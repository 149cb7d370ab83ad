"""Reading a final answer out of a model's text and grading it: pure functions, text in, `Verdict` out.

    text -> read_answer (after the thought) -> check_aime | check_math | check_choice | check_contains | check_exact

None raises for anything a model can write, and the work is linear in the length of the text. What needs a computer algebra
system asks `verify`, which is `MathWorker.verify` or anything of that shape.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence

from dms_lab.evaluation.math_worker import Result
from dms_lab.evaluation.verdict import Verdict

Verify = Callable[[str, str], Result]

_log = logging.getLogger(__name__)
_LONGEST = 2000  # characters: nothing longer is an answer, and without a box no more of the end is searched

# An escaped pair is skipped, so that \{ and \} do not count; \\boxed is what a box in a JSON string looks like.
_BOX = re.compile(
    r"(?P<open>\\{1,2}(?:boxed|fbox)\s*\{)|\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*(?P<bare>[^\s\\{}$]+)|\\.|[{}]", re.DOTALL
)


def read_answer(text: str, think_end: str | None, think_start: str = "<think>") -> str | None:
    """What follows the last `think_end`, or None if the thought did not end: such a chain is wrong, whatever it holds.

    The last one, because a thought that quotes the token goes on after it; an answer that quotes it loses only its
    beginning. A thought opened again after it (`think_start`) and not closed did not end either. `think_end=None` is a
    model that does not think: all is answer.
    """
    if think_end is not None:
        _, ended, text = text.rpartition(think_end)
        if not ended or think_start in text:
            return None
    return text


def boxed(text: str) -> list[str]:
    """The contents of every `\\boxed{...}`, `\\fbox{...}` and `\\boxed 5`, in the order in which they begin.

    Braces are balanced; a box in a box comes after the one around it; one that is never closed is none. Without braces the
    content ends at a space, a backslash, a brace or a dollar sign.
    """
    return [text[start:end] for _, start, end, _ in _boxes(text)]


def _boxes(text: str) -> list[tuple[int, int, int, int]]:
    """Of each box, where it begins, where its content begins and ends, and where it ends."""
    found, open_braces = [], []
    for part in _BOX.finditer(text):
        if part["bare"]:
            found.append((part.start(), part.start("bare"), part.end(), part.end()))
        elif part["open"]:
            open_braces.append(part)
        elif part[0] == "{":
            open_braces.append(None)
        elif part[0] == "}" and open_braces:
            box = open_braces.pop()
            if box is not None:
                found.append((box.start(), box.end(), part.start(), part.end()))
    return sorted(found)


_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[0-9}])\\(?:text|mbox|mathrm)\{[A-Za-z. /]+\}(?:\^\{?[0-9]\}?)?$")
_REPLACED = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\left(?![a-z])|\\right(?![a-z])|\\(?:displaystyle|limits)(?![a-z])|(?<!\\)\\[,;: ()\[\]$%]|[$%~°]|\s", ""),
        (r"\^\{?\\circ\}?|\\degrees?(?![a-z])", ""),
        ("\N{MINUS SIGN}", "-"),
        (r"\\[dt]frac", r"\\frac"),
        (r"\{,\}", ","),
        (r"[.:;,]+$", ""),
        (r"^[A-Za-z](?:=|\\in(?![a-z]))", ""),
        (r"\\frac([0-9A-Za-z])([0-9A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\frac([0-9A-Za-z])\{", r"\\frac{\1}{"),
        (r"\\frac(\{[^{}]*\})([0-9A-Za-z])", r"\\frac\1{\2}"),
        (r"^(-?)([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),
        (r"\\sqrt([0-9A-Za-z])", r"\\sqrt{\1}"),
        (r"(?<![0-9])\.(?=[0-9])", "0."),
        (r"(\.[0-9]*?)0+(?![0-9])", r"\1"),
        (r"\.(?![0-9])", ""),
    )
]


def normalise(text: str) -> str:
    """An answer in LaTeX without what changes its look alone, so that equal answers mostly become the same text.

    Goes: spaces, dollar, percent and degree signs, `\\left`, `\\right`, `\\text{}` and its like, a unit behind a number,
    punctuation at the end, thousands separators, `x=` before it. `\\dfrac34`, `\\frac34`, `3/4` become `\\frac{3}{4}`;
    `.50` becomes `0.5`, `5.0` becomes `5`.
    """
    text = _UNIT.sub("", re.sub(r"(?<!\\)\\[,;:! ]|\s+", " ", text).strip().rstrip("$. ").replace(" \\", "\\"))
    for _ in range(3):  # \textbf{\text{...}}: no one nests deeper
        text = _WRAPPED.sub(r"\1", text)
    for pattern, by in _REPLACED:
        text = pattern.sub(by, text)
    if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text):
        text = text.replace(",", "")
    return text


_INTEGER = re.compile(r"(?:.*=)?\+?0*([0-9]+)")


def _integer(box: str) -> str | None:
    """A box's whole number without leading zeros; in `m+n=73`, what stands behind the last equals sign."""
    found = _INTEGER.fullmatch(normalise(box))
    return found[1] if found else None


_BETWEEN = re.compile(r"[\s$\\()]*(?:,|(?:,\s*)?(?:\\text\s*\{\s*)?(?:and|or)\b\s*\}?)[\s$\\()]*")


def _listed(text: str) -> list[list[tuple[int, int, int, int]]]:
    """The boxes, those in one list that are listed together: `\\boxed{1}, \\boxed{2} and \\boxed{3}`."""
    lists: list[list[tuple[int, int, int, int]]] = []
    for box in _boxes(text):
        before = lists[-1][-1][3] if lists else box[0]
        if before < box[0] <= before + 40 and _BETWEEN.fullmatch(text, before, box[0]):
            lists[-1].append(box)
        else:
            lists.append([box])
    return lists


def _last(text: str) -> list[str]:
    """The contents of the last box, and of those that it is listed with."""
    return [text[start:end] for _, start, end, _ in next(reversed(_listed(text)), [])]


def _asked(contents: list[str], text: str) -> str:
    """What math-verify reads: one box, since of several in a text it may take the first; without one, the text's end."""
    return f"\\boxed{{{', '.join(map(_cleaned, contents))}}}" if contents else text[-_LONGEST:]


def _cleaned(answer: str) -> str:
    """An answer without percent signs and full stop at its end, which math-verify cannot read in a box."""
    return re.sub(r"(?<!\\right)\.\s*$", "", answer.replace(r"\%", "").replace("%", ""))


def check_aime(text: str, gold: str, verify: Verify | None = None) -> Verdict:
    """Whether the last box is the integer `gold`, 0 to 999; math-verify, where given, has the word if no such integer is.

    Where the two disagree, note and log say so. The answer for a vote is the integer without leading zeros; without one,
    what math-verify read or the box itself, normalised.
    """
    if not re.fullmatch(r"[0-9]{1,3}", gold.strip()):
        raise ValueError(f"gold={gold!r} must be a whole number from 0 to 999, as text")
    if (length := len("".join(contents := _last(text)))) > _LONGEST:
        return Verdict(0.0, None, f"a box of {length} characters")
    integer = _integer(contents[-1]) if contents else None
    is_answer = integer is not None and len(integer) <= 3
    right = is_answer and int(integer) == int(gold)
    reason = "" if is_answer else r"no integer from 0 to 999 in the last \boxed{}"
    written = integer or (normalise(contents[-1]) if contents else None) or None
    if verify is None:
        return Verdict(float(right), written, reason)
    result = verify(gold.strip(), _asked(contents, text))
    answer = integer or result.canonical or written
    notes = [reason, result.note]
    if result.is_right is not None and result.is_right != right:
        notes.append(f"by the integer {_word(right)}, by math-verify {_word(result.is_right)}")
        _log.warning("%s: gold %s, answer %s", notes[-1], gold, answer)
        right = right if is_answer else result.is_right
    return Verdict(float(right), answer, "; ".join(filter(None, notes)))


def _word(right: bool) -> str:
    return "right" if right else "wrong"


def check_math(text: str, gold: str, verify: Verify) -> Verdict:
    """Whether math-verify finds the last box equal to `gold` (several, if they are listed together); without a box, what
    it reads in the end of the text. A time limit or a crash of it scores 0, with a note.

    Percent signs are taken off both, as the benchmark's own graders do, and so is a full stop that ends a box. The answer
    for a vote is a word in small letters, else math-verify's simplified form, else the normalised text.
    """
    if (length := len("".join(contents := _last(text)))) > _LONGEST:
        return Verdict(0.0, None, f"a box of {length} characters")
    result = verify(_cleaned(gold), _asked(contents, text))
    written = ",".join(map(normalise, contents))
    is_word = len(written) > 3 and written.isalpha()
    answer = written.lower() if is_word else result.canonical or written or None
    notes = ["" if contents else r"no \boxed{}", result.note]
    return Verdict(float(result.is_right is True), answer, "; ".join(filter(None, notes)))


# What may stand around a letter, and what may follow a bare one so that it is no word: "A is", "A.", "A - because".
_OPEN = (
    r"(?:[\s*_$(\[{]|\\[(\[]|\\(?:boxed|fbox|text|textbf|textrm|mathrm|mathbf|mathsf|mbox)(?![a-z])|(?:option|choice)\b)*"
)
_CLOSE = r"(?:[*$)\]}]|_+(?!\w)|\\[)\]])"
_AFTER = r"\s*$|[ \t]*\n|[.,:;!](?!\w)|\s+[-–—]\s|\s+(?:is|because|since|as)\b"  # noqa: RUF001
_MORE = rf"[\s*_$)\]}}.]*(?:,|/|&|\+|\band\b|\bor\b){_OPEN}%s(?!\w)(?!\s+(?:is|was|would)\b)"
_NAMED = re.compile(r"\banswer[*_\s]*:(?=(.{0,200}))", re.IGNORECASE | re.DOTALL)
_QUOTED = re.compile(r"[\"']answer[\"']\s*:\s*[\"']([^\"']{0,200})[\"']", re.IGNORECASE)
_SAID = re.compile(r"\b(?:answer|option|choice)\s+(?:is|would\s+be)\b[*_]*:?(?=(.{0,200}))", re.IGNORECASE | re.DOTALL)
_ALONE = re.compile(r"(?<![\w)\\}])\(\s*([A-Z])\s*\)(?![\w(^])")


def check_choice(text: str, gold: str, num_choices: int = 4) -> Verdict:
    """Whether the letter that the text ends up with is `gold`, one of the first `num_choices`; none found is wrong.

    Read in this order of trust, the last of its kind: `Answer: X`, a box, `"answer": "X"`, `answer is X`, and `(X)` that
    stands alone on a line or is the only one in the last line. Two letters (`A and B`), a word or a letter out of range
    are no answer.
    """
    if not 2 <= num_choices <= 26:
        raise ValueError(f"num_choices={num_choices} must be 2 to 26")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:num_choices]
    if len(gold) != 1 or gold not in letters:
        raise ValueError(f"gold={gold!r} must be one of {', '.join(letters)}")
    letter = _letter(text, letters)
    return Verdict(float(letter == gold), letter, "" if letter else "no letter found")


def _letter(text: str, letters: str) -> str | None:
    """The letter that `check_choice` grades."""
    boxes = [(start, min(end, start + 200)) for (_, start, end, _), *others in _listed(text) if not others]
    named, quoted, said = ([found.span(1) for found in how.finditer(text)] for how in (_NAMED, _QUOTED, _SAID))
    for places in (named, boxes, quoted, said):
        for start, end in reversed(places):
            if letter := _leading_letter(text[start:end], letters):
                return letter
    lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(reversed(lines)):
        found = set(_ALONE.findall(line[-_LONGEST:]))
        alone = number == 0 or re.fullmatch(r"[\s*_.(]*\w[\s*_.)]*", line)
        if alone and len(found) == 1 and found <= set(letters):
            return found.pop()
    return None


def _leading_letter(text: str, letters: str) -> str | None:
    """The one letter of `letters` that a text begins with, whatever is wrapped around it."""
    one = f"[{letters}]"
    found = re.match(rf"{_OPEN}(?P<letter>{one})(?:{_CLOSE}+(?![\w^])|(?={_AFTER}))", text, re.IGNORECASE)
    if not found or re.compile(_MORE % one, re.IGNORECASE).match(text, found.end("letter")):
        return None
    return found["letter"].upper()


def check_contains(text: str, expected: Sequence[str]) -> Verdict:
    """The share of `expected` that occurs in the text, capitals or not, also inside a longer word: RULER's rule."""
    if isinstance(expected, str) or not expected:
        raise ValueError(f"expected={expected!r} must be a list of at least one text")
    lower = text.lower()
    found = sum(item.lower() in lower for item in expected)
    return Verdict(found / len(expected), None, "" if found == len(expected) else f"{found} of {len(expected)} found")


def check_exact(text: str, gold: str) -> Verdict:
    """Whether the text is `gold` to the character, spaces included; give it what `read_answer` leaves."""
    return Verdict(float(text == gold), text)


def permute_choices(question: str, correct: str, wrong: Sequence[str], seed: int) -> tuple[list[str], str]:
    """The choices in an order that SHA-256 of seed and question alone decides, and the letter of the correct one.

    The same in every process and on every machine; every order is equally likely. A wrong choice may read like the
    correct one: the letter is that of the correct one still.
    """
    if not 1 <= len(wrong) <= 25:
        raise ValueError(f"{len(wrong)} wrong choices: give 1 to 25")
    number = int.from_bytes(hashlib.sha256(json.dumps([seed, question]).encode()).digest())
    choices, left, order = [correct, *wrong], [*range(len(wrong) + 1)], []
    while left:  # the digits of the number, in base n, n - 1, ..., 1
        number, place = divmod(number, len(left))
        order.append(left.pop(place))
    return [choices[index] for index in order], "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[order.index(0)]
