"""Groups of real `shapes` samples, and surrogates of their likelihood: what `surrogate` and `precision` start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempflow.algorithms import v_grpo
from tempflow.core.likelihood_proxy import LikelihoodProxy
from tempflow.core.objective.leaves import noised, renoise_leaves
from tempflow.core.renoise import Renoise
from tempflow.core.schedule import Schedule
from tempflow.core.times import Id
from tempflow.data.prompts import load_prompts
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.protocol import Model, Predict
from tempflow.recipes.shapes import REWARDS
from tempflow.rewards import build
from tempflow.train.context import Clock, Context, Counter
from tempflow.train.experience import credit
from tempflow.train.source import collect
from tempflow.train.update import predictors

SIZE = Size(32, 32)
GROUP = 24
ROWS = 96
"""At most, of a forward."""


@dataclass(frozen=True, eq=False)
class Group:
    """`prompts` groups of GROUP samples: x0 [N, *S], rows, slot, root and advantage [N], in prompt order.

    The advantage is V-GRPO's, (R − mean)/(std + 0.1), of the recipes' two rewards.
    """

    model: Model
    predict: Predict
    schedule: Schedule
    texts: tuple[str, ...]
    x0: Tensor
    rows: Tensor
    root: Tensor
    advantage: Tensor

    @property
    def prompts(self) -> int:
        return len(self.x0) // GROUP

    @property
    def text(self) -> str:
        return self.texts[int(self.rows[0])]

    def ids(self, redraw: int) -> list[Id]:
        """(redraw, slot, root) of every sample."""
        return [(redraw, int(slot), int(root)) for slot, root in zip(self.rows, self.root, strict=True)]

    def every(self, stride: int) -> Group:
        """Each `stride`-th of its samples."""
        return self._some(slice(None, None, stride))

    def _some(self, part: slice) -> Group:
        fields = ("x0", "rows", "root", "advantage")
        return replace(self, **{name: getattr(self, name)[part] for name in fields})

    def spread_out(self) -> list[Group]:
        """Its groups one by one, those with the largest advantages first."""
        parts = [slice(start, start + GROUP) for start in range(0, len(self.x0), GROUP)]
        parts.sort(key=lambda p: -float(self.advantage[p].square().sum()))
        return [self._some(part) for part in parts]


def group_of(prompts: int, steps: int) -> Group:
    """Samples of the untrained float32 model by the ODE, for prompts spread over the training ones."""
    model = load("shapes", dtype="float32")
    model.train_fully()
    algorithm = v_grpo(steps, GROUP, eps=0.1)
    context = Context(
        model=model,
        algorithm=algorithm,
        schedule=model.schedule(steps, SIZE),
        size=SIZE,
        guidance=1.0,
        rewards=[build(r["name"]) for r in REWARDS],
        seed=3,
        rollout_rows=ROWS,
        train_rows=ROWS,
        updates=1,
        max_grad_norm=1.0,
        sets={},
    )
    chosen = list(load_prompts("shapes:train"))
    chosen = chosen[:: len(chosen) // prompts][:prompts]
    experience = collect(context, chosen, 0, Counter(), Clock()).of(context.algorithm.first)
    edges = experience.forest.edges
    return Group(
        model=model,
        predict=predictors(context, experience.prompts)["policy"],
        schedule=experience.schedule,
        texts=tuple(p.text for p in chosen),
        x0=experience.forest.nodes[edges.child].float(),
        rows=edges.prompt,
        root=experience.numbers,
        advantage=credit(context, experience).advantage.value.float(),
    )


@torch.no_grad()
def values(
    group: Group, draws: Renoise, redraw: int, surrogates: Mapping[str, LikelihoodProxy], seed: int
) -> dict[str, Tensor]:
    """Each surrogate of every sample at its own pairs, [N, M]; all from one forward a pair."""
    batch = renoise_leaves(group.x0, group.advantage, group.rows, group.ids(redraw), draws, seed, group.schedule)
    per = max(1, ROWS // batch.pairs)
    found = {name: list[Tensor]() for name in surrogates}
    for start in range(0, len(batch), per):
        at = noised({"policy": group.predict}, ("policy",), batch.take(slice(start, start + per)))
        for name, surrogate in surrogates.items():
            found[name].append(at.by_sample(surrogate(at.policy, at.x0, at.noise, at.t)))
    return {name: torch.cat(parts) for name, parts in found.items()}
