"""A vision-language model behind an OpenAI-style endpoint, asked of each picture by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from tempflow.core.scores import Scores
from tempflow.media import Kind, Media
from tempflow.rewards import template as templates
from tempflow.rewards.answers import Unreadable
from tempflow.rewards.endpoint import KEY, Endpoint, Question, Settings, png
from tempflow.rewards.geneval2_rules import Atom, atoms_of
from tempflow.rewards.protocol import check_media
from tempflow.rewards.sources import check_sources, source_pictures
from tempflow.rewards.template import Answer, Template
from tempflow.strict import Place

LICENCE, NEEDS = "the model's", "tempflow[judge]"
RANGE = "0 to 1"


def judge(
    *,
    url: str,
    model: str,
    template: Place,
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 16,
    timeout: Annotated[float, Field(gt=0)] = 120.0,
    retries: Annotated[int, Field(ge=0, le=20)] = 4,
    cache: str = "",
    max_tokens: Annotated[int, Field(ge=1)] = 2048,
    seed: int = 0,
    top_logprobs: Annotated[int, Field(ge=5, le=20)] = 20,
    key_env: str = KEY,
    sources: str = ".",
) -> Judge:
    """A vision-language judge's score of each picture, by a template that says what is asked and how it is read.

    url, model    the endpoint's root, such as http://127.0.0.1:8000/v1, and the model as it calls it
    template      one of ours (docs/rewards.md), or the path of a TOML file of your own
    concurrency   questions on their way at a time
    timeout       seconds that an attempt may take; `retries` follow it on 408, 409, 429, 5xx and broken connections
    cache         folder for answers, by the question's and the pictures' content; "" keeps none
    max_tokens    of an answer; one that is cut is failed
    top_logprobs  of the first token, where the template reads probabilities
    key_env       environment variable that holds the endpoint's key, where it needs one
    sources       folder that an edit's source pictures lie in: metadata "image" or "images" are paths in it

    Raises ValueError naming the option, ImportError without the client.
    """
    form = templates.load(template)
    if form.compares:
        near = " or ".join(repr(name) for name in templates.names(compares=False)[:3])
        raise ValueError(f"template: {template!r} compares pictures, which judge_pairs does; nearest valid: {near}")
    settings = Settings(
        url, model, form.version, form.by_tokens, key_env, timeout, retries, concurrency, max_tokens, seed,
        top_logprobs, cache,
    )  # fmt: skip
    return Judge(Endpoint(settings), form, sources)


@dataclass(frozen=True, eq=False)
class Asks:
    """What judges share: whom they ask, by which template, and the folder `sources` that source pictures lie in."""

    endpoint: Endpoint
    template: Template
    sources: str = "."

    @property
    def takes(self) -> Kind:
        return "picture" if self.template.frames == 1 else "video"

    def prepare(self) -> None:
        """Raises RewardError where the endpoint cannot be reached, refuses the key or has no such model."""
        self.endpoint.check()

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Raises ValueError for a prompt without what the template needs: atoms, a source picture, a rubric."""
        for prompt, more in zip(prompts, metadata, strict=True):
            try:
                if self.template.parser == "atoms":
                    atoms_of(more)
                if "source" in self.template.pictures:
                    check_sources(more, self.sources)
                if self.template.rubrics:
                    self.template.rubric(more)
            except ValueError as error:
                raise ValueError(f"prompts: {prompt[:60]!r}: {error}") from None


@dataclass(frozen=True, eq=False)
class Judge(Asks):
    """See `judge`. A row whose question, or any of whose atoms' questions, got no certain answer is failed."""

    name: str = "judge"
    groupwise: ClassVar[bool] = False

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column in [0, 1]. Raises ValueError as `check_prompts`, RewardError for what ends a run."""
        self.check_prompts(prompts, metadata)
        shown = shown_of(self.template, check_media(media, prompts, metadata))
        questions: list[Question] = []
        readers: list[Callable[[Answer], float]] = []
        parts: list[slice] = []
        for row, (prompt, more) in enumerate(zip(prompts, metadata, strict=True)):
            pictures = pictures_of(self.template, more, self.sources, {"made": shown[row]})
            begun = len(questions)
            for question, expected in atoms_of(more) if self.template.parser == "atoms" else [Atom("", "")]:
                questions.append(Question(self.template.asks(prompt, more, question), pictures))
                readers.append(lambda answer, expected=expected: self.template.read(answer, expected))
            parts.append(slice(begun, len(questions)))
        values = self.endpoint.ask(questions, readers)
        return column([self._row(values[part]) for part in parts], self.name)

    def _row(self, values: Sequence[float | None]) -> float | None:
        whole = tuple(value for value in values if value is not None)
        if len(whole) < len(values):
            return None
        try:
            return templates.combined(whole, self.template.combine)
        except Unreadable:
            return None


# ------------------------------------------------------------------------------------- what comparisons need as well
def shown_of(template: Template, media: Media) -> list[tuple[bytes, ...]]:
    """Each medium as the PNGs that stand for it."""
    frames = media.pictures(template.frames).unflatten(0, (len(media), template.frames)) if len(media) else []
    return [tuple(png(frame) for frame in row) for row in frames]


def pictures_of(
    template: Template, metadata: Mapping[str, object], folder: str, shown: Mapping[str, tuple[bytes, ...]]
) -> tuple[bytes, ...]:
    """All that a question shows, in the template's order."""
    parts = (source_pictures(metadata, folder) if which == "source" else shown[which] for which in template.pictures)
    return tuple(picture for part in parts for picture in part)


def column(values: Sequence[float | None], name: str) -> Scores:
    """None is failed."""
    value = torch.tensor([float("nan") if v is None else v for v in values], dtype=torch.float32)[:, None]
    return Scores(value, value.isfinite(), (name,))
