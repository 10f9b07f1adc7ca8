"""Who judges a suite's pictures: a reward, a judge with a list of questions, a pairwise judge, or distances."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from tempflow.evaluate.suites.figures import Value
from tempflow.evaluate.suites.readers import POINTS, QUESTIONS
from tempflow.media import Media
from tempflow.perception.embed import DinoEmbedding, Embedding, HandEmbedding
from tempflow.request import Prompt
from tempflow.rewards import check_takes, score_all
from tempflow.rewards.answers import json_verdicts, yes_share
from tempflow.rewards.endpoint import KEY, Endpoint, Question, Settings, png
from tempflow.rewards.judge_pairs import JudgePairs
from tempflow.rewards.protocol import Reward, check_prompts, prepare, takes_of
from tempflow.rewards.template import Answer
from tempflow.strict import Place, cut

Shown = tuple[Tensor, ...]
"""What is judged at a time, uint8 [H, W, 3] each: a picture; or two of one prompt, which are compared."""


class Scorer(Protocol):
    """Judges pictures of a suite's prompts.

    about  who judges and how, in words
    whole  True: it is given all pictures of a prompt at once, as distances need
    """

    @property
    def about(self) -> str: ...

    @property
    def whole(self) -> bool: ...

    def prepare(self) -> None:
        """Loads weights, or asks the server; raises where one is not there."""
        ...

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for a prompt that it cannot judge."""
        ...

    def __call__(self, shown: Sequence[Shown], prompts: Sequence[Prompt], slots: Sequence[int]) -> list[Value]:
        """What is said of each; slots: numbers of their prompts. Raises RewardError for what ends a run."""
        ...


@dataclass(frozen=True, eq=False)
class ByReward:
    """A reward's score."""

    reward: Reward

    def __post_init__(self) -> None:
        check_takes([self.reward], "picture", "suite")

    @property
    def about(self) -> str:
        return f"the reward {self.reward.name}"

    @property
    def whole(self) -> bool:
        return self.reward.groupwise

    def prepare(self) -> None:
        prepare(self.reward)

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_prompts(self.reward, [p.text for p in prompts], [p.told for p in prompts])

    def __call__(self, shown: Sequence[Shown], prompts: Sequence[Prompt], slots: Sequence[int]) -> list[Value]:
        """Pictures of different sizes are scored by size."""
        found: list[Value] = [None] * len(shown)
        for rows in _alike(shown):
            texts, metadata = [prompts[n].text for n in rows], [prompts[n].told for n in rows]
            scores = score_all([self.reward], _media(shown, rows), texts, metadata, groups=[slots[n] for n in rows])
            for n, value in zip(rows, scores.value[:, 0].tolist(), strict=True):
                found[n] = None if math.isnan(value) else value
        return found


@dataclass(frozen=True, eq=False)
class Compared:
    """What the first of two pictures wins by a pairwise judge that is asked in both orders, 0 to 1."""

    judge: JudgePairs
    whole = False

    @property
    def about(self) -> str:
        return f"{self.judge.endpoint.settings.model}, asked in both orders: {self.judge.template.about}"

    def __post_init__(self) -> None:
        if takes_of(self.judge) != "picture":
            raise ValueError("options.template: compares clips; nearest valid: 'unified_1_pairs'")
        if self.judge.orders != "both" or self.judge.pairs is not None:
            option = "pairs" if self.judge.pairs is not None else "orders"
            raise ValueError(f"options.{option}: every pair is asked in both orders; nearest valid: without")

    def prepare(self) -> None:
        self.judge.prepare()

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.judge.check_prompts([p.text for p in prompts], [p.told for p in prompts])

    def __call__(self, shown: Sequence[Shown], prompts: Sequence[Prompt], slots: Sequence[int]) -> list[Value]:
        found: list[Value] = [None] * len(shown)
        for rows in _alike(shown):
            sides = [_media(shown, rows, side) for side in range(2)]
            texts, metadata = [prompts[n].text for n in rows], [prompts[n].told for n in rows]
            for n, value in zip(rows, self.judge.compare(sides[0], sides[1], texts, metadata), strict=True):
                found[n] = value
        return found


@dataclass(frozen=True, eq=False)
class Spread:
    """A picture's mean distance to its prompt's other pictures, by an embedding. Their mean over a prompt is the mean
    over its pairs."""

    embedding: Callable[[], Embedding]
    about: str
    whole = True

    def prepare(self) -> None:
        self.embedding()

    def check(self, prompts: Sequence[Prompt]) -> None:
        """All will do."""

    def __call__(self, shown: Sequence[Shown], prompts: Sequence[Prompt], slots: Sequence[int]) -> list[Value]:
        embed = self.embedding()
        seen = torch.cat([embed(picture[None]) for (picture,) in shown]).double()
        slot, found = torch.tensor(slots), list[Value]()
        for n in range(len(shown)):
            others = (slot == slot[n]).nonzero()[:, 0]
            others = others[others != n]
            away = (seen[others] - seen[n]).norm(dim=1)
            value = float(away.mean()) if len(others) else math.nan
            found.append(value if math.isfinite(value) else None)
        return found


def diversity(
    *,
    path: Place = "",
    revision: str | None = None,
    pool: Literal["cls", "patches"] = "cls",
    device: str = "cpu",
) -> Spread:
    """Distances between a prompt's pictures, by an embedding.

    path  a DINOv2 backbone, folder or hub id: distances are Euclidean between vectors of length 1, 0 to 2; "": features
          by hand of colour, layout and edges (`perception.diversity`), without a network, 1 between black and white
    """
    kept: list[Embedding] = []

    def embedding() -> Embedding:
        if not kept:
            kept.append(DinoEmbedding(path, revision, pool=pool, device=device) if path else HandEmbedding())
        return kept[0]

    vectors = f"vectors of length 1 by DINOv2 ({path}, {pool})" if path else "features by hand (perception.diversity)"
    return Spread(embedding, f"Euclidean distances between {vectors}")


# ------------------------------------------------------------------------------------------------- lists of questions
VERSION = 1
"""Of the questions below; raised with every change of a word."""

TOGETHER = """
A model made this picture for a caption. Check the picture against the numbered checkpoints, each by itself. Judge only what can be seen; what cannot be told is not met.

Caption: {caption}

Checkpoints:
{points}

Answer with one JSON object and nothing else. It has two lists of length {count}, in the order of the checkpoints: a short remark on each, and a verdict on each, 1 where it is met and 0 where it is not:
{{"remarks": ["…"], "score": [v]}}
"""  # noqa: E501

EACH = "{question} Answer with yes or no."


@dataclass(frozen=True, eq=False)
class Checklist:
    """Answers 0 or 1 to each of a prompt's questions. A picture is failed as a whole where one of them has no certain
    answer.

    endpoints  who is asked first, and then, each with another seed, of what got no certain answer
    each       True: a question at a time, yes where the first token's probability says so; False: all in one question,
               answered by a list in JSON
    """

    endpoints: tuple[Endpoint, ...]
    each: bool
    whole = False

    @property
    def about(self) -> str:
        asked = "asked each question for yes or no" if self.each else "asked all checkpoints in one question"
        attempts = "once" if len(self.endpoints) == 1 else f"up to {len(self.endpoints)} times"
        return f"{self.endpoints[0].settings.model}, {asked}, {attempts}"

    def prepare(self) -> None:
        self.endpoints[0].check()

    def check(self, prompts: Sequence[Prompt]) -> None:
        key = QUESTIONS if self.each else POINTS
        for prompt in prompts:
            if not _items(prompt, key):
                raise ValueError(f"prompts: {cut(prompt.text)!r} has no {key}")

    def __call__(self, shown: Sequence[Shown], prompts: Sequence[Prompt], slots: Sequence[int]) -> list[Value]:
        found: list[Value] = [None] * len(shown)
        pictures = [png(picture) for (picture,) in shown]
        for endpoint in self.endpoints:
            left = [n for n, value in enumerate(found) if value is None]
            if not left:
                break
            answers = self._asked([pictures[n] for n in left], [prompts[n] for n in left], endpoint)
            for n, value in zip(left, answers, strict=True):
                found[n] = value
        return found

    def _asked(self, pictures: Sequence[bytes], prompts: Sequence[Prompt], endpoint: Endpoint) -> list[Value]:
        questions, owners, verdicts = list[Question](), list[int](), dict[int, tuple[float, ...]]()
        readers: list[Callable[[Answer], float]] = []
        for n, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            for text, count in self._texts(prompt):
                readers.append(self._reader(verdicts, len(questions), count))
                questions.append(Question(text, (picture,)))
                owners.append(n)
        values = endpoint.ask(questions, readers)
        found: list[Value] = []
        for n in range(len(pictures)):
            own = [question for question, owner in enumerate(owners) if owner == n]
            whole = all(values[question] is not None for question in own)
            found.append(tuple(v for question in own for v in verdicts[question]) if whole else None)
        return found

    def _texts(self, prompt: Prompt) -> Iterator[tuple[str, int]]:
        """The questions about a picture, and how many answers each has."""
        if self.each:
            for item in _items(prompt, QUESTIONS):
                yield EACH.format(question=item["question"]), 1
            return
        points = _items(prompt, POINTS)
        lines = [f"{n}. {point['dimension']}: {point['description']}" for n, point in enumerate(points, 1)]
        yield TOGETHER.format(caption=prompt.text, points="\n".join(lines), count=len(points)).strip(), len(points)

    def _reader(self, verdicts: dict[int, tuple[float, ...]], question: int, count: int) -> Callable[[Answer], float]:
        """Reads an answer and keeps all that it says; the value that it gives is not used."""

        def read(answer: Answer) -> float:
            said = (yes_share(answer.top) >= 0.5,) if self.each else json_verdicts(answer.text, count)
            verdicts[question] = tuple(float(v) for v in said)
            return 1.0

        return read


def checkpoints(
    *,
    url: str,
    model: str,
    attempts: Annotated[int, Field(ge=1, le=100)] = 10,
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 16,
    timeout: Annotated[float, Field(gt=0)] = 120.0,
    retries: Annotated[int, Field(ge=0, le=20)] = 4,
    cache: str = "",
    max_tokens: Annotated[int, Field(ge=1)] = 4096,
    seed: int = 0,
    key_env: str = KEY,
) -> Checklist:
    """A vision-language judge that is asked one question a picture, with all its checkpoints.

    attempts  how often an answer that cannot be read is asked for, every time with another seed

    The other options are those of the reward `judge`. Raises ValueError naming the option, ImportError without the
    client.
    """
    settings = Settings(
        url, model, VERSION, False, key_env, timeout, retries, concurrency, max_tokens, seed, cache=cache
    )
    return Checklist(tuple(Endpoint(replace(settings, seed=seed + n)) for n in range(attempts)), each=False)


def yes_or_no(
    *,
    url: str,
    model: str,
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 16,
    timeout: Annotated[float, Field(gt=0)] = 120.0,
    retries: Annotated[int, Field(ge=0, le=20)] = 4,
    cache: str = "",
    seed: int = 0,
    top_logprobs: Annotated[int, Field(ge=5, le=20)] = 20,
    key_env: str = KEY,
) -> Checklist:
    """A vision-language judge that is asked each of a prompt's questions, for yes or no by its first token's
    probabilities. Options and errors are those of the reward `judge`."""
    settings = Settings(
        url, model, VERSION, True, key_env, timeout, retries, concurrency, seed=seed, top=top_logprobs, cache=cache
    )
    return Checklist((Endpoint(settings),), each=True)


# ---------------------------------------------------------------------------------------------------------------- parts
def _items(prompt: Prompt, key: str) -> list[Mapping[str, Any]]:
    found = prompt.metadata.get(key)
    return found if isinstance(found, list) else []


def _alike(shown: Sequence[Shown]) -> Iterator[list[int]]:
    """Places of pictures, or pairs, of the same sizes."""
    by_size: dict[object, list[int]] = {}
    for n, pictures in enumerate(shown):
        by_size.setdefault(tuple(picture.shape for picture in pictures), []).append(n)
    yield from by_size.values()


def _media(shown: Sequence[Shown], rows: Sequence[int], side: int = 0) -> Media:
    return Media.of(torch.stack([shown[n][side] for n in rows]))
