"""Weight sets beside a LoRA or a fully trained network: asking them changes nothing of what is trained, and no gradient
reaches them."""

from __future__ import annotations

import pytest
import torch
from worlds import NOISE, SIZE, World

from tempflow.core.ema import Copy, Ema, Frozen
from tempflow.core.objective.edges import Predict
from tempflow.core.objective.leaves import LeafBatch
from tempflow.core.objective.matching import NegativeAware
from tempflow.core.objective.regularizer import PredictionDistance
from tempflow.models.sd3 import SD3
from tempflow.request import asked
from tempflow.train.weights import Trainable, WeightSet

RULES = {"old": Copy(), "reference": Frozen(), "ema": Ema(0.5)}
HEAD = NegativeAware(regularizers=(PredictionDistance("reference", 0.1), PredictionDistance("ema", 0.1)))


def trained(adapter: SD3, kind: str) -> set[str]:
    """Marks what is trained, off the start where LoRA's A has no gradient, and names it."""
    if kind == "full":
        adapter.train_fully()
    else:
        adapter.add_lora(4, 8)
        with torch.no_grad():
            for name, p in adapter.network.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return {n for n, p in adapter.network.named_parameters() if p.requires_grad}


def leaves(adapter: SD3, world: World) -> LeafBatch:
    x0, noise = (NOISE.initial([(p, seed) for p in range(3)], adapter.noise_shape(world.size)) for seed in (0, 1))
    rows = torch.arange(3)
    return LeafBatch(x0, torch.tensor([2.0, -1.0, -1.0]), rows, 0 * rows, torch.full((3, 1), 0.6), noise[:, None])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_asking_other_sets_leaves_the_policy_trainable_and_them_without_gradients(
    fresh: SD3, world: World, kind: str
) -> None:
    names = trained(fresh, kind)
    trainable = Trainable(fresh.network)
    sets = {name: WeightSet(trainable, rule) for name, rule in RULES.items()}
    condition, batch = fresh.encode(asked(world.prompts), SIZE), leaves(fresh, world)
    models: dict[str, Predict] = {name: fresh.predictor(condition, 1.0, s.network()) for name, s in sets.items()}
    models["policy"] = fresh.predictor(condition, 1.0)
    start = {n: p.detach().clone() for n, p in fresh.network.named_parameters()}
    reference = {name: value.clone() for name, value in sets["reference"].named().items()}
    optimizer = torch.optim.SGD(trainable.masters, lr=0.1)
    with_gradient = None
    for _ in range(2):
        trainable.zero_grad()
        HEAD(models, batch).value.backward()
        got = {n for n, p in fresh.network.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        assert got <= names and len(got) > len(names) // 2, "what is not trained gets no gradient"
        assert with_gradient in (None, got), "the second backward reaches what the first did"
        with_gradient = got
        optimizer.step()
        for one in sets.values():
            assert all(v.grad is None and not v.requires_grad for v in one.values)
            one.update()
            with one.applied(), torch.no_grad():
                models["policy"](batch.x0, batch.t[:, 0], batch.rows)
        assert {n for n, p in fresh.network.named_parameters() if p.requires_grad} == names
    now = dict(fresh.network.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in start.items() if n not in names), "the base stands still"
    assert any(not torch.equal(now[n], start[n]) for n in names)
    assert all(torch.equal(v, reference[n]) for n, v in sets["reference"].named().items())
    assert all(torch.equal(v, now[n]) for n, v in sets["old"].named().items())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_set_computes_with_its_own_weights_and_the_policy_with_the_policys(
    fresh: SD3, world: World, kind: str
) -> None:
    names = trained(fresh, kind)
    old = WeightSet(Trainable(fresh.network), Frozen())
    condition, batch = fresh.encode(asked(world.prompts), SIZE), leaves(fresh, world)
    policy, before = fresh.predictor(condition, 1.0), fresh.predictor(condition, 1.0, old.network())
    ask = (batch.x0, batch.t[:, 0], batch.rows)
    with torch.no_grad():
        start = policy(*ask)
        for n, p in fresh.network.named_parameters():
            if n in names:
                p.add_(0.02)
        assert torch.equal(before(*ask), start) and float((policy(*ask) - start).abs().max()) > 1e-3
        assert torch.equal(before(*ask), start), "in turn with the policy too"
    assert policy(*ask).requires_grad and not before(*ask).requires_grad
