"""Several networks as one: every row goes to the network of its noise level, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tempflow.models.experts import Experts
from tempflow.models.lora import fresh_adapter, lora_of, merge, paired


class Times(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))
        self.rows: list[int] = []

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.by * x + bias


def three() -> tuple[Experts, list[Times]]:
    networks = [Times(2.0), Times(3.0), Times(5.0)]
    return Experts(dict(zip(("high", "middle", "low"), networks, strict=True)), (0.8, 0.3)), networks


def test_every_row_goes_to_the_network_of_its_noise_level() -> None:
    experts, networks = three()
    sigma, x = torch.tensor([0.1, 1.0, 0.3, 0.8, 0.29999, 0.5]), torch.arange(1.0, 7.0)[:, None]
    bias = torch.linspace(0, 1, 6)[:, None]
    by = torch.tensor([5.0, 2.0, 3.0, 2.0, 5.0, 3.0])[:, None]  # a boundary belongs to the noisier side
    assert torch.equal(experts(sigma, x=x, bias=bias), by * x + bias)
    assert [n.rows for n in networks] == [[2], [2], [2]]
    assert list(dict(experts.named_parameters())) == ["high.by", "middle.by", "low.by"]


def test_only_those_with_rows_have_a_gradient() -> None:
    experts, (high, middle, low) = three()
    sigma, x = torch.tensor([0.9, 0.2, 0.85]), torch.tensor([1.0, 10.0, 100.0])[:, None]
    experts(sigma, x=x, bias=torch.zeros(3, 1)).sum().backward()
    assert high.by.grad == 101 and low.by.grad == 10 and middle.by.grad is None and middle.rows == []
    assert torch.equal(experts(torch.full((3,), 0.5), x=x, bias=x), 3 * x + x) and middle.rows == [3]


@pytest.mark.parametrize(
    ("names", "boundaries", "message"),
    [
        (("a",), (), "for 1 networks"),
        (("a", "b"), (), r"boundaries: \[\] for 2 networks"),
        (("a", "b"), (1.0,), "must fall from below 1 to above 0"),
        (("a", "b", "c"), (0.3, 0.8), "must fall"),
    ],
)
def test_boundaries_that_make_no_sense(names: Sequence[str], boundaries: Sequence[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts({name: nn.Identity() for name in names}, boundaries)


def test_a_lora_lies_on_all_of_them_and_is_read_back_by_its_layers() -> None:
    experts = Experts({"transformer": Net(), "transformer_2": Net()}, (0.5,))
    fresh_adapter(experts, 2, 4, ["q"])
    found = lora_of(experts)
    assert set(found) == {"transformer.blocks.0.q", "transformer_2.blocks.0.q"}
    trained = {name: p for name, p in experts.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(generator=torch.Generator().manual_seed(len(parameter)))
    x, sigma = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.1, 0.7, 0.2])
    want = experts(sigma, x=x)
    plain = Experts({"transformer": Net(), "transformer_2": Net()}, (0.5,))
    merge(plain, paired(trained, 2.0))
    torch.testing.assert_close(plain(sigma, x=x), want)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 6)})])
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0]["q"](x)  # type: ignore[index]
