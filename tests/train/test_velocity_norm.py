"""The guard of velocities' size through the loop: measured where asked, refused where it cannot be, else silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Bench, Fake, brightness, config, flow, weights
from test_parallel import launch

from tempflow.algorithms import Algorithm, dgpo, diffusion_nft, online_dpo, v_grpo
from tempflow.config import load_config, to_yaml
from tempflow.strict import ConfigError
from tempflow.train.guards import GuardError
from tempflow.train.trainer import train

NFT: dict[str, Any] = {"name": "diffusion_nft", "steps": 4, "group": 6}
MAKE = {
    "leaves": lambda: diffusion_nft(4, 6),
    "groups": lambda: dgpo(4, 6),
    "pairs": lambda: online_dpo(4, 6, 2),
    "edges": lambda: flow(kl=0.05),
}


@pytest.mark.parametrize("kind", MAKE)
def test_before_any_update_it_is_one_and_what_is_learnt_is_the_same(kind: str) -> None:
    algorithm: Algorithm = MAKE[kind]()
    plain, measured = Bench(algorithm=algorithm, train_rows=12), Bench(algorithm=algorithm, train_rows=12, norms=True)
    metrics, more = plain.iterate(), measured.iterate()
    assert more.keys() - metrics.keys() == {"velocity_norm"} and "velocity_norm" not in metrics
    assert more["velocity_norm"] == pytest.approx(1, abs=1e-6)
    assert all(more[name] == value for name, value in metrics.items())
    left, right = weights(plain.model), weights(measured.model)
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert plain.counter == measured.counter and plain.model.rows == measured.model.rows, "it costs no forward"


def test_it_follows_the_policy() -> None:
    bench = Bench(algorithm=diffusion_nft(4, 6), norms=True)
    bench.iterate()
    with torch.no_grad():
        bench.model.network.mean.bias.add_(3.0)
    assert bench.iterate(1)["velocity_norm"] > 1.5


@pytest.mark.parametrize("updates", [1, 2])
def test_micro_batches_do_not_change_it(updates: int) -> None:
    found = []
    for rows in (1, 7, 1000):
        bench = Bench(algorithm=diffusion_nft(4, 6, kl=0.1), norms=True, train_rows=rows, updates=updates)
        with torch.no_grad():
            bench.model.network.mean.bias.add_(torch.linspace(-1, 2, 8))
        found.append(bench.iterate()["velocity_norm"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-5) and abs(found[0] - 1) > 0.05


def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    launch(1, "ddp", tmp_path / "one", "nft_norms")
    launch(2, "ddp", tmp_path / "two", "nft_norms")
    one, two = (json.loads((tmp_path / n / "nft_norms" / "metrics.json").read_text()) for n in ("one", "two"))
    assert one["velocity_norm"] == pytest.approx(two["velocity_norm"], rel=1e-6)
    assert abs(one["velocity_norm"] - 1) > 0.05, "the policy was moved, so that there is something to measure"


def test_a_run_that_asks_writes_it_and_one_that_does_not_is_as_before(tmp_path: Path) -> None:
    quiet = config(tmp_path / "quiet", iterations=2, algorithm=NFT)
    asked = config(tmp_path / "asked", iterations=2, algorithm=NFT, guards={"velocity_norm": {"action": "warn"}})
    for settings in (quiet, asked):
        train(settings, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("quiet", "asked")
    ]
    for before, after in zip(*lines, strict=True):
        assert "velocity_norm" not in before
        assert {k: v for k, v in after.items() if k != "velocity_norm"} == before and after["velocity_norm"] > 0
    written = (tmp_path / "asked" / "config.yaml").read_text()
    assert "velocity_norm:\n    action: warn\n    limit: 1.5\n" in written
    assert load_config(tmp_path / "asked" / "config.yaml") == asked and to_yaml(asked) == written
    assert load_config(tmp_path / "quiet" / "config.yaml") == quiet


def test_it_stops_a_run_that_inflates(tmp_path: Path) -> None:
    settings = config(
        tmp_path / "run",
        algorithm=NFT,
        optimizer={"learning_rate": 1.0},
        guards={"velocity_norm": {"action": "stop", "limit": 1.1}},
    )
    with pytest.raises(GuardError, match=r"velocity_norm: the RMS of the policy's velocities is .* × the starting"):
        train(settings, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [({"name": "v_grpo", "steps": 4, "pairs": 2}, "v_grpo"), (NFT | {"kl": 0.0}, "diffusion_nft")],
)
def test_without_a_reference_it_is_refused(algorithm: dict[str, Any], name: str, tmp_path: Path) -> None:
    said = (
        rf"guards.velocity_norm.action: 'warn' compares with the starting model, which the loss of {name} does not ask "
        r"here \(its KL may be 0\); nearest valid: 'off'"
    )
    with pytest.raises(ValueError, match=said):
        config(tmp_path / "run", algorithm=algorithm, guards={"velocity_norm": {"action": "warn"}})


def test_an_algorithm_given_as_an_object_is_checked_too(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", algorithm=NFT, guards={"velocity_norm": {"action": "warn"}})
    model = Fake()
    with pytest.raises(ValueError, match=r"which the loss of v_grpo does not ask"):
        train(settings, model=model, reward=brightness, prompts=PROMPTS, algorithm=v_grpo(4, 6, 2), quiet=True)
    assert not model.rows and not (tmp_path / "run").exists(), "before the first forward"


def test_a_limit_of_one_is_no_limit() -> None:
    from tempflow.config.guards import GuardsConfig
    from tempflow.strict import validated

    with pytest.raises(ConfigError, match=r"velocity_norm.limit: 1.0 must be above 1"):
        validated(GuardsConfig, {"velocity_norm": {"limit": 1.0}})
