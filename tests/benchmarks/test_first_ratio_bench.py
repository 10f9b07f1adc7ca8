"""The first ratio in bfloat16: its benchmark at a tiny size, and every recipe on a tiny pipeline of its family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import first_ratio as bench
from tempflow.config import Config, Stages
from tempflow.core.dynamics import FlowSDE
from tempflow.models.sd3 import SD3
from tempflow.recipes import RECIPES
from tempflow.request import Prompt
from tempflow.train.context import Clock, Counter
from tempflow.train.source import collect

PROMPTS = [Prompt("a red circle"), Prompt("two blue squares")]
HELD, LIMIT = 6.0, 12.0
"""Roundings: what healthy cells stay below, and where the guard stops."""


@pytest.fixture(scope="module")
def tiny() -> SD3:
    return bench.model_of("tiny", "bfloat16")


def check(model: SD3, kind: str, plan: str, guidance: float, rows: tuple[int, int]) -> None:
    dynamics, clip = bench.KINDS[kind]
    context = bench.setting_for(model, dynamics, bench.plans_of(4, 4)[plan], clip, guidance, rows, 0)
    with bench.SplitSums():
        experience = collect(context, PROMPTS, 0, Counter(), Clock())
        seen = bench.first_update(context, experience)
        assert seen.ratio == 0 and 0 < seen.roundings < HELD
        networks = {"dropout": bench.with_dropout(model)}
        for fault, policy in bench.faults(context, [p.text for p in PROMPTS], networks).items():
            wrong = bench.first_update(context, experience, policy)
            assert wrong.roundings > LIMIT and wrong.difference > 10 * seen.difference, (fault, wrong, seen)


def test_a_cell_of_the_table(tiny: SD3) -> None:
    torch.manual_seed(0)
    check(tiny, "Flow-GRPO's SDE", "chain", 4.5, (24, 6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", bench.KINDS)
@pytest.mark.parametrize("plan", bench.plans_of(4, 4))
@pytest.mark.parametrize("guidance", bench.GUIDANCE)
def test_every_cell_of_the_table(tiny: SD3, kind: str, plan: str, guidance: float) -> None:
    torch.manual_seed(0)
    check(tiny, kind, plan, guidance, (7, 96))


def test_it_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    some = ["--kinds", "CPS", "--plans", "window", "--seeds", "0"]
    bench.main([*some, "--steps", "4", "--prompts", "1", "--roots", "2", "--older", "1", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert "| CPS | window | 0 | 1e-06 |" in printed and "| bfloat16 | 6 | 3 |" in printed


# ------------------------------------------------------------------------------------------------------- the recipes
SMALL = {
    "sd35_medium_tempflow": {"steps": 5, "seeds": 1},
    "cogview4_flow_grpo": {"steps": 5},
    "lumina2_flow_grpo": {"steps": 5},
}
"""What of a recipe is made smaller: forwards, not what may differ between rollout and training."""


def trajectory(config: Config | Stages) -> bool:
    """Stages are of few-step students, whose grids the tiny model does not walk."""
    if isinstance(config, Stages):
        return False
    return "edges" in config.algorithm.build().first.keeps and config.algorithm.build().latent_reward is None


def check_recipe(name: str) -> None:
    """Its dtype (bfloat16 where it says auto), guidance, rows and clip; one prompt, so that 24/6 and 192/96 remain."""
    config = RECIPES[name]()
    algorithm = type(config.algorithm).model_validate(config.algorithm.model_dump() | SMALL.get(name, {})).build()
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    model = bench.model_of("tiny", dtype)
    plain = algorithm.objective
    heard = algorithm.taught(bench.Heard(plain.clip, plain.ratio, plain.regularizers))
    rows, grown = (config.rollout_rows, config.train_rows), bench.plans_of(4, 1)["chain"]
    any_other = bench.setting_for(model, FlowSDE(0.7), grown, 1e-4, config.model.guidance, rows, config.seed)
    context = replace(
        any_other,
        algorithm=heard,
        schedule=model.schedule(algorithm.steps, bench.SIZE),
        sets=dict.fromkeys(algorithm.sets, model.network),
    )
    with bench.SplitSums():
        experience = collect(context, PROMPTS[:1], 0, Counter(), Clock())
        seen = bench.first_update(context, experience)
    assert seen.ratio == 0 <= algorithm.objective.tightest_clip / 10 and seen.roundings < LIMIT


def test_the_shipped_recipe_for_sd35_passes_its_first_update() -> None:
    check_recipe("sd35_medium_tempflow")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if trajectory(recipe())])
def test_each_shipped_recipe_passes_its_first_update(name: str) -> None:
    check_recipe(name)
