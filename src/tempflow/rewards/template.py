"""What a judge is asked and how its answer is read: a template, a TOML file in `templates/` or of the user's own."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tempflow.request import KINDS
from tempflow.rewards import answers
from tempflow.rewards.answers import Unreadable

FOLDER = Path(__file__).parent / "templates"

TASKS = ("task", *KINDS)
"""Where a prompt's metadata say which rubric is its own, the first before the others."""

Pictured = Literal["source", "made", "first", "second"]
Combine = Literal["mean", "min", "geometric"]
Parser = Literal[
    "final_score",
    "named_scores",
    "tagged_score",
    "json_scores",
    "better",
    "answered",
    "pair_scores",
    "json_winner",
    "yes_no",
    "atoms",
]


@dataclass(frozen=True)
class Answer:
    """What an endpoint said.

    text  all of it
    top   probability of each of the likeliest first tokens; empty where none were asked for
    """

    text: str
    top: Mapping[str, float]


class Template(BaseModel):
    """A question and the reader of its answers.

    version   raised with every change of a word: part of the cache's key
    pictures  which are shown, in order: "source" (of an edit), "made"; or "first" and "second", which are compared
    frames    pictures of each clip; above 1 clips are judged
    parser    a function of `rewards.answers`; "yes_no" and "atoms" read the first token's probabilities
    range     lowest and highest number that the judge may give
    to_unit   how the number becomes one in [0, 1]: as it is, ÷ the highest, or σ(2x − 5) (HP-Scorer)
    names     dimensions that the answer has a score for
    count     numbers in the answer's list
    combine   how several numbers become one
    question  with {prompt}, {frames}, {rubric}, {question}
    rubrics   task → what counts in it, in the place of {rubric}; "default" is for tasks that are not named
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: Annotated[int, Field(ge=1)]
    about: Annotated[str, Field(min_length=1)]
    pictures: Annotated[tuple[Pictured, ...], Field(min_length=1)]
    parser: Parser
    question: Annotated[str, Field(min_length=1)]
    frames: Annotated[int, Field(ge=1, le=64)] = 1
    range: tuple[float, float] = (0.0, 1.0)
    to_unit: Literal["none", "divide", "sigmoid"] = "none"
    names: tuple[str, ...] = ()
    count: Annotated[int, Field(ge=1, le=16)] = 1
    combine: Combine = "mean"
    rubrics: Mapping[str, str] = {}

    @property
    def compares(self) -> bool:
        return self.parser in COMPARES

    @property
    def by_tokens(self) -> bool:
        """Whether the first token's probabilities are the answer, and its text is nothing."""
        return self.parser in ("yes_no", "atoms")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        shown = tuple(p for p in self.pictures if p != "source")
        wanted = ("first", "second") if self.compares else ("made",)
        if shown != wanted:
            raise ValueError(f"pictures: {', '.join(self.pictures)}; nearest valid: {', '.join(wanted)}")
        if bool(self.names) != (self.parser in ("named_scores", "pair_scores")):
            raise ValueError(f"names: {len(self.names)} with parser {self.parser!r}")
        if not self.range[0] < self.range[1]:
            raise ValueError(f"range: {self.range[0]:g} is not below {self.range[1]:g}")
        if self.to_unit == "none" and not 0 <= self.range[0] < self.range[1] <= 1:
            raise ValueError(f"to_unit: 'none' with a range to {self.range[1]:g}; nearest valid: 'divide'")
        asked = set(re.findall(r"\{(\w+)\}", self.question))
        for slot, needed in (("rubric", bool(self.rubrics)), ("question", self.parser == "atoms")):
            if (slot in asked) != needed:
                raise ValueError(f"question: {{{slot}}} is {'missing' if needed else 'never filled'}")
        other = asked - {"prompt", "frames", "rubric", "question"}
        if other:
            raise ValueError(f"question: {{{min(other)}}} is unknown; nearest valid: {{prompt}}")
        return self

    def rubric(self, metadata: Mapping[str, object]) -> str:
        """The prompt's own, by its task. Raises ValueError where there is none."""
        task = next((t.strip().lower() for k in TASKS if isinstance(t := metadata.get(k), str) and t.strip()), "")
        found = self.rubrics.get(task, self.rubrics.get("default"))
        if found is None:
            near = get_close_matches(task, self.rubrics, 1, 0.0)[0]
            raise ValueError(f"task {task[:60]!r} has no rubric; nearest valid: {near!r}")
        return found

    def asks(self, prompt: str, metadata: Mapping[str, object], question: str = "") -> str:
        """The question's text. What is filled in is not searched for further places to fill."""
        rubric = self.rubric(metadata) if self.rubrics else ""
        filled = {"prompt": prompt, "frames": str(self.frames), "rubric": rubric, "question": question}
        return re.sub(r"\{(prompt|frames|rubric|question)\}", lambda place: filled[place[1]], self.question)

    def read(self, answer: Answer, expected: str = "") -> float:
        """An answer's value in [0, 1]; of a comparison what the first picture wins. `expected`: the atom's answer.

        Raises Unreadable.
        """
        if self.parser == "atoms":
            return answers.answer_probability(answer.top, expected)
        if self.parser == "yes_no":
            return answers.yes_share(answer.top)
        if self.compares:
            return COMPARES[self.parser](answer.text, self)
        return self._unit(combined(SCORES[self.parser](answer.text, self), self.combine))

    def _unit(self, value: float) -> float:
        if self.to_unit == "sigmoid":
            return 1 / (1 + math.exp(5 - 2 * value))
        return value / self.range[1] if self.to_unit == "divide" else value


SCORES: Mapping[str, Callable[[str, Template], tuple[float, ...]]] = {
    "final_score": lambda text, t: (answers.final_score(text, *t.range),),
    "named_scores": lambda text, t: answers.named_scores(text, t.names, *t.range),
    "tagged_score": lambda text, t: (answers.tagged_score(text, *t.range),),
    "json_scores": lambda text, t: answers.json_scores(text, t.count, *t.range),
}
COMPARES: Mapping[str, Callable[[str, Template], float]] = {
    "better": lambda text, t: answers.better(text),
    "answered": lambda text, t: answers.answered(text),
    "pair_scores": lambda text, t: answers.pair_scores(text, t.names),
    "json_winner": lambda text, t: answers.json_winner(text),
}


def combined(values: tuple[float, ...], how: Combine) -> float:
    """Several numbers ≥ 0 as one. Raises Unreadable without any."""
    if not values:
        raise Unreadable("no numbers")
    if how == "min":
        return min(values)
    return math.prod(values) ** (1 / len(values)) if how == "geometric" else math.fsum(values) / len(values)


def names(compares: bool) -> tuple[str, ...]:
    """The templates that ship with the package, of comparisons or of single scores."""
    found = sorted(file.stem for file in FOLDER.glob("*.toml"))
    return tuple(name for name in found if load(name).compares == compares)


@cache
def load(name: str) -> Template:
    """The template of that name, or in the TOML file of that path.

    Raises ValueError for a name that there is not, or a file that is no template; OSError where it cannot be read.
    """
    own = name.endswith(".toml")
    path = Path(name).expanduser() if own else FOLDER / f"{name}.toml"
    if not own and (not re.fullmatch(r"\w+", name) or not path.is_file()):
        near = get_close_matches(name, [file.stem for file in FOLDER.glob("*.toml")], 1, 0.0)[0]
        raise ValueError(f"template: {name[:60]!r} is unknown; nearest valid: {near!r}, or a path that ends in .toml")
    try:
        return Template.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        told = str(fault.get("ctx", {}).get("error", fault["msg"]))
        raise ValueError(f"template: {path.name}: {where + ': ' if where else ''}{told}") from None
    except ValueError as error:  # no TOML, no UTF-8
        raise ValueError(f"template: {path.name}: {' '.join(str(error).split())[:200]}") from None
