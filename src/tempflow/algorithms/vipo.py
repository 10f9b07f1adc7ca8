"""ViPO: a picture's advantage is spread over its places by where the eye looks (arXiv 2511.18719, CVPR 2026).

Claim. One advantage laid evenly over the picture teaches background as much as content. A frozen vision backbone's
features, reduced by PCA to a map M ≥ 0 over the latent's grid, say where it belongs.

    map         M of the finished picture: principal components of dense features, weighted by explained variance,
                smoothed, min-max                                                     (tempflow.perception.FeatureMaps)
    ratio       "position": r at every place p, log densities summed over channels, A_p = M_p·A       (PositionRatio)
                "region": one r a step, its log density averaged with M as weights; ours              (RegionRatio)
    loss        mean over steps and places of max(−A_p r_p, −A_p clip(r_p, 1−clip, 1+clip))
    advantage   A = clip((R − mean of the prompt's group) / (its unbiased std + eps), ±advantage_clip)

Rewards are never multiplied by the map, which would make a group incomparable. Scale: log r_p sums C channels where a
step's log r is a mean over all D elements: √(C·D) times the spread and C times the gradient, so the clip that suits
one blocks nearly all, or nothing, of the other (`shapes`: 64 times). "region" keeps a step's clips, and with M ≡ 1 is
exactly its ratio; "position" with M ≡ 1 is not.

Trajectories: chains from one shared noise by DanceGRPO's step, the last step by ODE; a share of the steps is trained.
Cost for a prompt at the defaults: 192 forwards, 12 leaves, 108 trained edges, and 12 maps.

Defaults: steps 16, η 0.25, fraction 0.6, clip 1e-4, shared noise: TeleBoost's Wan run (the authors' laboratory, its
own baseline, not bit-exact to the paper; good); group 12 is ours (that run has 3). 3 components, σ 1, min-max as there.
Its `orient="reverse"` is an arbitrary sign, so "border" (ours) is the default. Features are made by hand unless `dino`
names DINOv2's folder; any other `MapProvider`: replace(vipo(…), observe=(ImportanceMap(provider),)).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

from torch import Tensor

from tempflow.algorithms.base import (
    EXACT_KL,
    Algorithm,
    Drawn,
    at_least,
    one_of,
    positive,
    positive_or,
    proportion,
    some_steps,
    texts_of,
)
from tempflow.algorithms.phase import EdgePhase
from tempflow.core import plan
from tempflow.core.credit import GroupZScore, Mapped
from tempflow.core.dynamics import DanceSDE, FlowSDE
from tempflow.core.forest import Forest
from tempflow.core.objective.ratio import PositionRatio, RegionRatio, clipped
from tempflow.perception import DinoFeatures, FeatureMaps, HandFeatures, MapProvider
from tempflow.perception.maps import Normalise, Orient


@dataclass(frozen=True)
class ImportanceMap:
    """A map of every leaf's picture at the latent's resolution, the trait "map" [N, h, w]; latents are [C, h, w]."""

    provider: MapProvider
    name: str = "map"
    of: Literal["edge", "leaf"] = "leaf"

    def __call__(self, forest: Forest, media: Tensor) -> Tensor:
        shape = tuple(forest.nodes.shape[1:])
        if len(shape) != 3:
            raise ValueError(f"nodes: latents {list(shape)} have no rows and columns; nearest valid: [C, h, w]")
        return self.provider(media, (shape[1], shape[2]))


@dataclass(frozen=True)
class Maps:
    """`FeatureMaps` whose network is loaded when a picture is first looked at, not when a configuration is read."""

    dino: str | None
    orient: Orient
    normalise: Normalise

    def __call__(self, media: Tensor, size: tuple[int, int]) -> Tensor:
        features = HandFeatures() if self.dino is None else _dino(self.dino)
        return FeatureMaps(features, orient=self.orient, normalise=self.normalise)(media, size)


@texts_of(EXACT_KL)
def vipo(
    steps: int = 16,
    group: int = 12,
    kind: Literal["dance", "flow"] = "dance",
    noise_level: float | None = None,
    train_fraction: float = 0.6,
    ratio: Literal["position", "region"] = "position",
    dino: str | None = None,
    orient: Literal["border", "reverse", "none"] = "border",
    normalise: Literal["minmax", "mean_one"] = "minmax",
    clip: float = 1e-4,
    kl: float = 0.0,
    eps: float = 1e-8,
    advantage_clip: float | None = 5.0,
) -> Algorithm:
    """ViPO (arXiv 2511.18719): advantages per place of the picture, by a map of its content.

    Args:
        group: pictures per prompt, compared with each other; they start from one noise.
        kind: the step, "dance" (DanceGRPO's) or "flow" (Flow-GRPO's).
        noise_level: η of the dance step, a of the flow step; None: 0.25 for "dance", 0.7 for "flow".
        train_fraction: share of the steps that is trained, drawn anew each iteration; never the last one.
        ratio: "position", as published, or "region", one ratio a step averaged with the map.
        dino: folder or hub id of a DINOv2 whose features make the maps; None: features by hand.
        orient: which end of a component counts as content.
        normalise: maps in [0, 1] ("minmax"), or divided by their mean ("mean_one").

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("steps", steps, 2, "as the last one is not trained")
    at_least("group", group, 2, "or there is nothing to compare with")
    one_of("kind", kind, ("dance", "flow"))
    one_of("ratio", ratio, ("position", "region"))
    one_of("orient", orient, ("border", "reverse", "none"))
    one_of("normalise", normalise, ("minmax", "mean_one"))
    level = positive_or("noise_level", noise_level, 0.25 if kind == "dance" else 0.7)
    proportion("clip", clip, 1e-4)
    proportion("train_fraction", train_fraction, 0.6, whole=True)
    if advantage_clip is not None:
        positive("advantage_clip", advantage_clip, 5.0)
    trained = min(max(int(train_fraction * steps + 1e-9), 1), steps - 1)
    form = PositionRatio() if ratio == "position" else RegionRatio()
    return Algorithm(
        name="vipo",
        steps=steps,
        plan=Drawn(partial(_plan, steps, group, trained)),
        dynamics=DanceSDE(level) if kind == "dance" else FlowSDE(level),
        credit=Mapped(GroupZScore(by=("prompt", "step"), unbiased=True, eps=eps, clip=advantage_clip)),
        phases=(EdgePhase(clipped(clip, clip, kl, "exact", form)),),
        observe=(ImportanceMap(Maps(dino, orient, normalise)),),
    )


def _plan(steps: int, group: int, trained: int, seed: int, iteration: int, slot: int) -> plan.Plan:
    return _chains(steps, group, some_steps("vipo", seed, iteration, trained, steps - 1))


@lru_cache(maxsize=256)
def _chains(steps: int, group: int, train: tuple[int, ...]) -> plan.Plan:
    return plan.chain(steps, group, train=train, stochastic=range(steps - 1), shared_noise=True)


@lru_cache(maxsize=1)
def _dino(path: str) -> DinoFeatures:
    return DinoFeatures(path)
