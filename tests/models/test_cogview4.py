"""What CogView4 alone has: a time before the shift, forwards by the length of the text, no shift of the autoencoder."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import cogview4
from torch import Tensor, nn

from tempflow import models
from tempflow.media import Size
from tempflow.models.cogview4 import check_cogview4
from tempflow.models.quiet import quiet
from tempflow.request import Prompt

SIZE = Size(*cogview4.SIZES[0])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("cogview4") / "model"
    with quiet():
        cogview4.pipeline().save_pretrained(place)
        return models.load(str(place))


SHIFTS = [
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"use_dynamic_shifting": True, "time_shift_type": "exponential"},
    {"use_dynamic_shifting": False, "shift": 3.0},
    {"use_dynamic_shifting": False, "shift": 0.4},
]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("size", [SIZE, Size(1024, 1024), Size(2048, 1536)])
def test_the_shift_is_turned_back_at_the_grid_and_off_it(adapter: Any, shift: dict[str, Any], size: Size) -> None:
    kept, shape = adapter.pipe.scheduler, adapter.noise_shape(size)
    adapter.pipe.scheduler = type(kept).from_config(kept.config, **shift)
    try:
        for steps in (1, 7, 50, 1000):
            fresh = type(kept).from_config(adapter.pipe.scheduler.config)
            adapter.set_timesteps(fresh, steps, shape)
            sigmas = adapter.schedule(steps, size).sigmas
            assert torch.equal(adapter.times(sigmas[:-1], *shape[1:]), fresh.timesteps)
            assert float(adapter.times(sigmas[-1:], *shape[1:])) == 0
        u = torch.linspace(0.0005, 1, 999, dtype=torch.float64)
        mu = adapter._mu(*shape[1:])
        linear = mu if shift["use_dynamic_shifting"] else shift["shift"]
        strength = math.exp(mu) if shift.get("time_shift_type") == "exponential" else linear
        sigma = strength / (strength + 1 / u - 1)
        told = max(strength, 1 / strength) * 1e-3  # to what float32 tells it
        for off_grid in (sigma, sigma.float()):
            assert torch.allclose(adapter.times(off_grid, *shape[1:]).double(), 1000 * u, rtol=0, atol=told)
    finally:
        adapter.pipe.scheduler = kept


def test_rows_of_one_length_share_a_forward_and_come_back_in_their_order(adapter: Any) -> None:
    texts = [cogview4.PROMPTS[i] for i in (1, 0, 1, 2, 0)]
    assert len({len(adapter.pipe.tokenizer(text).input_ids) > 16 for text in texts}) == 2
    condition = adapter.encode([Prompt(text) for text in texts], SIZE)
    x, sigma = torch.randn(5, *adapter.noise_shape(SIZE)), torch.linspace(0.2, 1, 5)
    seen: list[tuple[int, int]] = []

    class Counted(nn.Module):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> tuple[Tensor]:
            seen.append(tuple(encoder_hidden_states.shape[:2]))
            assert rest["original_size"].tolist() == rest["target_size"].tolist() == [[48, 64]] * len(hidden_states)
            assert rest["crop_coords"].tolist() == [[0, 0]] * len(hidden_states)
            return (adapter.network(hidden_states, encoder_hidden_states, **rest)[0],)

    rows = torch.arange(5)
    with torch.no_grad():
        together = adapter.predictor(condition, 1.0, Counted())(x, sigma, rows)
        assert sorted(seen) == [(2, 32), (3, 16)]
        alone = [adapter.predictor(condition, 1.0)(x[i : i + 1], sigma[i : i + 1], rows[i : i + 1]) for i in range(5)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_the_autoencoders_shift_is_not_the_pipelines(adapter: Any) -> None:
    vae, x = adapter.pipe.vae, torch.randn(1, *adapter.noise_shape(SIZE))
    before = adapter.decode(x, SIZE).pictures()
    kept = vae.config.shift_factor
    vae.register_to_config(shift_factor=5.0)
    try:
        assert torch.equal(adapter.decode(x, SIZE).pictures(), before)
    finally:
        vae.register_to_config(shift_factor=kept)


@pytest.mark.parametrize(
    "setting,value,near",
    [
        ("shift_terminal", 0.02, "shift_terminal null"),
        ("use_karras_sigmas", True, "use_karras_sigmas false"),
        ("use_exponential_sigmas", True, "use_exponential_sigmas false"),
        ("use_beta_sigmas", True, "use_beta_sigmas false"),
        ("invert_sigmas", True, "invert_sigmas false"),
    ],
)
def test_a_scheduler_whose_shift_cannot_be_turned_back_is_refused(setting: str, value: Any, near: str) -> None:
    with pytest.raises(ValueError, match=rf"model.path: 'it' has a .*{setting} {value}.*nearest valid: {near}"):
        check_cogview4("it", "FlowMatchEulerDiscreteScheduler", {setting: value})
