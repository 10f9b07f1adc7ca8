"""The network: early blocks of the transformer to the bit, one row at a time, and what is written and read."""

from __future__ import annotations

import json
from pathlib import Path

import latent_world as world
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tempflow.latent_reward import LatentReward, RewardSpec, bind
from tempflow.latent_reward.model import RECORD, WEIGHTS
from tempflow.media import Size
from tempflow.request import asked

SIZE = Size(32, 32)


def awake(reward: LatentReward) -> LatentReward:
    """With a last layer that says something."""
    with torch.no_grad():
        reward.head.out.weight.copy_(torch.linspace(-1, 1, reward.head.out.in_features)[None])
    return reward


def dual_call(rows: int) -> dict[str, Tensor]:
    return {
        "hidden_states": world.normal("x", rows, (4, 6, 10)),
        "timestep": torch.linspace(100, 900, rows),
        "encoder_hidden_states": world.normal("embeds", rows, (7, 24)),
        "pooled_projections": world.normal("pooled", rows, (20,)),
    }


@pytest.mark.parametrize("drop", [0, 1, 3])
def test_tokens_are_those_of_the_transformers_own_block(drop: int) -> None:
    network = world.dual_transformer(5)
    reward = LatentReward.from_transformer(network, drop=drop, width=8)
    seen: list[Tensor] = []
    network.transformer_blocks[4 - drop].register_forward_hook(lambda _m, _i, out: seen.append(out[1]))
    call = dual_call(3)
    network(**call, return_dict=False)
    tokens, grid = reward.trunk(*(call[n] for n in call))
    assert torch.equal(tokens, seen[0]) and grid == (3, 5)
    assert len(reward.trunk.transformer_blocks) == reward.spec.kept == 5 - drop


@pytest.mark.parametrize(("layers", "kept"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 3), (24, 21)])
def test_three_blocks_are_left_off_where_two_remain(layers: int, kept: int) -> None:
    network = world.dual_transformer(layers)
    assert LatentReward.from_transformer(network, width=8).spec.kept == kept


def test_it_is_a_copy() -> None:
    network = world.dual_transformer()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    reward = LatentReward.from_transformer(network, width=8)
    with torch.no_grad():
        for parameter in reward.parameters():
            parameter.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(p.requires_grad for p in network.parameters())


def test_the_head_is_mlp_grid_conv_pool_mlp() -> None:
    """Against a loop over the grid; a grid that is not square tells rows from columns."""
    reward = awake(LatentReward.from_transformer(world.dual_transformer(), width=8)).double()
    head, (h, w) = reward.head, (3, 5)
    tokens = world.normal("tokens", 2, (h * w, 32)).double()
    flat = head.tokens(tokens)
    kernel, bias = head.near.weight, head.near.bias
    assert bias is not None
    pooled = torch.zeros(2, 8, dtype=torch.float64)
    for r in range(h):
        for c in range(w):
            near = bias.expand(2, 8)
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    if 0 <= r + dr < h and 0 <= c + dc < w:
                        near = near + flat[:, (r + dr) * w + c + dc] @ kernel[:, :, dr + 1, dc + 1].T
            pooled = pooled + nn.functional.silu(near) / (h * w)
    want = head.out(nn.functional.silu(head.pooled(pooled)))[:, 0]
    torch.testing.assert_close(head(tokens, (h, w)), want, rtol=1e-10, atol=1e-12)
    assert want.abs().min() > 1e-6


def test_an_untrained_reward_prefers_nothing_and_is_a_function_of_its_seed() -> None:
    network = world.dual_transformer()
    first, again, other = (LatentReward.from_transformer(network, width=8, seed=s) for s in (1, 1, 2))
    assert torch.equal(first(**dual_call(3))[0], torch.zeros(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.near.weight, other.head.near.weight)
    state = torch.random.get_rng_state()
    LatentReward.from_transformer(network, width=8)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_rows_score_does_not_depend_on_its_batch() -> None:
    model = world.adapter()
    score = bind(
        model, awake(LatentReward.from_transformer(model.network, width=16)), model.encode(asked(world.PROMPTS), SIZE)
    )
    x, sigma, rows = world.normal("x", 5), torch.tensor([0.1, 0.9, 0.5, 1.0, 0.0]), torch.tensor([0, 1, 1, 0, 1])
    together = score(x, sigma, rows)
    alone = torch.cat([score(x[i : i + 1], sigma[i : i + 1], rows[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    others = score(torch.cat([x[:1], 3 * x[1:].flip(0)]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6]), rows)
    assert torch.equal(others[0], together[0])  # a batch of one size: not even a bit


def test_it_hears_noise_level_prompt_and_picture() -> None:
    model = world.adapter()
    score = bind(
        model, awake(LatentReward.from_transformer(model.network, width=16)), model.encode(asked(world.PROMPTS), SIZE)
    )
    x = world.normal("x", 1)
    base = score(x, torch.tensor([0.5]), torch.tensor([0]))
    assert base.shape == (1,) and base.dtype == torch.float32
    for changed in (
        score(x, torch.tensor([0.6]), torch.tensor([0])),
        score(x, torch.tensor([0.5]), torch.tensor([1])),
        score(x.flip(3), torch.tensor([0.5]), torch.tensor([0])),
    ):
        assert abs(float(changed - base)) > 1e-6


def test_the_adapter_hands_over_what_it_hands_the_transformer() -> None:
    model = world.adapter()
    seen: list[dict[str, Tensor]] = []
    reward = LatentReward.from_transformer(model.network, width=8)
    for module in (model.network, reward):
        module.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    condition = model.encode(asked(world.PROMPTS), SIZE)
    x, sigma, rows = world.normal("x", 2), torch.tensor([0.3, 0.8]), torch.tensor([1, 0])
    model.predictor(condition, 1.0)(x, sigma, rows)
    bind(model, reward, condition)(x, sigma, rows)
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(torch.as_tensor(seen[0][k]), torch.as_tensor(seen[1][k])) for k in seen[0])
    assert seen[1]["timestep"].tolist() == pytest.approx([300, 800])


# ------------------------------------------------------------------------------------------------------ save and load
def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    reward = awake(LatentReward.from_transformer(world.dual_transformer(), width=8, licence="mit"))
    reward.save(tmp_path / "a" / "reward")
    again = LatentReward.load(tmp_path / "a" / "reward")
    assert again.spec.licence == "mit" and again.spec.kept == reward.spec.kept and not again.training
    assert torch.equal(again(**dual_call(3))[0], reward(**dual_call(3))[0])
    assert {p.name for p in (tmp_path / "a" / "reward").iterdir()} == {RECORD, WEIGHTS}
    again.save(tmp_path / "b")
    assert (tmp_path / "b" / RECORD).read_bytes() == (tmp_path / "a" / "reward" / RECORD).read_bytes()
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "a" / "reward" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("bits", [2, 5, 7, 8])
def test_in_few_bits_a_weight_is_off_by_half_a_unit_of_its_row(tmp_path: Path, bits: int) -> None:
    reward = awake(LatentReward.from_transformer(world.dual_transformer(), width=8))
    reward.save(tmp_path, bits=bits)
    again = LatentReward.load(tmp_path)
    matrices = 0
    for (name, mine), theirs in zip(reward.named_parameters(), again.parameters(), strict=True):
        assert theirs.dtype == torch.float32
        if mine.dim() < 2:
            torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-6)
            continue
        matrices += mine.numel()
        unit = mine.flatten(1).abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((mine - theirs).flatten(1).abs() <= 0.51 * unit + 1e-6).all(), name
    stored = load_file(tmp_path / WEIGHTS)
    assert sum(t.numel() for t in stored.values() if t.dtype == torch.uint8) == pytest.approx(
        matrices * bits / 8, rel=0.01
    )
    if bits >= 7:
        with torch.no_grad():
            (want,), (got,) = reward(**dual_call(4)), again(**dual_call(4))
        assert float((want - got).abs().max()) < 0.05 * float(want.abs().max())


@pytest.mark.parametrize(("bits", "near"), [(1, 2), (9, 8), (16, 8)])
def test_another_number_of_bits_is_refused(tmp_path: Path, bits: int, near: int) -> None:
    with pytest.raises(ValueError, match=f"bits: {bits} is none of 2 … 8; nearest valid: {near}"):
        LatentReward.from_transformer(world.dual_transformer(), width=8).save(tmp_path / "no", bits=bits)
    assert not (tmp_path / "no").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LatentReward.from_transformer(world.dual_transformer(), width=8).save(tmp_path / "reward")
    return tmp_path / "reward"


def test_a_missing_folder_names_a_near_one(folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"has no {RECORD}; nearest valid: '.*reward'"):
        LatentReward.load(folder.with_name("rewart"))
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"has no {WEIGHTS}"):
        LatentReward.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "must say format 1"),
        ({"family": "Other"}, "must say format 1 and family 'SD3Transformer2DModel'"),
        ({"kept": 9}, "kept: 9 of 5 blocks cannot be kept; nearest valid: 5"),
        ({"kept": "3"}, "kept in .* is '3'; it must be a int"),
        ({"kept": 1}, f"{WEIGHTS} does not fit {RECORD}"),
        ({"width": 9}, f"{WEIGHTS} does not fit {RECORD}"),
        ({"width": 0}, "width: 0 is too small"),
        ({"bits": 9}, "bits in .* is 9; it must be null or 2 … 8"),
        ({"bits": 4}, f"{WEIGHTS} does not fit {RECORD}"),
        ({"transformer": {}}, "transformer.num_layers: None must be a whole number"),
    ],
)
def test_a_record_that_is_wrong_says_so(folder: Path, change: dict[str, object], message: str) -> None:
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, **change}))
    with pytest.raises(ValueError, match=message):
        LatentReward.load(folder)


def test_broken_files_say_so(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop("head.out.bias")
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"does not fit .*head\.out\.bias"):
        LatentReward.load(folder)
    (folder / WEIGHTS).write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="is not safetensors"):
        LatentReward.load(folder)
    (folder / RECORD).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        LatentReward.load(folder)


# ------------------------------------------------------------------------------------------------------------- errors
def test_what_has_no_reward_says_so() -> None:
    with pytest.raises(ValueError, match="transformer: Linear has no latent reward; nearest valid: 'SD3Transformer2D"):
        LatentReward.from_transformer(nn.Linear(2, 2))
    model = world.adapter()
    with pytest.raises(ValueError, match="drop: 4 of 4 blocks cannot be left off; nearest valid: 3"):
        LatentReward.from_transformer(model.network, drop=4)
    with pytest.raises(ValueError, match="drop: -1 of 4"):
        LatentReward.from_transformer(model.network, drop=-1)
    model.add_lora(2, 4)
    with pytest.raises(ValueError, match="it has a LoRA"):
        LatentReward.from_transformer(model.network)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("hidden_states", (3, 16, 6, 10), "x: channels 16 is another model's; nearest valid: 4"),
        ("hidden_states", (3, 4, 5, 10), "multiples of 2"),
        ("encoder_hidden_states", (3, 7, 25), "embeds: width 25 .* nearest valid: 24"),
        ("pooled_projections", (3, 21), "pooled: width 21 .* nearest valid: 20"),
    ],
)
def test_another_models_tensors_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    reward = LatentReward.from_transformer(world.dual_transformer(), width=8)
    with pytest.raises(ValueError, match=message):
        reward(**{**dual_call(3), name: torch.zeros(shape)})
    with pytest.raises(ValueError, match="return_dict"):
        reward(**dual_call(3), return_dict=True)


def test_a_spec_without_a_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transformer\.in_channels: None"):
        RewardSpec("SD3Transformer2DModel", {"num_layers": 2}, 1)


def test_a_reward_of_another_transformer_does_not_fit() -> None:
    reward = LatentReward.from_transformer(world.adapter().network)
    reward.check_fits(world.adapter(layers=3).network)
    with pytest.raises(ValueError, match="the latent reward's in_channels is 8, the model's 4; scripts/train_latent"):
        reward.check_fits(world.dual_transformer())
    with pytest.raises(ValueError, match="cannot judge Linear"):
        reward.check_fits(nn.Linear(1, 1))
