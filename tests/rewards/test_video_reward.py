"""VideoReward: frames by rate or number, the LoRA, three numbers, and what the checkpoint's settings say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import WIDTH, base_in, config_of, drawn, tokenizer_of
from torch import nn

from tempflow.media import Media
from tempflow.rewards.protocol import takes_of
from tempflow.rewards.video_reward import LEAST, TEMPLATE, TOKENS, Frames, Settings, merged, video_reward
from tempflow.rewards.vlm import fitted, patches

CLIPS = torch.randint(0, 256, (2, 7, 24, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
MEDIA = Media(CLIPS, 7.0)
PROMPTS = ["a red cat", "two dogs and a picture of motion"]
META: list[dict[str, object]] = [{}] * 2
SETTINGS: dict[str, Any] = {
    "data_config": {"fps": 4.0, "num_frames": None, "max_frame_pixels": LEAST, "sample_type": "uniform"},
    "peft_lora_config": {"lora_enable": True, "lora_r": 3, "lora_alpha": 6},
    "inference_config": {
        "VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811, "TA_mean": 2.8105, "TA_std": 2.5121,
    },
}  # fmt: skip
ASKED = {"overall": None, "visual_quality": 0, "motion_quality": 1, "text_alignment": 2}


# -------------------------------------------------------------------------------------------------------- the frames
@pytest.mark.parametrize(
    ("frames", "total", "rate", "want"),
    [
        (Frames(fps=2), 16, 8.0, [0, 5, 10, 15]),
        (Frames(fps=2), 8, 8.0, [0, 2, 5, 7]),  # two by the rate, and four at least
        (Frames(fps=2), 5, 24.0, [0, 1, 3, 4]),
        (Frames(fps=30), 6, 24.0, [0, 1, 2, 3, 4, 5]),
        (Frames(fps=30), 7, 24.0, [0, 1, 2, 4, 5, 6]),
        (Frames(num_frames=2), 9, None, [0, 8]),
        (Frames(num_frames=8), 5, None, [0, 1, 2, 3, 4]),
        (Frames(fps=2), 1, 8.0, [0]),
        (Frames(num_frames=8), 1, None, [0]),
    ],
)
def test_which_frames_are_looked_at(frames: Frames, total: int, rate: float | None, want: list[int]) -> None:
    assert frames.of(total, rate) == want


def test_a_clip_without_a_rate_has_no_frames_by_rate() -> None:
    with pytest.raises(ValueError, match="media has no rate to take fps from; nearest valid: num_frames = 8"):
        Frames(fps=2).of(16, None)


def test_rate_and_number_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^fps: 2 beside num_frames = 4; nearest valid: one of the two$"):
        video_reward(path="nowhere", fps=2.0, num_frames=4)


# ---------------------------------------------------------------------------------------------------------- a world
class World:
    """A tiny checkpoint of VideoReward's kind, as peft saves the network with its LoRA, and that network."""

    def __init__(self, folder: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen2VLForConditionalGeneration

        self.base, self.folder = base_in(folder / "base"), folder / "weights"
        self.folder.mkdir()
        self.tokenizer = tokenizer_of(TOKENS)
        network = Qwen2VLForConditionalGeneration(config_of(self.tokenizer, len(self.tokenizer)))
        low = LoraConfig(r=3, lora_alpha=6, target_modules=r".*layers\.\d\.(self_attn\.[qv]_proj|mlp\.up_proj)")
        self.network: Any = get_peft_model(network, low).eval()
        self.heads = {rows: nn.Linear(WIDTH, rows, bias=False) for rows in (1, 3)}
        for seed, module in enumerate((self.network, *self.heads.values())):
            drawn(module, seed)
        state = self.network.state_dict()
        assert any("lora_B.default.weight" in name for name in state) and any(".base_layer." in name for name in state)
        self.state = {self._old(name): tensor.contiguous() for name, tensor in state.items() if "lm_head" not in name}
        for rows in (1, 3):
            self.write(self.folder / str(rows), rows)

    @staticmethod
    def _old(name: str) -> str:
        """By the names of transformers 4.45."""
        start = "base_model.model."
        return name.replace(f"{start}model.visual.", f"{start}visual.").replace("model.language_model.", "model.")

    def write(self, folder: Path, rows: int = 1, settings: Any = SETTINGS, **change: torch.Tensor | None) -> Path:
        folder.mkdir(exist_ok=True)
        tensors = {**self.state, "base_model.model.rm_head.weight": self.heads[rows].weight.detach(), **change}
        save_file({n: t for n, t in tensors.items() if t is not None}, folder / "video_reward.safetensors")
        (folder / "model_config.json").write_text(json.dumps(settings))
        return folder

    def reward(self, path: Path | None = None, **options: Any) -> Any:
        return video_reward(path=str(path or self.folder / "1"), base=str(self.base), dtype="float32", **options)

    @torch.no_grad()
    def want(self, clip: torch.Tensor, prompt: str, rows: int = 1) -> list[float]:
        """One row's three numbers, with the LoRA beside the weights, and the head in float64."""
        pixels, grid = patches(clip, *fitted(24, 32, LEAST, LEAST))
        tokens = "<|video_pad|>" * (pixels.shape[0] // 4)
        before, after = TEMPLATE.split("{prompt}")
        ids = self.tokenizer(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            f"{tokens}<|vision_end|>{before}{prompt}{after}<|im_end|>\n<|im_start|>assistant\n",
            return_tensors="pt",
        )["input_ids"]
        inner = self.network.base_model.model.model
        video = ids == inner.config.video_token_id
        given = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])}
        states = inner(input_ids=ids, mm_token_type_ids=2 * video.int(), **given).last_hidden_state[0].double()
        places = [ids[0].tolist().index(i) for i in self.tokenizer.convert_tokens_to_ids(list(TOKENS))]
        weight = self.heads[rows].weight.double()
        return [float(weight[k if rows == 3 else 0] @ states[place]) for k, place in enumerate(places)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(tmp_path_factory.mktemp("video"))


@pytest.mark.parametrize("rows", [1, 3])
def test_it_is_three_numbers_at_three_tokens_standardised_and_summed(world: World, rows: int) -> None:
    raw = torch.tensor(
        [world.want(clip[[0, 2, 4, 6]], prompt, rows) for clip, prompt in zip(CLIPS, PROMPTS, strict=True)]
    )
    moments = SETTINGS["inference_config"]
    mean, deviation = (torch.tensor([moments[f"{key}_{m}"] for key in ("VQ", "MQ", "TA")]) for m in ("mean", "std"))
    assert takes_of(world.reward()) == "video"
    for standardise, three in ((True, (raw - mean) / deviation), (False, raw)):
        for dimension, place in ASKED.items() if standardise else [("overall", None), ("visual_quality", 0)]:
            reward = world.reward(world.folder / str(rows), dimension=dimension, standardise=standardise, batch=2)
            scores = reward.score(MEDIA, PROMPTS, META)
            want = three.sum(1) if place is None else three[:, place]
            assert scores.ok.all() and scores.names == ("video_reward",)
            assert torch.allclose(scores.value[:, 0], want, atol=2e-4), (dimension, standardise)
    assert (raw[0] - raw[1]).abs().min() > 1e-3


def test_rows_do_not_depend_on_their_neighbours(world: World) -> None:
    two = world.reward(batch=2).score(MEDIA, PROMPTS, META)
    single = world.reward(batch=1)
    assert torch.allclose(single.score(MEDIA, PROMPTS, META).value, two.value, atol=1e-5)
    backwards = single.score(MEDIA[[1, 0]], PROMPTS[::-1], META)
    assert torch.allclose(backwards.value.flip(0), two.value, atol=1e-5)
    swapped = single.score(MEDIA, PROMPTS[::-1], META)
    assert (swapped.value - two.value).abs().min() > 1e-3
    bad = single.score(MEDIA, ["<|TA_reward|>", PROMPTS[1]], META)
    assert bad.ok[:, 0].tolist() == [False, True]
    assert torch.allclose(bad.value[1], two.value[1], atol=1e-5)


def test_options_go_before_the_checkpoints_settings(world: World) -> None:
    usual = world.reward(dimension="visual_quality").score(MEDIA[:1], PROMPTS[:1], META[:1]).value
    for options in ({"num_frames": 2}, {"fps": 7.0}, {"max_pixels": 4 * LEAST}):
        other = world.reward(dimension="visual_quality", **options).score(MEDIA[:1], PROMPTS[:1], META[:1]).value
        assert (other - usual).abs() > 1e-4 or "max_pixels" in options  # a frame that is small enough is not enlarged
    still = Media(CLIPS, None)
    with pytest.raises(ValueError, match="media has no rate"):
        world.reward().score(still, PROMPTS, META)
    assert world.reward(num_frames=2).score(still, PROMPTS, META).ok.all()


def test_weights_that_do_not_fit_are_refused(world: World, tmp_path: Path) -> None:
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    for change, fault in (
        (
            {f"{start}.lora_A.default.weight": None},
            "path: its LoRA lacks the other side of model.layers.0.self_attn.q_proj",
        ),
        ({f"{start}.base_layer.weight": None}, "path: its LoRA lacks model.layers.0.self_attn.q_proj.weight"),
        ({f"{start}.lora_A.default.weight": torch.zeros(3)}, "is no pair of matrices"),
        ({f"{start}.extra": torch.zeros(3)}, "has unexpected language_model.layers.0.self_attn.q_proj.extra"),
        ({"base_model.model.rm_head.weight": None}, "lacks weight"),
        (
            {"base_model.model.rm_head.weight": torch.zeros(2, WIDTH)},
            "rm_head.weight has 2 rows; nearest valid: 1 or 3",
        ),
    ):
        folder = world.write(tmp_path / "w", **change)
        with pytest.raises(ValueError) as error:
            world.reward(folder).prepare()
        assert fault in str(error.value) and str(error.value).startswith("path: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "fault"),
    [
        ("data_config", "sample_type", "multi_pts", "sample_type is 'multi_pts'; nearest valid: 'uniform'"),
        ("data_config", "fps", None, "fps is None; nearest valid: a number"),
        ("data_config", "max_frame_pixels", "many", "max_frame_pixels is 'many'; nearest valid: a number"),
        ("inference_config", "MQ_std", 0.0, "a deviation is 0.0; it must be above 0"),
        ("inference_config", "TA_mean", True, "TA_mean is True; nearest valid: a number"),
        ("peft_lora_config", "lora_alpha", None, "lora_alpha is None; nearest valid: a number"),
    ],
)
def test_settings_that_say_something_else_are_refused(
    section: str, key: str, value: Any, fault: str, tmp_path: Path
) -> None:
    file = tmp_path / "model_config.json"
    file.write_text(json.dumps({**SETTINGS, section: {**SETTINGS[section], key: value}}))
    with pytest.raises(ValueError) as error:
        Settings.read(file)
    assert fault in str(error.value) and str(error.value).startswith("path: ")
    file.write_text(json.dumps({name: part for name, part in SETTINGS.items() if name != section}))
    with pytest.raises(ValueError, match=f"has no '{section}'; get it again"):
        Settings.read(file)


def test_settings_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^path: '.*model_config.json' cannot be read"):
        Settings.read(tmp_path / "model_config.json")


def test_a_modules_whole_copy_takes_its_place_and_the_scale_may_go_by_the_root(tmp_path: Path) -> None:
    file = tmp_path / "model_config.json"
    file.write_text(json.dumps({**SETTINGS, "peft_lora_config": {"lora_alpha": 6, "use_rslora": True}}))
    settings = Settings.read(file)
    assert settings.scale(4) == 3 and Settings.read(_plain(tmp_path)).scale(4) == 1.5
    got = merged(
        {
            "base_model.model.rm_head.original_module.weight": torch.zeros(1, 2),
            "base_model.model.rm_head.modules_to_save.default.weight": torch.ones(1, 2),
            "base_model.model.visual.x.weight": torch.full((1,), 5.0),
        },
        settings,
    )
    assert {name: tensor.flatten().tolist() for name, tensor in got.items()} == {
        "rm_head.weight": [1, 1],
        "visual.x.weight": [5],
    }


def _plain(folder: Path) -> Path:
    file = folder / "plain.json"
    file.write_text(json.dumps(SETTINGS))
    return file


def test_a_published_pickle_is_converted_once(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is published: a folder with the settings, and in it one with the pickle."""
    import convert_weights

    published, output = tmp_path / "published" / "checkpoint-1", tmp_path / "converted"
    published.mkdir(parents=True)
    head = {"base_model.model.rm_head.weight": world.heads[1].weight.detach()}
    tied = {"base_model.model.lm_head.weight": world.state["base_model.model.model.embed_tokens.weight"]}
    torch.save({**world.state, **head, **tied}, published / "model.pth")
    given = ["video_reward", str(published / "model.pth"), "--output", str(output)]
    assert convert_weights.main(given) == 1 and "has no model_config.json beside it" in capsys.readouterr().err
    assert not output.exists()
    (published.parent / "model_config.json").write_text(json.dumps(SETTINGS))
    assert convert_weights.main(given) == 0
    assert "left out: base_model.model.lm_head.weight" in capsys.readouterr().out
    one, other = (world.reward(folder).score(MEDIA[:1], PROMPTS[:1], META[:1]).value for folder in (None, output))
    assert torch.equal(one, other)


def test_the_checkpoint_is_left_as_it_was(world: World) -> None:
    before = load_file(world.folder / "1" / "video_reward.safetensors")
    world.reward().prepare()
    after = load_file(world.folder / "1" / "video_reward.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
