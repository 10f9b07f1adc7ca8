"""A latent reward as a judge, and sampling that at each step keeps the best of k stochastic successors (DRM).

DRM (CVPR 2026, arXiv 2605.25661), as a secondary source has it; HPSv3 there rises from 8.95 (k = 1) to 9.49 (k = 6).
The candidates of a step share one velocity, so k costs k forwards of the reward and no decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempflow.core.dynamics import Dynamics
from tempflow.core.rollout import Noise, Predict
from tempflow.core.schedule import Schedule
from tempflow.core.scores import Scores
from tempflow.core.state import WHOLE, StateLayout, placed
from tempflow.latent_reward.model import LatentReward, bind
from tempflow.latent_reward.train import Score
from tempflow.media import Size
from tempflow.models.finite import encoded
from tempflow.models.protocol import Model
from tempflow.request import Prompt, asked

ScoreLatents = Callable[[Tensor, Tensor, Tensor], Scores]
"""score_latents(x [B, *S], sigma [B], rows long[B]) -> Scores of one column; compared at equal σ only."""


@dataclass(frozen=True)
class LatentScorer:
    """Scores of noisy latents as `Scores`, without gradients.

    score  score(x, sigma, rows) -> [B]; `bind` makes one of a `LatentReward`
    name   the column's name
    rows   latents scored at once, ≥ 1; None: all

    Raises ValueError for fewer than one row.
    """

    score: Score
    name: str = "latent"
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows: {self.rows} is too small; nearest valid: 1")

    @classmethod
    def of(
        cls, model: Model, reward: LatentReward, prompts: Sequence[str | Prompt], size: Size, rows: int | None = None
    ) -> LatentScorer:
        """The judge whose `rows` argument indexes `prompts`, of latents of media of `size`."""
        return cls(bind(model, reward, encoded(model, asked(prompts), size)), rows=rows)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Scores:
        """One column, [B, 1]; a score that is not finite has failed, it is never 0.

        Args:
            x: latents [B, *S]; sigma: [B]; rows: LongTensor[B], which prompt each belongs to.

        Raises ValueError where the lengths differ or the scorer does not return one score a row.
        """
        if sigma.shape != (len(x),) or rows.shape != (len(x),):
            raise ValueError(
                f"sigma, rows: shapes {list(sigma.shape)}, {list(rows.shape)} must be [{len(x)}], one for each latent"
            )
        size = max(len(x), 1) if self.rows is None else self.rows
        parts = [self.score(x[a : a + size], sigma[a : a + size], rows[a : a + size]) for a in range(0, len(x), size)]
        value = torch.cat([torch.empty(0, device=x.device), *(p.float() for p in parts)])
        if value.shape != (len(x),):
            raise ValueError(
                f"score returned shape {list(value.shape)}; nearest valid: [{len(x)}], one for each latent"
            )
        return Scores(value[:, None], value.isfinite()[:, None], (self.name,))


@dataclass(frozen=True, eq=False)
class Guided:
    """What `guided_sample` drew; N samples, prompt by prompt and root by root.

    x       [N, *S], what the last step reaches
    prompt  LongTensor[N], the prompt slot of each
    root    LongTensor[N]
    scores  float32[T, N, k], the judge's of every candidate; NaN where it failed or was not asked
    chosen  LongTensor[T, N], the candidate that was continued
    """

    x: Tensor
    prompt: Tensor
    root: Tensor
    scores: Tensor
    chosen: Tensor


@torch.no_grad()
def guided_sample(
    dynamics: Dynamics,
    schedule: Schedule,
    predict: Predict,
    score_latents: ScoreLatents,
    noise: Noise,
    *,
    shape: Sequence[int],
    slots: Sequence[int],
    roots: int = 1,
    candidates: int = 4,
    layout: StateLayout = WHOLE,
    device: torch.device | str = "cpu",
) -> Guided:
    """At each step draws `candidates` successors of every sample and goes on from the one with the highest score.

    predict     velocity of [B, *S] states at one σ, as in `rollout`; called once a step, whatever `candidates` is
    score_latents  scores the successors at the next σ; not asked at candidates = 1, or where a step draws no noise
    noise       candidate j of a sample has the noise of child j of that node in a rollout's tree: at candidates = 1
                the result is that of `rollout` with a `chain` plan, bit for bit
    shape       *S, one latent's
    slots       distinct prompt slots ≥ 0; they enter the noise, and are the `rows` of `predict` and `score_latents`
    roots       samples for each, ≥ 1
    layout      by slot: which elements are held, as in `rollout`

    A failed candidate is not chosen; where all of a sample's fail, the first goes on, as without a judge.
    Raises ValueError for a count below 1, slots that repeat, or several candidates of a dynamics without noise.
    """
    _check(dynamics, slots, roots, candidates)
    who = [(slot, root) for slot in slots for root in range(roots)]
    paths: list[tuple[int, ...]] = [()] * len(who)
    prompt, root = torch.tensor(who, dtype=torch.long, device=device).view(-1, 2).unbind(1)
    start = noise.initial(who, shape, dynamics.corruption.noise)
    x = dynamics.corruption.start(start, schedule).to(device)
    held = layout.take(prompt)
    x = held.hold(x)
    record = torch.full((schedule.steps, len(who), candidates), math.nan, device=device)
    chosen = torch.zeros(schedule.steps, len(who), dtype=torch.long)
    for i in range(schedule.steps):
        spread = bool(dynamics.spreads(schedule, torch.tensor([i])))
        k = candidates if spread else 1  # without noise all candidates are one
        velocity = held.silence(predict(x, schedule.at(torch.full((len(x),), i)).to(device), prompt))
        # the step's index stays on the CPU, where looking at it is free
        law = dynamics.transition(
            x.repeat_interleave(k, 0), velocity.repeat_interleave(k, 0), schedule, torch.full((len(x) * k,), i)
        )
        ids = [(*w, *path, j, i) for w, path in zip(who, paths, strict=True) for j in range(k)]
        ends = law.sample(placed(noise.edge(ids, shape, dynamics.noise), torch.device(device)))
        born = layout.take(prompt.repeat_interleave(k)).hold(ends.to(x.dtype))
        if k > 1:
            below = schedule.at(torch.full((len(born),), i + 1)).to(device)
            scores = score_latents(born, below, prompt.repeat_interleave(k))
            record[i] = scores.value[:, 0].view(-1, k)
            chosen[i] = _best(record[i]).cpu()
        paths = [(*path, int(c)) for path, c in zip(paths, chosen[i], strict=True)]
        x = born[torch.arange(len(x), device=device) * k + chosen[i].to(device)]
    return Guided(x, prompt, root, record, chosen.to(device))


def _best(scores: Tensor) -> Tensor:
    """The place of each row's highest score, the first of equals; NaN is below all."""
    return scores.nan_to_num(nan=-math.inf, neginf=-math.inf).argmax(dim=1)


def _check(dynamics: Dynamics, slots: Sequence[int], roots: int, candidates: int) -> None:
    for name, value in (("roots", roots), ("candidates", candidates)):
        if value < 1:
            raise ValueError(f"{name}: {value} is too small; nearest valid: 1")
    if len(set(slots)) != len(slots) or any(slot < 0 for slot in slots):
        raise ValueError(f"slots: {list(slots)} must be distinct and >= 0; nearest valid: {sorted({*map(abs, slots)})}")
    if candidates > 1 and not dynamics.stochastic:
        raise ValueError(f"candidates: {candidates}, but {dynamics} draws no noise; nearest valid: 1")
