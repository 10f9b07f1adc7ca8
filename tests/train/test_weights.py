"""Masters, averages and the frozen reference."""

from __future__ import annotations

import pytest
import torch
from fake import Bench, Fake
from torch import nn

from tempflow.core.ema import Ema
from tempflow.train.guards import GuardError
from tempflow.train.weights import Trainable, WeightSet


def layer(dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.bias.fill_(-1.0)
    return linear


def test_float32_masters_are_the_parameters_themselves() -> None:
    network = layer()
    trainable = Trainable(network)
    assert trainable.names == ["weight", "bias"]
    assert all(m is p for m, p in zip(trainable.masters, network.parameters(), strict=True))
    network(torch.ones(1, 3)).sum().backward()
    trainable.collect()
    assert trainable.masters[0].grad is network.weight.grad is not None
    trainable.zero_grad()
    assert network.weight.grad is None


def test_only_what_requires_gradients_is_trained_and_nothing_is_an_error() -> None:
    network = layer()
    network.weight.requires_grad_(False)
    assert Trainable(network).names == ["bias"]
    network.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires gradients"):
        Trainable(network)


def test_bfloat16_masters_keep_updates_smaller_than_its_resolution() -> None:
    network = layer(torch.bfloat16)
    trainable = Trainable(network)
    assert all(m.dtype == torch.float32 for m in trainable.masters)
    optimizer = torch.optim.SGD(trainable.masters, lr=1e-3)
    seen = []
    for _ in range(40):
        trainable.zero_grad()
        network(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        trainable.collect()
        optimizer.step()
        trainable.publish()
        seen.append(network.weight[0, 0].item())
    assert seen[0] == 1.0  # one step alone is rounded away …
    assert trainable.masters[0][0, 0].item() == pytest.approx(1 - 40e-3, abs=1e-6)
    assert seen[-1] == float(torch.tensor(1 - 40e-3).bfloat16()) < 1.0  # … forty are not
    assert network.weight.dtype == torch.bfloat16


def test_bfloat16_gradients_are_added_up_in_float32() -> None:
    """256 + 1 has no bfloat16: added there, the small micro-batches would be lost."""
    network = layer(torch.bfloat16)
    trainable = Trainable(network)
    for size in (256.0, 1.0, 1.0, 1.0):
        network(torch.full((1, 3), size, dtype=torch.bfloat16)).sum().backward()
        trainable.collect()
        assert network.weight.grad is None
    assert trainable.masters[0].grad is not None
    assert bool((trainable.masters[0].grad == 259.0).all()) and bool((trainable.masters[1].grad == 4.0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_a_copy_that_load_puts_back(dtype: torch.dtype) -> None:
    network = layer(dtype)
    trainable = Trainable(network)
    with torch.no_grad():
        trainable.masters[0].add_(1e-4)
    trainable.publish()
    kept, published = trainable.state(), network.weight.detach().clone()
    assert all(t.dtype == torch.float32 for t in kept.values())
    with torch.no_grad():
        trainable.masters[0].fill_(7.0)
    trainable.publish()
    assert network.weight[0, 0].item() == 7.0 and float(kept["weight"][0, 0]) == pytest.approx(1.0001)
    trainable.load(kept)
    assert torch.equal(network.weight, published)
    assert all(torch.equal(kept[n], t) for n, t in trainable.state().items())


def test_average_follows_its_formula() -> None:
    trainable = Trainable(layer())
    average = WeightSet(trainable, Ema(0.5))
    want = 1.0
    for n in range(1, 9):
        with torch.no_grad():
            trainable.masters[0].fill_(float(n * n))
        average.update()
        decay = min(0.5, (1 + n) / (10 + n))  # warmed up: the first updates count more
        want = decay * want + (1 - decay) * n * n
        assert average.values[0][0, 0].item() == pytest.approx(want, rel=1e-6)
    assert (1 + 8) / (10 + 8) == 0.5  # so both branches of the minimum were taken or met


def test_average_is_applied_and_taken_back_even_after_an_error() -> None:
    network = layer(torch.bfloat16)
    trainable = Trainable(network)
    average = WeightSet(trainable, Ema(0.9))
    with torch.no_grad():
        trainable.masters[0].fill_(3.0)
    trainable.publish()
    average.update()
    kept = trainable.state()
    with pytest.raises(RuntimeError, match="stop"), average.applied():
        mean = average.values[0][0, 0].item()
        assert 1.0 < mean < 3.0
        assert network.weight[0, 0].item() == float(torch.tensor(mean).bfloat16())
        raise RuntimeError("stop")
    assert network.weight[0, 0].item() == 3.0
    assert all(torch.equal(kept[n], t) for n, t in trainable.state().items())


# -------------------------------------------------------------------------------------------------------------- float16
def test_a_scaled_loss_gives_the_gradient_that_float32_gives() -> None:
    """Without the scale the half of a small gradient would be 0."""
    exact, half = Bench(), Bench(Fake(dtype=torch.float16))
    assert half.trainable.loss_scale == 2.0**16 and exact.trainable.loss_scale == 1
    for bench in (exact, half):
        bench.iterate()
    for a, b in zip(exact.trainable.masters, half.trainable.masters, strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).abs().max() <= 0.05 * a.grad.abs().max()


def test_an_overflow_halves_the_scale_and_moves_nothing() -> None:
    bench = Bench(Fake(dtype=torch.float16))
    bench.trainable.loss_scale = 2.0**40
    before = bench.trainable.state()
    metrics = bench.iterate()
    assert metrics["updates"] == 0 and bench.trainable.loss_scale == 2.0**39
    assert all(torch.equal(before[n], t) for n, t in bench.trainable.state().items())
    assert bench.said == ["iteration 1: no step; the loss's scale is halved to 5.49756e+11"]
    for iteration in range(1, 40):
        if bench.iterate(iteration)["updates"]:
            break
    assert not all(torch.equal(before[n], t) for n, t in bench.trainable.state().items())
    assert 1 < bench.trainable.loss_scale < 2.0**39


def test_a_fault_that_no_scale_mends_is_a_fault() -> None:
    bench = Bench(Fake(dtype=torch.float16))
    experience = bench.collect()
    with torch.no_grad():
        bench.trainable.masters[0].fill_(float("nan"))
    bench.trainable.publish()
    with pytest.raises(GuardError, match=r"iteration 1: non_finite: the loss is nan\. No weight was changed"):
        bench.update(experience)
    assert bench.trainable.loss_scale == 2.0**16


def test_the_scale_grows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempflow.train.weights.GROWS", 3)
    trainable = Trainable(Fake(dtype=torch.float16).network)
    seen = [trainable.rescale(finite) for finite in (True, True, False, True, True, True)]
    assert seen == [False, False, True, False, False, False] and trainable.loss_scale == 2.0**16
    trainable.loss_scale = 2.0**24
    for _ in range(3):
        trainable.rescale(True)
    assert trainable.loss_scale == 2.0**24
