"""A vision-language model behind an OpenAI-style endpoint that compares a prompt's pictures: their win rates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards import template as templates
from tempflow.rewards.endpoint import KEY, Endpoint, Question, Settings
from tempflow.rewards.judge import Asks, column, pictures_of, shown_of
from tempflow.rewards.protocol import RewardError, check_media
from tempflow.strict import Place

LICENCE, NEEDS = "the model's", "tempflow[judge]"
RANGE = "0 to 1"

Orders = Literal["both", "counter"]


def judge_pairs(
    *,
    url: str,
    model: str,
    template: Place,
    pairs: Annotated[int, Field(ge=1)] | None = None,
    orders: Orders = "both",
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 16,
    timeout: Annotated[float, Field(gt=0)] = 120.0,
    retries: Annotated[int, Field(ge=0, le=20)] = 4,
    cache: str = "",
    max_tokens: Annotated[int, Field(ge=1)] = 2048,
    seed: int = 0,
    key_env: str = KEY,
    sources: str = ".",
) -> JudgePairs:
    """A picture's win rate against the others of its prompt, by a vision-language judge (Pref-GRPO's reward).

    pairs   of pictures that are compared in a group of G; null: all G(G − 1)/2. Fewer are spread evenly over them
    orders  both: each pair is asked twice, once in either order; counter: once, and each picture stands first about
            as often as second

    The other options are those of `judge`. Raises ValueError naming the option, ImportError without the client.
    """
    form = templates.load(template)
    if not form.compares:
        near = " or ".join(repr(name) for name in templates.names(compares=True)[:3])
        raise ValueError(f"template: {template!r} scores single pictures, as judge does; nearest valid: {near}")
    settings = Settings(
        url, model, form.version, form.by_tokens, key_env, timeout, retries, concurrency, max_tokens, seed, cache=cache
    )
    return JudgePairs(Endpoint(settings), form, sources, pairs, orders)


@dataclass(frozen=True, eq=False)
class JudgePairs(Asks):
    """See `judge_pairs`. Win rate = wins ÷ comparisons that were answered, a tie ½; failed ones do not count, and a
    picture with none left is failed. Equal pictures tie without a question."""

    pairs: int | None = None
    orders: Orders = "both"
    name: str = "judge_pairs"
    groupwise: ClassVar[bool] = True

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column, of the media of one prompt. Raises ValueError as `check_prompts`; RewardError for several
        prompts, for `pairs` that leave some picture out, and for what ends a run."""
        media = check_media(media, prompts, metadata)
        if len(set(prompts)) > 1:
            raise RewardError(f"prompts: {len(set(prompts))} different ones; win rates are of one prompt's pictures")
        self.check_prompts(prompts[:1], metadata[:1])
        shown = shown_of(self.template, media)
        matches = list(self._matches(shown, prompts))
        asked = [(a, b) for a, b in matches if shown[a] != shown[b]]
        questions = [self._question(shown[a], shown[b], prompts[a], metadata[a]) for a, b in asked]
        won = dict(zip(asked, self.endpoint.ask(questions, [self.template.read] * len(asked)), strict=True))
        wins, played = [0.0] * len(media), [0] * len(media)
        for a, b in matches:
            first = won.get((a, b), 0.5)
            if first is not None:
                wins[a], wins[b] = wins[a] + first, wins[b] + 1 - first
                played[a], played[b] = played[a] + 1, played[b] + 1
        return column([w / p if p else None for w, p in zip(wins, played, strict=True)], self.name)

    def compare(
        self, first: Media, second: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]
    ) -> list[float | None]:
        """What each of `first` wins against the one of `second` in its place, drawn for the same prompt: 0 to 1, the
        mean over both orders. None unless both orders got a certain answer; equal pictures tie without a question.

        Raises ValueError as `check_prompts` and for lengths that differ, RewardError for what ends a run.
        """
        self.check_prompts(prompts, metadata)
        ones, others = (shown_of(self.template, check_media(media, prompts, metadata)) for media in (first, second))
        asked = [n for n, (one, other) in enumerate(zip(ones, others, strict=True)) if one != other]
        questions: list[Question] = []
        for n in asked:
            for pair in ((ones[n], others[n]), (others[n], ones[n])):
                questions.append(self._question(*pair, prompts[n], metadata[n]))
        told = self.endpoint.ask(questions, [self.template.read] * len(questions))
        found: list[float | None] = [0.5] * len(ones)
        for n, ahead, behind in zip(asked, told[::2], told[1::2], strict=True):
            found[n] = None if ahead is None or behind is None else (ahead + 1 - behind) / 2
        return found

    def _matches(self, shown: Sequence[tuple[bytes, ...]], prompts: Sequence[str]) -> Iterator[tuple[int, int]]:
        """(first, second) of every question."""
        most = round_robin(len(shown))
        if self.pairs is not None and len(shown) > 1 and 2 * self.pairs < len(shown):
            raise RewardError(
                f"pairs: {self.pairs} leaves some of {len(shown)} pictures out; nearest valid: {-(-len(shown) // 2)}"
            )
        chosen = most if self.pairs is None else most[: self.pairs]
        if self.orders == "both":
            return (match for a, b in chosen for match in ((a, b), (b, a)))
        said = hashlib.sha256(f"{self.endpoint.settings.seed} {prompts[:1]}".encode())
        for pictures in shown:
            said.update(hashlib.sha256(b"".join(pictures)).digest())
        return seated(chosen, len(shown), said.digest()[0] % 2)

    def _question(
        self, first: tuple[bytes, ...], second: tuple[bytes, ...], prompt: str, metadata: Mapping[str, object]
    ) -> Question:
        pictures = pictures_of(self.template, metadata, self.sources, {"first": first, "second": second})
        return Question(self.template.asks(prompt, metadata), pictures)


def round_robin(count: int) -> list[tuple[int, int]]:
    """All pairs of 0 … count − 1, by rounds in which nobody is twice (the circle method): the first n pairs take
    everybody equally often, but for one."""
    ring = list(range(count)) + [-1] * (count % 2)
    found: list[tuple[int, int]] = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        found += [(a, b) for a, b in zip(ring[:half], reversed(ring[half:]), strict=True) if -1 not in (a, b)]
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def seated(pairs: Sequence[tuple[int, int]], count: int, turn: int) -> Iterator[tuple[int, int]]:
    """Each pair in the order in which the one that stood first less often stands first; between equals in turns.

    turn  0 or 1, whose turn is the first. A judge that prefers a place favours nobody so, and nothing is random.
    """
    lead = [0] * count
    for number, (a, b) in enumerate(pairs, turn):
        swap = lead[a] > lead[b] or (lead[a] == lead[b] and number % 2 == 1)
        first, second = (b, a) if swap else (a, b)
        lead[first], lead[second] = lead[first] + 1, lead[second] - 1
        yield first, second
