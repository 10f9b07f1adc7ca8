"""Step-wise credit: what each step of the sampler was given to learn from in one iteration."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tempflow.core.credit import Advantage, Credit
from tempflow.core.forest import Forest
from tempflow.core.groups import moments
from tempflow.core.scores import Scores
from tempflow.train.step import Credit as Given


def by_step(
    forest: Forest, advantage: Advantage, weight: Tensor, value: Tensor | None = None, group: Tensor | None = None
) -> list[dict[str, Any]]:
    """A line for every trained step, ascending; means are over its trained edges that have a valid score.

    weight [E]: as the loss has it. value [E] (`forest.backup` of the scores) and group [E] (`credit.group_index`):
    which edges are compared; without them there is no `spread`. A step without a valid edge has None for its means.

    step       i, from σ_i to σ_{i+1}
    edges      trained edges with a valid score
    failed     trained edges without
    live       share of `edges` whose group has spread, 0 … 1
    advantage  mean |A|
    spread     mean standard deviation (population) of the values in an edge's group, in the reward's unit
    weight     mean weight
    credit     mean weight · |A|: what the step gets
    """
    edges = forest.edges
    size, steps = advantage.value.abs().double(), edges.step
    trained, scale = edges.trained, weight.double()
    spread = None
    if value is not None and group is not None:
        spread = moments(value, trained & advantage.ok, group, unbiased=False)[1]
    lines: list[dict[str, Any]] = []
    for step in steps[trained].unique().tolist():
        here = trained & (steps == step)
        valid = here & advantage.ok
        count = int(valid.sum())
        line: dict[str, Any] = {"step": step, "edges": count, "failed": int(here.sum()) - count}
        columns = {"live": advantage.live.double(), "advantage": size, "spread": spread, "weight": scale}
        columns["credit"] = scale * size
        line |= {
            name: column[valid].mean().item() if count else None
            for name, column in columns.items()
            if column is not None
        }
        lines.append(line)
    return lines


def steps_of(credit: Credit, scores: Scores, forest: Forest, given: Given) -> list[dict[str, Any]]:
    """`by_step` with the groups in which `credit` compared the leaves' scores."""
    value, _ = forest.backup(*scores.total(credit.reward_weights))
    return by_step(forest, given.advantage, given.weight, value, credit.groups(forest.edges))
