"""What a judge's answer says, as a number. A reader that is not certain raises `Unreadable`; it never guesses.

Every function here is pure and takes any text. Only ASCII digits are numbers; "4/5", "4,5" and "3 or 4" are none. The
formats are those that the published judges answer in; the functions are ours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tempflow.rewards.geneval2_rules import answer_forms

__all__ = [
    "Unreadable",
    "answer_probability",
    "answered",
    "better",
    "final_score",
    "json_scores",
    "json_verdicts",
    "json_winner",
    "named_scores",
    "pair_scores",
    "tagged_score",
    "yes_share",
]

SLACK = 0.02
"""By how much two shares of a whole may miss it: judges round to two decimals."""

HALVES = 0.05
"""The most probability that may lie on mere beginnings of an answer."""

NUMBER = r"((?:0|[1-9][0-9]{0,3})(?:\.[0-9]{1,6})?)"
MARK = r"[*_`\s]{0,16}"
"""Markdown's marks and blanks, which mean nothing; bounded, so that no answer takes long to search."""

HEAD = r"[ \t>*_#-]*"
"""What a line may begin with: markdown's marks of lists, titles and stress."""


class Unreadable(ValueError):
    """An answer that does not say for certain what was asked."""


# ------------------------------------------------------------------------------------------------------------ scores
def final_score(text: str, low: float, high: float) -> float:
    """x of the last "Final Score: x", which must have a line's rest for itself and lie in [low, high]."""
    at = [found.end() for found in re.finditer(r"final[ \t]+score", text, re.I | re.A)]
    if not at:
        raise Unreadable('no "Final Score: x"')
    rest = text[at[-1] :].partition("\n")[0]
    found = re.fullmatch(rf"{MARK}:{MARK}{NUMBER}{MARK}", rest)
    if found is None:
        raise Unreadable(f"the last final score is {_short(rest)}, not a number")
    return _inside(float(found[1]), low, high)


def named_scores(text: str, names: Sequence[str], low: float, high: float) -> tuple[float, ...]:
    """A line "NAME Score: x", perhaps with a range in brackets before the colon, for each name, just once each."""
    found: list[float] = []
    for name in names:
        lines = re.findall(rf"^{HEAD}{re.escape(name)}[ \t]+score\b(.*)$", text, re.I | re.A | re.M)
        if len(lines) != 1:
            raise Unreadable(f'{len(lines)} lines of "{name} Score"; one is needed')
        value = re.fullmatch(rf"{MARK}(?:\([^()]*\))?{MARK}:{MARK}{NUMBER}{MARK}", lines[0])
        if value is None:
            raise Unreadable(f"{name} Score is {_short(lines[0])}, not a number")
        found.append(_inside(float(value[1]), low, high))
    return tuple(found)


def tagged_score(text: str, low: float, high: float) -> float:
    """n of the one "<Score>n</Score>" after "<Thought>…</Thought>"; a score inside the thought is none."""
    if text.count("<Thought>") != text.count("</Thought>"):
        raise Unreadable("a thought without its end or its beginning")
    said = text.rpartition("</Thought>")[2]
    if "<Thought>" in said or said.count("<Score>") != 1 or said.count("</Score>") != 1:
        raise Unreadable("not one score in tags after the thought")
    inside = said.partition("<Score>")[2].partition("</Score>")[0]
    value = re.fullmatch(rf"{MARK}{NUMBER}{MARK}", inside)
    if value is None:
        raise Unreadable(f"the score is {_short(inside)}, not a number")
    return _inside(float(value[1]), low, high)


def json_scores(text: str, count: int, low: float, high: float) -> tuple[float, ...]:
    """The numbers under "score" of one JSON object: a list of `count`, or for a count of 1 the number itself."""
    score = _object(text).get("score")
    given = [score] if count == 1 else score
    if not isinstance(given, list) or len(given) != count:
        raise Unreadable(f'"score" is {_told(score)}; {count} numbers are needed')
    return tuple(_number(value, low, high) for value in given)


def json_verdicts(text: str, count: int) -> tuple[int, ...]:
    """The list of `count` numbers under "score" of one JSON object, each 0 or 1: no true, no "1", no 1.0."""
    score = _object(text).get("score")
    if not isinstance(score, list) or len(score) != count:
        told = f"a list of {len(score)}" if isinstance(score, list) else _told(score)
        raise Unreadable(f'"score" is {told}; a list of {count} is needed')
    if any(type(verdict) is not int or verdict not in (0, 1) for verdict in score):
        raise Unreadable('"score" holds what is neither 0 nor 1')
    return tuple(score)


# ----------------------------------------------------------------------------------------- comparisons: 1, ½ or 0
VERDICTS = {
    1.0: r"image[ \t]+1[ \t]+is[ \t]+better",
    0.0: r"image[ \t]+2[ \t]+is[ \t]+better",
    0.5: r"both[ \t]+images[ \t]+are[ \t]+equally[ \t]+good",
}
"""What the first picture wins → how a judge says so."""


def better(text: str) -> float:
    """1 for "Image 1 is better.", 0 for "Image 2 is better.", ½ for "Both images are equally good.".

    The verdict must be a sentence of its own, and no other verdict may stand anywhere in the text.
    """
    said = [value for value, words in VERDICTS.items() if re.search(words, text, re.I | re.A)]
    if len(said) != 1:
        raise Unreadable(f"{len(said)} verdicts; one is needed")
    alone = rf"(?:^|[.!?:;>\n]){MARK}\"?{VERDICTS[said[0]]}\"?{MARK}(?:[.!](?![0-9])|[<\n]|$)"
    if not re.search(alone, text, re.I | re.A):
        raise Unreadable("the verdict is only a part of another sentence")
    return said[0]


def answered(text: str) -> float:
    """`better` of what the last "<answer>…</answer>" holds; the reasoning before it names both pictures."""
    before, opened, rest = text.rpartition("<answer>")
    inside, closed, after = rest.partition("</answer>")
    if not opened or not closed:
        raise Unreadable("no <answer>…</answer>, or one without its end")
    if before.count("<think>") != before.count("</think>") or "think>" in inside + after:
        raise Unreadable("the answer stands in the reasoning")
    for value, words in VERDICTS.items():
        if re.fullmatch(rf"{MARK}{words}{MARK}\.?{MARK}", inside, re.I | re.A):
            return value
    raise Unreadable(f"the answer is {_short(inside)}, no verdict")


def pair_scores(text: str, names: Sequence[str]) -> float:
    """Of "NAME Score:" and two lines "Image 1: x", "Image 2: y" for each name, whose x + y is 1: who has more in sum.

    Each name once, in any order, and no such line elsewhere. That the sum over the names decides is our choice.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    sides = [re.fullmatch(rf"{HEAD}image[ \t]+([12]){MARK}:{MARK}{NUMBER}{MARK}", x, re.I | re.A) for x in lines]
    total, taken = 0.0, 0
    for name in names:
        head = rf"{HEAD}{re.escape(name)}(?:[ \t]+score)?{MARK}(?:\([^()]*\))?{MARK}:?{MARK}"
        at = [n for n, line in enumerate(lines) if re.fullmatch(head, line, re.I | re.A)]
        if len(at) != 1:
            raise Unreadable(f"{len(at)} lines that begin {name}; one is needed")
        first, second = (sides[n] if n < len(sides) else None for n in (at[0] + 1, at[0] + 2))
        if first is None or second is None or (first[1], second[1]) != ("1", "2"):
            raise Unreadable(f'{name} is not followed by "Image 1: x" and "Image 2: y"')
        x, y = (_inside(float(side[2]), 0.0, 1.0) for side in (first, second))
        if abs(x + y - 1) > SLACK + 1e-9:
            raise Unreadable(f"{name}: {x:g} + {y:g} is not 1")
        total, taken = total + x - y, taken + 2
    loose = sum(bool(re.match(rf"{HEAD}image[ \t]+[12]\b[^:\n]*:", line, re.I | re.A)) for line in lines)
    if loose != taken:
        raise Unreadable(f'{loose} lines "Image …: x"; {taken} are needed')
    return 0.5 if abs(total) < 1e-6 else float(total > 0)


def json_winner(text: str) -> float:
    """Of one JSON object its "winner", "Image 1" or "Image 2".

    Wherever the object has "score_1" or "score_2" it must have both, and their sum must be 10. At least one such pair
    is needed, and a winner whom every one of them puts behind is none.
    """
    told = _object(text)
    leads: list[float] = []
    todo: list[Any] = [told]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            if "score_1" in part or "score_2" in part:
                x, y = (_number(part.get(f"score_{n}"), 0.0, 10.0) for n in (1, 2))
                if abs(x + y - 10) > SLACK + 1e-9:
                    raise Unreadable(f"score_1 {x:g} + score_2 {y:g} is not 10")
                leads.append(x - y)
            todo += part.values()
        elif isinstance(part, list):
            todo += part
    winner = told.get("winner")
    won = {"Image 1": 1.0, "Image 2": 0.0}.get(winner) if isinstance(winner, str) else None
    if won is None or not leads:
        raise Unreadable(f'"winner" is {_told(winner)}, of {len(leads)} pairs of scores')
    if all(lead < 0 if won else lead > 0 for lead in leads):
        raise Unreadable("all scores put the winner behind")
    return won


# --------------------------------------------------------------------------------------- probabilities of first tokens
def yes_share(top: Mapping[str, float]) -> float:
    """P(yes) ÷ (P(yes) + P(no)) of a first token's probabilities, either word in any case and with blanks around it.

    A word that is not in the list counts as 0. Raises Unreadable where neither is, or the list is none.
    """
    checked = _probabilities(top)
    yes, no = (sum(p for token, p in checked.items() if token.strip().casefold() == word) for word in ("yes", "no"))
    if yes + no <= 0:
        raise Unreadable("neither yes nor no among the first token's likeliest")
    return yes / (yes + no)


def answer_probability(top: Mapping[str, float], answer: str) -> float:
    """Σ of a first token's probabilities over an answer's `answer_forms`: a lower bound, as the list ends.

    Raises Unreadable where more than `HALVES` lies on tokens that only begin one of the forms: the tokenizer splits
    the word, and other answers may begin so too.
    """
    checked, written = _probabilities(top), answer_forms(answer)
    begun = sum(p for t, p in checked.items() if t not in written and any(form.startswith(t) for form in written))
    if begun > HALVES:
        raise Unreadable(f"{begun:.2f} of the probability is on tokens that only begin {_short(answer)}")
    return min(1.0, sum(p for token, p in checked.items() if token in written))


def _probabilities(top: Mapping[str, float]) -> Mapping[str, float]:
    if not top or not all(math.isfinite(p) and 0 <= p <= 1 + 1e-3 for p in top.values()):
        raise Unreadable("no probabilities of the first token" if not top else "probabilities outside 0 … 1")
    if sum(top.values()) > 1 + 1e-2:
        raise Unreadable(f"probabilities of the first token whose sum is {sum(top.values()):.3g}")
    return top


# --------------------------------------------------------------------------------------------------------------- parts
def _object(text: str) -> dict[str, Any]:
    """The one JSON object that a text is, perhaps in a code fence."""
    fenced = re.fullmatch(r"```(?:json)?[ \t]*\r?\n(.*)\n[ \t]*```", text.strip(), re.S | re.I)
    try:
        told = json.loads(fenced[1] if fenced else text, object_pairs_hook=_once, parse_constant=_refused)
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"no JSON: {_short(str(error))}") from None
    if not isinstance(told, dict):
        raise Unreadable(f"a JSON {type(told).__name__}, no object")
    return told


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    told = dict(pairs)
    if len(told) < len(pairs):
        raise Unreadable("a key that stands twice")
    return told


def _refused(constant: str) -> float:
    raise Unreadable(f"{constant} is no number")


def _number(value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unreadable(f"{_told(value)} is no number")
    return _inside(value, low, high)


def _inside(value: float, low: float, high: float) -> float:
    if not low <= value <= high:  # before it is a float: a whole number may be beyond all floats
        raise Unreadable(f"{value if abs(value) < 1e15 else 'a huge number'} is not in {low:g} … {high:g}")
    return float(value)


def _told(value: object) -> str:
    return _short(value) if isinstance(value, str) else "missing" if value is None else f"a {type(value).__name__}"


def _short(text: str) -> str:
    told = " ".join(text.split())
    return repr(told if len(told) <= 40 else told[:39] + "…")
