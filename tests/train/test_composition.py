"""Runs with several rewards: schedules of weights, gates, products, prompts left out, and rewards that load first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, brightness, config
from PIL import Image

from tempflow.config import Config
from tempflow.core.credit import GroupZScore, MinNorm, PerReward, normalised
from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards import from_function
from tempflow.rewards.compose import Composition
from tempflow.strict import validated
from tempflow.train.experience import credit
from tempflow.train.trainer import Run, train

Images = list[Image.Image]


def darkness(images: Images, prompts: list[str]) -> list[float | None]:
    return [None if b is None else 1 - b for b in brightness(images, prompts)]


def go(output: Path, reward: Any, **changes: Any) -> Run:
    return train(config(output, **changes), model=Fake(), reward=reward, prompts=PROMPTS, quiet=True)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_product_is_learned_from_and_reported(tmp_path: Path) -> None:
    run = go(tmp_path / "run", [brightness, from_function(brightness, "again")], composition={"how": "product"})
    report = run.after
    assert report.scores.names == ("brightness", "again", "reward")
    product = report.scores.value[:, 0] * report.scores.value[:, 1]
    torch.testing.assert_close(report.scores.value[:, 2], product)
    assert run.after.mean("reward") > run.before.mean("reward") + 0.02
    assert all("reward/reward" in line for line in lines(run))


def test_two_rewards_that_cancel_teach_nothing_by_their_sum_but_by_their_product(tmp_path: Path) -> None:
    moved = []
    for how in ("sum", "product"):
        bench = Bench(rewards=[from_function(brightness), from_function(darkness, "darkness")])
        names = ["brightness", "darkness"]
        bench.context = replace(
            bench.context,
            compose=Composition(dict.fromkeys(names, 1.0), "product") if how == "product" else None,
            algorithm=replace(
                bench.context.algorithm,
                credit=bench.context.algorithm.credit.weighted({"reward": 1.0} if how == "product" else None),
            ),
        )
        advantage = credit(bench.context, bench.collect()).advantage
        moved.append(float(advantage.value[advantage.live].abs().sum()))
    assert moved[0] < 1e-2 * moved[1] and moved[1] > 1


def test_weights_follow_their_schedule_and_evaluations_the_last(tmp_path: Path) -> None:
    c = config(
        tmp_path / "run",
        iterations=5,
        rewards=[{"name": "shapes", "schedule": {1: 1.0, 3: 0.0}}, {"name": "shapes_strict", "weight": 0.5}],
    )
    assert [c.weights_at(i)["shapes"] for i in range(5)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert c.reward_weights == {"shapes": 0.0, "shapes_strict": 0.5}
    bench = Bench()
    context = replace(bench.context, scheduled=c.weights_at)
    assert context.at(2).algorithm.credit.reward_weights == {"shapes": 0.5, "shapes_strict": 0.5}
    composed = replace(context, compose=Composition({"shapes": 1.0}, gates={"shapes": 0.1})).at(3)
    assert composed.compose is not None and composed.compose.weights["shapes"] == 0.0
    assert bench.context.at(3) is bench.context


@pytest.mark.parametrize(
    ("rewards", "composition", "said"),
    [
        ([{"name": "shapes", "schedule": {-1: 1.0}}], {}, "rewards.0.schedule: -1 is no iteration; nearest valid: 0"),
        ([{"name": "shapes", "schedule": {0: 0.0}}], {}, "rewards: all weights are 0"),
        ([{"name": "shapes", "at_least": 0.5}], {"how": "normalised"}, "rewards.0.at_least: 0.5, but how 'normalised'"),
        ([{"name": "shapes", "stream": "sound"}], {"how": "product"}, "rewards.0.stream: 'sound', but products"),
        ([{"name": "a b", "kind": "shapes"}], {}, "rewards.0.name: 'a b' names a column; nearest valid: 'a_b'"),
        ([{"name": "reward", "kind": "shapes"}], {}, "rewards.0.name: 'reward' names a column"),
        ([{"name": "x", "kind": "shape"}], {}, "rewards.0.kind: 'shape' is no known reward; nearest valid: 'shapes'"),
        ([{"name": "shapes", "options": {"size": 3}}], {}, "rewards.0.options.size: unknown field"),
        ([{"name": "shapes"}], {"drop_above": 0}, "composition.drop_above: 0 must be above 0"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, rewards: list[dict[str, Any]], composition: dict[str, Any], said: str
) -> None:
    given = config(tmp_path).model_dump() | {"rewards": rewards, "composition": composition}
    with pytest.raises(ValueError) as error:
        validated(Config, given)
    assert str(error.value).partition("\n")[0].startswith(said), error.value


def test_two_rewards_of_one_kind_are_two_columns(tmp_path: Path) -> None:
    c: Config = config(tmp_path, rewards=[{"name": "one", "kind": "shapes"}, {"name": "two", "kind": "shapes"}])
    assert c.reward_weights == {"one": 1.0, "two": 1.0}


def test_a_run_with_a_gate_trains_on_what_passes(tmp_path: Path) -> None:
    bench = Bench()
    made = bench.collect()
    least = float(made.scores.value[:, 0].median())
    bench.context = replace(
        bench.context, compose=Composition({"brightness": 1.0}, gates={"brightness": least}, gated=-1.0)
    )
    gated = bench.collect().scores
    low = gated.value[:, 0] < least
    assert low.any() and (gated.value[low, 1] == -1).all() and torch.equal(gated.value[~low, 1], gated.value[~low, 0])


class Loads:
    """A reward that has to load, and that knows one word alone."""

    name, groupwise = "loads", False

    def __init__(self, broken: bool = False) -> None:
        self.broken, self.loaded = broken, 0

    def prepare(self) -> None:
        if self.broken:
            raise ValueError("loads: missing keys head.weight")
        self.loaded += 1

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        assert len(prompts) == len(metadata)
        if "fog" in prompts and self.broken is None:
            raise ValueError("prompts: 'fog' cannot be judged")

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        assert self.loaded
        value = media.pictures().float().mean((1, 2, 3))[:, None] / 255
        return Scores(value, torch.ones_like(value, dtype=torch.bool), (self.name,))


def test_a_reward_loads_once_before_the_first_rollout(tmp_path: Path) -> None:
    reward = Loads()
    go(tmp_path / "run", reward)
    assert reward.loaded == 1


@pytest.mark.parametrize(
    ("broken", "said"), [(True, "loads: missing keys"), (None, r"reward 'loads': train: prompts: 'fog' cannot")]
)
def test_what_cannot_load_or_judge_stops_before_anything_is_written(tmp_path: Path, broken: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        go(tmp_path / "run", Loads(broken))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_normalised_stands_innermost_and_keeps_what_selects() -> None:
    inner = GroupZScore(("prompt",))
    assert normalised(PerReward(inner)) == PerReward(inner)
    with pytest.raises(ValueError, match="min-norm"):
        normalised(MinNorm(inner))
