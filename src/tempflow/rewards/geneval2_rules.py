"""GenEval 2's rule, Soft-TIFA (arXiv 2512.16853): a prompt's questions, and what becomes of an answer's probabilities.

Pure functions: who asks a vision-language model is for judges. A prompt has atoms, (question, expected answer). The
model is asked each one about the picture, for an answer of one word; the atom's score is the probability that its first
token says the expected answer, summed over the ways to write it (`answer_forms`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from tempflow.strict import nearest, shown

ATOMS, SKILLS = ("vqa_list", "atoms"), "skills"
"""What the published file, and we, call a prompt's atoms; and the skill that each one tests."""

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
EXAMPLE = '[["How many cows are in the image?", "three"]]'
SLACK = 1e-4
"""By how much a sum of probabilities may be above 1: they were rounded before they were summed."""


class Atom(NamedTuple):
    """A question about a picture, and the answer that is expected."""

    question: str
    answer: str


def atoms_of(metadata: Mapping[str, object]) -> tuple[Atom, ...]:
    """A prompt's atoms, as GenEval 2's file has them: {"vqa_list": [["How many cows are in the image?", "three"], …]};
    or {"atoms": [{"question": "How many cows are in the image?", "answer": "three"}, …]}.

    Raises ValueError, naming the field, for none at all, both lists, what is no question with an answer of one word, a
    "How many" whose answer is no number up to twenty, and a list of skills of another length.
    """
    there = [key for key in ATOMS if metadata.get(key) is not None]
    if len(there) > 1:
        raise ValueError(f"{there[1]}: there is {there[0]} too; nearest valid: one of them")
    key = there[0] if there else ATOMS[0]
    given = metadata.get(key)
    if not isinstance(given, list | tuple) or not given:
        told = f"{shown(given)} holds no atom" if there else "is missing"
        raise ValueError(f"{key}: {told}; nearest valid: {EXAMPLE}")
    skills = metadata.get(SKILLS)
    if skills is not None and (not isinstance(skills, list | tuple) or len(skills) != len(given)):
        raise ValueError(f"{SKILLS}: {shown(skills)}; nearest valid: {len(given)} skills, one per atom of {key}")
    return tuple(_atom(item, f"{key}[{place}]") for place, item in enumerate(given))


def answer_forms(answer: str) -> tuple[str, ...]:
    """The ways to write an answer as a first token: lower case and capitalised, of a number also its digits; each with
    and without a space in front.

    A judge compares whole tokens with these. Tokenizers cut digits and rare words into pieces: a form of which the
    first piece is another answer too ("1" of "12") is then never met, and the sum is a lower bound.
    """
    plain = answer.strip().lower()
    value = NUMBERS.index(plain) if plain in NUMBERS else int(plain) if plain.isdecimal() else None
    word = NUMBERS[value] if value is not None and value < len(NUMBERS) else plain
    words = dict.fromkeys((word, word[:1].upper() + word[1:], *(() if value is None else (str(value),))))
    return tuple(space + form for space in ("", " ") for form in words)


def soft_tifa(atom_probabilities: Sequence[float], mean: Literal["geometric", "arithmetic"] = "geometric") -> float:
    """A prompt's score, 0 to 1, of its atoms' probabilities.

    mean  "geometric" (the benchmark's GM, whether all of the prompt is there: one atom of 0 makes 0), or "arithmetic"
          (its AM, how much of it is)

    Raises ValueError without atoms, for another mean, and for what is no probability.
    """
    if mean not in ("geometric", "arithmetic"):
        raise ValueError(f"mean: {shown(mean)}; nearest valid: {nearest(mean, ('geometric', 'arithmetic'))}")
    if len(atom_probabilities) == 0:
        raise ValueError("atom_probabilities: none; nearest valid: one per atom of the prompt")
    for place, value in enumerate(atom_probabilities):
        if not 0 <= value <= 1 + SLACK:  # NaN is neither
            raise ValueError(f"atom_probabilities[{place}]: {value} is no probability; nearest valid: 0 to 1")
    values = [min(float(value), 1.0) for value in atom_probabilities]
    if mean == "arithmetic":
        return math.fsum(values) / len(values)
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0


def _atom(item: object, where: str) -> Atom:
    pair = [item.get("question"), item.get("answer")] if isinstance(item, Mapping) else item
    if isinstance(pair, list | tuple) and len(pair) == 2:
        number = isinstance(pair[1], int) and not isinstance(pair[1], bool)
        pair = [pair[0], str(pair[1]) if number else pair[1]]
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(t, str) and t.strip() for t in pair):
        raise ValueError(f"{where}: {shown(item)} is no [question, answer]; nearest valid: {EXAMPLE[1:-1]}")
    atom = Atom(*(str(text).strip() for text in pair))
    if len(atom.answer.split()) > 1:
        near = repr(atom.answer.split()[0])
        raise ValueError(
            f"{where}: {shown(atom.answer)} is more than one word, and first ones are judged; nearest valid: {near}"
        )
    known = (*NUMBERS, *map(str, range(len(NUMBERS))))
    if atom.question.lower().startswith("how many") and atom.answer.lower() not in known:
        near = nearest(atom.answer, known)
        raise ValueError(f"{where}: {shown(atom.answer)} answers no {shown(atom.question)}; nearest valid: {near}")
    return atom
