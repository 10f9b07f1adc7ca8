"""URSA's layout: the network against its definition, folders as released, guidance, tokens through evaluation."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families.common import PROMPTS, SPECIAL, WORDS, tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

import tempflow
from tempflow.cli import main
from tempflow.config import Config
from tempflow.core.dynamics import MixtureJump
from tempflow.core.metric_path import MetricJump
from tempflow.cost import check_states, run_cost
from tempflow.doctor.run import asked_check
from tempflow.evaluate.source import find, load_source
from tempflow.evaluate.suite import draw
from tempflow.export import export_run
from tempflow.grid import Grid
from tempflow.measure import Work
from tempflow.media import Size
from tempflow.models import load
from tempflow.models.ursa import CODES, URSA, URSAGuidance
from tempflow.models.ursa_parts import AutoencoderVQ, KineticOptimalScheduler, URSAPipeline, URSATransformer3DModel
from tempflow.request import Prompt

FILE = "diffusion_pytorch_model.safetensors"
TEXT, V, SIZE = len(SPECIAL) + len(WORDS) + 4, 24, Size(8, 12)
BASE = 100.0


def network() -> URSATransformer3DModel:
    return URSATransformer3DModel(
        hidden_size=16,
        intermediate_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        head_dim=16,
        rope_theta=BASE,
        vocab_size=TEXT + V,
        lm_vocab_size=TEXT,
        lm_head_size=V,
        bov_token_id=2,
    )


def autoencoder(**options: Any) -> AutoencoderVQ:
    return AutoencoderVQ(
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=V,
        vq_embed_dim=3,
        attn_down_block=True,
        attn_up_block=True,
        spatial_stride=4,
        **options,
    )


def pipeline(**scheduler: Any) -> URSAPipeline:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk, vae = network(), autoencoder()
        with torch.no_grad():
            for parameter in (*trunk.parameters(), *vae.parameters()):
                if parameter.dim() > 1:
                    parameter.normal_(std=(parameter[0].numel()) ** -0.5)
        words: Any = tokenizer(9)
        return URSAPipeline(trunk, KineticOptimalScheduler(**{"alpha": 0.9, "c": 3.0, **scheduler}), vae, words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As released: parts of a library that is not here, and settings that say what is so anyway."""
    place = tmp_path_factory.mktemp("ursa") / "URSA-tiny"
    pipeline().save_pretrained(place)
    index = json.loads((place / "model_index.json").read_text())
    for part in ("transformer", "vae", "scheduler"):
        index[part][0] = "diffnext.models"
    (place / "model_index.json").write_text(json.dumps(index))
    edit(place / "vae" / "config.json", _quantizer_name="VQuantizer", act_fn="silu", mid_block_add_attention=None)
    edit(place / "transformer" / "config.json", hidden_act="silu", max_window_layers=28)
    (place / "scheduler" / "scheduler_model.pth").write_bytes(b"a pickle")
    return place


def edit(file: Path, **fields: object) -> None:
    told = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in told.items() if value is not None}))


@pytest.fixture(scope="module")
def model(folder: Path) -> URSA:
    loaded = load(str(folder))
    assert isinstance(loaded, URSA)
    return loaded


def by_definition(weights: dict[str, Tensor], prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits of one row, by the released arithmetic: rotary by complex numbers, grouped heads, no mask at all."""
    height, width = tokens.shape
    ids = torch.cat([prompt, torch.tensor([2]), tokens.flatten() + TEXT])
    length, text = len(ids), len(prompt)
    place = [(i, i, i) for i in range(text + 1)] + [(text + 1, y, x) for y in range(height) for x in range(width)]
    axes = [0, 1, 2, 0, 1, 2, 1, 2]  # of a head of 16: two turns of t, y, x, and one of y, x
    turn = torch.tensor([[p[a] * BASE ** (-i / 8) for i, a in enumerate(axes)] for p in place], dtype=torch.float64)
    spin = torch.polar(torch.ones_like(turn), turn)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    def heads(x: Tensor, name: str, normed: str = "") -> Tensor:
        out = (x @ weights[f"{name}.weight"].T).view(length, -1, 16)
        if not normed:
            return out
        pair = torch.complex(*norm(out, normed).chunk(2, -1)) * spin[:, None]
        return torch.cat([pair.real, pair.imag], -1)

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(2):
        layer = f"model.layers.{i}"
        h, attn = norm(x, f"{layer}.input_layernorm.weight"), f"{layer}.self_attn"
        q = heads(h, f"{attn}.q_proj", f"{attn}.q_norm.weight")
        k, v = heads(h, f"{attn}.k_proj", f"{attn}.k_norm.weight"), heads(h, f"{attn}.v_proj")
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        share = (torch.einsum("qhd,khd->hqk", q, k) / 4).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", share, v).reshape(length, -1) @ weights[f"{attn}.o_proj.weight"].T
        h, mlp = norm(x, f"{layer}.post_attention_layernorm.weight"), f"{layer}.mlp"
        gate = h @ weights[f"{mlp}.gate_proj.weight"].T
        up = h @ weights[f"{mlp}.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ weights[f"{mlp}.down_proj.weight"].T
    x = norm(x, "model.norm.weight")
    return (x[text:-1] @ weights["lm_head.weight"].T).view(height, width, V)


def test_the_network_is_the_released_one(model: URSA) -> None:
    g = torch.Generator().manual_seed(0)
    tokens, prompt = torch.randint(V, (2, 2, 3), generator=g), torch.randint(TEXT, (2, 5), generator=g)
    double = network().double()
    double.load_state_dict(model.network.state_dict())
    weights = dict(double.state_dict())
    want = torch.stack([by_definition(weights, p, x) for p, x in zip(prompt, tokens, strict=True)])
    got = double(tokens, prompt)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # angles are float32, as released
    assert float(want.std()) > 0.3
    for name in ("model.layers.1.self_attn.k_norm.weight", "model.layers.0.mlp.gate_proj.weight", "lm_head.weight"):
        assert name in weights
    last = tokens.clone()
    last[:, -1, -1] = (last[:, -1, -1] + 1) % V
    assert bool((double(last, prompt) != got).flatten(1).any(1).all()), "the first token sees the last one"


def test_a_folder_as_released_is_loaded_and_written_again(folder: Path, model: URSA, tmp_path: Path) -> None:
    assert model.noise_shape(SIZE) == (2, 3) and model.makes == "picture" and model.family.tokens
    assert isinstance(model.jump, MetricJump) and model.jump.path.vocabulary == V
    assert "a .pth is not read" in model.notes()[0]
    assert torch.equal(model.schedule(4, SIZE).sigmas, torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    model.save(str(tmp_path / "again"))
    again = load(str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["vae"] == [
        "diffnext.models",
        "AutoencoderVQ",
    ]
    ours, theirs = (dict(m.network.state_dict()) for m in (model, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    torch.testing.assert_close(pictures(again), pictures(model), rtol=0, atol=0)


def test_the_paths_own_codes_and_the_mixture_path(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    codes = torch.randn(V, 5, generator=torch.Generator().manual_seed(1))
    save_file({"path.emb": codes}, own / "scheduler" / CODES)
    loaded: Any = load(str(own))
    assert loaded.notes() == () and torch.equal(loaded.jump.path.codes, codes)
    loaded.save(str(tmp_path / "again"))
    assert torch.equal(load_file(tmp_path / "again" / "scheduler" / CODES)["path.emb"], codes)
    save_file({"path.emb": codes[1:].contiguous()}, own / "scheduler" / CODES)
    with pytest.raises(ValueError, match=r"the scheduler of .* has 23 codes and the vae 24"):
        load(str(own))
    plain = tmp_path / "plain"
    pipeline(alpha=None, c=None, shift=3.0).save_pretrained(plain)
    loaded = load(str(plain))
    assert loaded.jump == MixtureJump(V) and loaded.notes() == ()
    assert float(loaded.schedule(2, SIZE).sigmas[1]) == pytest.approx(0.75)


def test_a_stated_grid_is_walked_and_goes_with_the_weights(tmp_path: Path) -> None:
    place = tmp_path / "shifted"
    pipeline(shift=3.0).save_pretrained(place)
    own = load(str(place))
    own.state_grid(Grid((1.0, 0.5)))
    own.save(str(tmp_path / "again"))
    again = load(str(tmp_path / "again"))
    assert again.schedule(2, SIZE).sigmas.tolist() == [1.0, 0.75, 0.0] and again.stated_grid().how == (1.0, 0.5)
    with pytest.raises(ValueError, match="steps: 3 steps, and the grid"):
        again.schedule(3, SIZE)
    again.state_grid(Grid())
    assert again.schedule(3, SIZE).steps == 3


def test_prompts_are_padded_on_the_left_and_the_padding_is_read(model: URSA) -> None:
    ids = model.encode([Prompt("a red cat"), Prompt("")], SIZE).tensors["ids"]
    assert ids.shape == (2, 9) and ids[0, :5].tolist() == [0] * 5 and int((ids[0] != 0).sum()) == 4
    tokens = torch.zeros(1, 2, 3, dtype=torch.long)
    assert not torch.allclose(model.network(tokens, ids[:1]), model.network(tokens, ids[:1, 5:]))


def test_guidance_acts_on_logits_until_it_is_truncated(model: URSA) -> None:
    g = torch.Generator().manual_seed(0)
    condition = model.encode([Prompt("a red cat on the house"), Prompt("a small bird")], SIZE)
    x, rows = torch.randint(V, (4, 2, 3), generator=g), torch.tensor([0, 1, 0, 1])
    sigma = torch.tensor([1.0, 0.5, 0.2, 0.05])  # truncation .6: the first two

    def said(guidance: URSAGuidance | float) -> Tensor:
        return model.predictor(condition, guidance)(x, sigma, rows)

    assert condition.negative is not None
    plain, away = said(1.0), model.network(x, condition.negative["ids"][rows])
    guided = said(URSAGuidance(3.0, truncation=0.6))
    torch.testing.assert_close(guided[:2], (away + 3 * (plain - away))[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guided[2:], plain[2:])
    assert float((guided[:2] - plain[:2]).abs().max()) > 0.1
    alone = torch.cat(
        [model.predictor(condition, URSAGuidance(3.0, 0.6))(x[[i]], sigma[[i]], rows[[i]]) for i in range(4)]
    )
    torch.testing.assert_close(alone, guided, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said(URSAGuidance(3.0, 0.6, temperature=0.5)), 2 * guided)
    assert model.guidance is URSAGuidance and URSAGuidance().truncation == 0.9
    asked: list[int] = []
    hook = model.network.register_forward_pre_hook(lambda network, given: asked.append(len(given[0])))
    torch.testing.assert_close(said(URSAGuidance(3.0, truncation=0.6)), guided)
    hook.remove()
    assert sum(asked) == 2 * 2 + 2, "never more rows than two for each"
    bare = type(condition)(condition.prompts, condition.tensors)
    with pytest.raises(ValueError, match=r"guidance: 3.0 needs conditions with negative prompts"):
        model.predictor(bare, 3.0)


def test_pictures_and_tokens(model: URSA, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = model.pipe.vae
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (3, 2, 3), generator=g)
    media = model.decode(tokens, SIZE)
    assert media.frames.shape == (3, 1, 8, 12, 3) and len(torch.unique(media.frames)) > 20
    back = model.encode_media(media, SIZE)
    assert back.dtype == torch.int64 and back.shape == (3, 2, 3) and 0 <= int(back.min()) <= int(back.max()) < V
    z = torch.randn(2, 3, 2, 3, generator=g)
    vectors = z.movedim(1, -1)
    assert torch.equal(vae.quantise(z), (vectors @ vae.codes.T).argmax(-1)), "the largest product, as released"
    monkeypatch.setattr("tempflow.models.ursa_parts.AT_ONCE", 4 * V)
    assert torch.equal(vae.quantise(z), (vectors @ vae.codes.T).argmax(-1)), "in parts as at once"
    near = autoencoder(lookup="nearest")
    assert torch.equal(near.quantise(z), torch.cdist(vectors.reshape(-1, 3), near.codes).argmin(-1).view(2, 2, 3))
    with pytest.raises(ValueError, match="tokens: token 24 is outside 0 … 23"):
        model.decode(tokens.clamp(max=0) + V, SIZE)
    with pytest.raises(ValueError, match="height: 10 must be a multiple of 4; nearest is 8"):
        model.noise_shape(Size(10, 12))


def pictures(model: Any, seed: int = 1, count: int = 2, rows: int = 8) -> Tensor:
    prompts = [Prompt(text) for text in PROMPTS]
    return draw(
        model, prompts, steps=3, guidance=2.0, seed=seed, size=SIZE, rows=rows, samples_per_prompt=count
    ).frames  # fmt: skip


def test_the_evaluations_draws_are_a_function_of_their_seed(model: URSA) -> None:
    first = pictures(model)
    assert first.shape == (6, 1, 8, 12, 3) and torch.equal(first, pictures(model, rows=2))
    assert not torch.equal(first, pictures(model, seed=2))
    assert torch.equal(pictures(model, count=1), first[::2]), "more pictures do not change the first"


class Killed(BaseException):
    """What no code of the run may swallow."""


def run(folder: Path, output: Path, **fields: Any) -> Config:
    told: dict[str, Any] = {
        "name": "tokens",
        "iterations": 2,
        "output": str(output),
        "rollout_rows": 6,
        "train_rows": 4,
        "algorithm": {"name": "udm_grpo", "steps": 3, "group": 3, "window": 2, "starts": 2},
        "model": {"path": str(folder), "height": 8, "width": 12, "training": "full"},
        "data": {"prompts_per_iteration": 2},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"every": 1, "validation_prompts": 2, "test_prompts": 2, "steps": 2, "metric": "reward"},
        "checkpoint": {"every": 1},
    }
    return Config.model_validate({**told, **fields})


def light(images: list[Any], prompts: list[str]) -> list[float]:
    return [sum(image.convert("L").tobytes()) / 24480 for image in images]


def trained(config: Config, resume: bool = False) -> None:
    tempflow.train(config, reward=light, prompts=PROMPTS, test_prompts=PROMPTS, quiet=True, resume=resume)


def killed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a run in its second iteration, and goes on with it."""
    left, decode = [5], URSA.decode_latents

    def dies(adapter: URSA, x: Tensor) -> Tensor:
        left[0] -= 1
        if not left[0]:
            raise Killed
        return decode(adapter, x)

    with monkeypatch.context() as patch:
        patch.setattr(URSA, "decode_latents", dies)
        with pytest.raises(Killed):
            trained(config)
    trained(config, resume=True)


def test_a_run_trains_is_resumed_bitwise_and_exported(
    folder: Path, model: URSA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(run(folder, tmp_path / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["log_ratio_max"] for line in lines] == [0, 0] and all(line["grad_norm"] > 0 for line in lines)
    killed(run(folder, tmp_path / "part"), monkeypatch)
    one, other = (load_file(p / "model" / "transformer" / FILE) for p in (tmp_path / "whole", tmp_path / "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    export_run(tmp_path / "whole", tmp_path / "out", weights="policy")
    exported: Any = load(str(tmp_path / "out"))
    assert not torch.equal(exported.network.lm_head.weight, model.network.lm_head.weight)
    assert not torch.equal(pictures(exported), pictures(model))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "tempflow sample out --prompt" in card and "library_name: tempflow" in card and "diffusers" not in card
    with pytest.raises(ValueError, match=r"flow_grpo moves real numbers, and the states of .* are tokens.*udm_grpo"):
        trained(run(folder, tmp_path / "no", algorithm={"name": "flow_grpo", "steps": 3, "group": 3}))


def test_a_lora_is_trained_resumed_bitwise_and_exported_in_every_form(
    folder: Path, model: URSA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By branches, guided, with prompts from a folder and the autoencoder off the device."""
    fields: dict[str, Any] = {
        "algorithm": {"name": "udm_grpo", "steps": 3, "group": 3, "window": 1, "starts": 2, "actions": "branches"},
        "model": {
            "path": str(folder), "height": 8, "width": 12, "training": "lora", "lora_rank": 2, "lora_alpha": 4,
            "cache": str(tmp_path / "cache"), "offload": True, "guidance": 2.0, "guidance_options": {"truncation": 0.5},
        },
    }  # fmt: skip
    trained(run(folder, tmp_path / "whole", **fields))
    killed(run(folder, tmp_path / "part", **fields), monkeypatch)
    one, other = (
        load_file(p / "model" / "pytorch_lora_weights.safetensors") for p in (tmp_path / "whole", tmp_path / "part")
    )
    assert len(one) == 2 * 4 * 2 and all(torch.equal(one[name], other[name]) for name in one)
    drawn = [pictures(load_source(find(str(tmp_path / "whole"))))]
    for form in ("lora", "peft", "merged"):
        export_run(tmp_path / "whole", tmp_path / form, weights="best", form=form)
        base = "" if form == "merged" else str(folder)
        drawn.append(pictures(load_source(find(str(tmp_path / form), base))))
    for some in drawn[1:]:
        assert torch.equal(some, drawn[0])
    assert not torch.equal(drawn[0], pictures(model))
    with pytest.raises(ValueError, match=r"form: 'comfyui' of URSA .* not known here; nearest valid: 'lora'"):
        export_run(tmp_path / "whole", tmp_path / "ui", form="comfyui")
    card = (tmp_path / "lora" / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("tempflow sample lora"))
    words = command.replace(f"--base {folder.name}", f"--base {folder}").replace(
        "sample lora", f"sample {tmp_path}/lora"
    )
    assert main([*shlex.split(words)[1:], "--output", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn" / "000.png").is_file()


def test_what_a_run_costs_is_counted_and_measured_in_tokens(folder: Path, tmp_path: Path) -> None:
    config = run(
        folder, tmp_path / "run", data={"train": "shapes:train"}, model={"path": str(folder), "height": 8, "width": 12}
    )
    assert run_cost(config).state_bytes == 8 * 2 * 3
    work = Work.of(config)
    x, sigma, rows = work.inputs(5)
    assert (
        x.dtype == torch.int64 and 0 <= int(x.min()) <= int(x.max()) < V and work.predict(x, sigma, rows).shape[-1] == V
    )
    work.train(2)
    other = config.replace(algorithm={"name": "flow_grpo"})
    for ask, words in (
        (lambda: check_states(config), ""),
        (lambda: check_states(other), "flow_grpo moves real numbers"),
        (lambda: check_states(config.with_model(path="shapes")), "udm_grpo trains tokens"),
    ):
        with pytest.raises(ValueError, match=words) if words else nullcontext():
            ask()
    assert [check.state for check in asked_check(other, folder)] == ["fails"]


def spoil(part: str, **fields: object) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        edit(place / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **fields)

    return change


def rename(place: Path) -> None:
    file = place / "transformer" / FILE
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary.inv_freq"] = tensors.pop("lm_head.weight")
    save_file(tensors, file)


def without_padding(place: Path) -> None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (place / "tokenizer" / file).is_file():
            edit(place / "tokenizer" / file, pad_token=None)


def another_class(place: Path) -> None:
    index = json.loads((place / "model_index.json").read_text())
    index["vae"][1] = "AutoencoderVQCosmos3D"
    (place / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename, "lacks 'lm_head.weight' in transformer"),
        (another_class, "brings code of its own for vae"),
        (spoil("transformer", hidden_act="gelu"), "a transformer with hidden_act 'gelu'.*nearest valid: 'silu'"),
        (spoil("transformer", hidden_size=12), "cannot be loaded: .*size mismatch"),
        (spoil("transformer", lm_head_size=V - 1), "size mismatch"),
        (
            spoil("transformer", lm_vocab_size=TEXT - 1),
            f"the tokenizer of .* has {TEXT} tokens and .* {TEXT - 1} of text",
        ),
        (spoil("transformer", bov_token_id=TEXT), f"{TEXT} beginning a picture"),
        (without_padding, "the tokenizer of .* has no padding, .* the empty prompt of guidance"),
        (spoil("vae", _quantizer_name="LFQuantizer"), "a vae with _quantizer_name 'LFQuantizer'"),
        (spoil("vae", lookup="hash"), "lookup: 'hash' is not one of product, nearest"),
        (spoil("scheduler", alpha="big"), "a scheduler with alpha 'big'"),
        (spoil("scheduler", c=None), "one of alpha and c"),
    ],
)
def test_a_folder_that_is_another_models_is_refused_in_one_line(
    change: Callable[[Path], None], words: str, folder: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "model"))
    change(place)
    with pytest.raises(ValueError, match=words) as caught:
        load(str(place))
    assert str(caught.value).startswith("model.path: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"truncation": 0.0}, {"temperature": 0.0}, {"temperature": float("inf")}])
def test_bad_options_of_guidance(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))}: .*nearest valid"):
        URSAGuidance(2.0, **fields)
