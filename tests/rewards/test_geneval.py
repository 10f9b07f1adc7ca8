"""GenEval's rewards end to end on tiny random networks; detections and colours by a second route."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tempflow.cli import main
from tempflow.rewards.geneval import CANDIDATES, Colours, Detector, GenEval, crop, geneval
from tempflow.rewards.geneval_flowgrpo import geneval_flowgrpo
from tempflow.rewards.geneval_flowgrpo_strict import geneval_flowgrpo_strict
from tempflow.rewards.geneval_graded import geneval_graded
from tempflow.rewards.geneval_rules import CLASSES, COCO, COLOURS, Detection

SIDE = 32
"""Of what CLIP sees."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A Mask2Former and a CLIP, as transformers saves them."""
    root = tmp_path_factory.mktemp("geneval")
    save_detector(root / "detector")
    save_clip(root / "clip")
    return {"path": str(root / "detector"), "clip_path": str(root / "clip")}


@pytest.fixture(scope="module")
def networks(folders: dict[str, str]) -> tuple[Detector, Colours]:
    """Loaded once, for tests that leave them as they are."""
    reward = GenEval(**folders)
    reward.prepare()
    return reward._networks()


def save_detector(folder: Path) -> None:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(2)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sides = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32}
    widths = {"encoder_feedforward_dim": 32, "dim_feedforward": 32, "num_attention_heads": 2}
    counts = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 12}
    labels = {n: {"tv": "TVMonitor", "couch": "sofa"}.get(name, name) for n, name in enumerate(COCO)}
    config = Mask2FormerConfig(backbone_config=swin, id2label=labels, **sides, **widths, **counts)
    network = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        network.class_predictor.weight.mul_(20)  # sure of something
    network.save_pretrained(folder)
    processor = {
        "image_processor_type": "Mask2FormerImageProcessor",
        "size": {"height": 64, "width": 64},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "resample": 2,
        "size_divisor": 32,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def save_clip(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    torch.manual_seed(3)
    words = ["a", "photo", "of", "-", "colored", "object", *COLOURS, *{w for name in CLASSES for w in name.split()}]
    vocabulary = {w: n for n, w in enumerate(dict.fromkeys(["<pad>", "<bos>", "<unk>", *sorted(words), "<eos>"]))}
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    last = len(vocabulary) - 1
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": last}
    text = {**common, "vocab_size": len(vocabulary), "max_position_embeddings": 16, **ends}
    network = CLIPModel(
        CLIPConfig(
            text_config=text, vision_config={**common, "image_size": SIDE, "patch_size": 8}, projection_dim=12, **ends
        )
    )
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" not in name and weight.ndim > 1:
                weight.mul_(8)  # drawn small: everything would look alike
    network.save_pretrained(folder)
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", last)]
    )
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=16, **named).save_pretrained(folder)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": mean,
        "image_std": std,
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def drawn(count: int, height: int = 48, width: int = 64, seed: int = 0) -> Tensor:
    """Pictures of large patches, uint8 [count, height, width, 3]."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=random).float()
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="nearest")
    return fine.permute(0, 2, 3, 1).byte().contiguous()


# -------------------------------------------------------------------------------------------------------- detections
def test_detections_are_what_the_logits_say(networks: tuple[Detector, Colours]) -> None:
    """The rule in float64, pair by pair, on the network's own logits."""
    detector = networks[0]
    media, least = drawn(3), 0.05
    found = detector(media, [dict.fromkeys(CLASSES, least)] * 3)
    pixels = detector._processor(
        list(media.numpy()), input_data_format="channels_last", return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        out = detector._network(pixel_values=pixels)
    seen = 0
    for row in range(3):
        logits, masks = out.class_queries_logits[row].double(), out.masks_queries_logits[row].double()
        probability = (logits - logits.logsumexp(-1, keepdim=True)).exp()[:, :80]
        edge = probability.flatten().sort(descending=True).values[CANDIDATES - 1]
        large = torch.nn.functional.interpolate(masks[None], media.shape[1:3], mode="bilinear")[0].numpy()
        expected: list[tuple[str, tuple[int, ...], float]] = []
        for query, label in np.ndindex(*probability.shape):
            ys, xs = np.nonzero(large[query] > 0)
            chance = float(probability[query, label])
            if chance < edge or chance <= least or not len(ys):
                continue
            inside = large[query][large[query] > 0]
            box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
            expected.append((CLASSES[label], box, chance * float(np.mean(1 / (1 + np.exp(-inside))))))
        got = sorted((one.name, one.box, one.confidence) for one, _ in found[row] or [])
        assert [one[:2] for one in got] == [one[:2] for one in sorted(expected)]
        assert [one[2] for one in got] == pytest.approx([one[2] for one in sorted(expected)], abs=1e-4)
        seen += len(got)
        for one, mask in found[row] or []:
            left, top, right, bottom = (int(v) for v in one.box)
            assert mask.shape == media.shape[1:3] and int(mask.sum()) == int(mask[top:bottom, left:right].sum()) > 0
    assert seen > 6


def test_only_wanted_classes_are_looked_at(networks: tuple[Detector, Colours]) -> None:
    detector = networks[0]
    every = detector(drawn(1), [dict.fromkeys(CLASSES, 0.05)])[0] or []
    name = every[0][0].name
    some = detector(drawn(1), [{name: 0.05}])[0] or []
    assert [one for one, _ in some] == [one for one, _ in every if one.name == name]
    assert detector(drawn(1), [{name: 0.9999}]) == [[]]
    assert detector.classes == CLASSES  # some are called otherwise in the folder


# ----------------------------------------------------------------------------------------------------------- colours
def test_colours_are_clips_in_float64(folders: dict[str, str], networks: tuple[Detector, Colours]) -> None:
    """Pillow's composite, crop and resizing; the network, and the mean of the templates, in float64."""
    from transformers import AutoTokenizer, CLIPModel

    picture, name = drawn(1, 60, 50, seed=5)[0], "tennis racket"
    mask = torch.zeros(60, 50, dtype=torch.bool)
    mask[8:49, 5:30] = torch.rand(41, 25, generator=torch.Generator().manual_seed(1)) > 0.3
    box = (5, 8, 30, 49)
    colours = networks[1]
    found = colours.similarities([crop(picture, mask, Detection(name, 0.9, box))], [name])[0]

    network = CLIPModel.from_pretrained(folders["clip_path"]).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["clip_path"])
    image, grey = Image.fromarray(picture.numpy()), Image.new("RGB", (50, 60), "#999")
    cut = Image.composite(image, grey, Image.fromarray(mask.numpy())).crop(box)
    height = int(SIDE * cut.height / cut.width)
    top = (height - SIDE) // 2
    square = cut.resize((SIDE, height), Image.Resampling.BICUBIC).crop((0, top, SIDE, top + SIDE))
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy((np.asarray(square) / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        shown = unit(network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output))[0]
        for place, colour in enumerate(COLOURS):
            texts = [
                f"a photo of a {colour} {name}",
                f"a photo of a {colour}-colored {name}",
                f"a photo of a {colour} object",
            ]
            features: list[Tensor] = []
            for text in texts:
                tokens = tokenizer(text, return_tensors="pt")
                pooled = network.text_model(input_ids=tokens.input_ids).pooler_output
                features.append(unit(network.text_projection(pooled))[0])
            expected = float(unit(torch.stack(features).mean(0)[None])[0] @ shown)
            assert float(found[place]) == pytest.approx(expected, abs=1e-4), colour
    assert float(found.max() - found.min()) > 1e-2
    assert colours([crop(picture, mask, Detection(name, 0.9, box))], [name]) == [COLOURS[int(found.argmax())]]


def unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def test_crops_are_painted_and_never_enlarged_without_end() -> None:
    picture = drawn(1)[0]
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[3:7, 10:20] = True
    mask[3, 10] = False
    got = crop(picture, mask, Detection("dog", 0.5, (10, 3, 20, 7)))
    assert got.shape == (4, 10, 3) and got[0, 0].tolist() == [0x99] * 3 and torch.equal(got[1:], picture[4:7, 10:20])
    strip = torch.arange(4096 * 3).reshape(4096, 1, 3).remainder(256).byte()
    cut = crop(strip, torch.ones(4096, 1, dtype=torch.bool), Detection("tie", 0.5, (0, 0, 1, 4096)))
    assert torch.equal(cut, strip[2040:2056])
    flat = crop(strip.transpose(0, 1), torch.ones(1, 4096, dtype=torch.bool), Detection("tie", 0.5, (0, 0, 4096, 1)))
    assert torch.equal(flat, cut.transpose(0, 1))


# ----------------------------------------------------------------------------------------------------------- rewards
def metadata_for(reward: GenEval, media: Tensor) -> list[dict[str, object]]:
    """Of each picture something that it shows, of the colour that it has, two of it or one."""
    detect, colours = reward._networks()
    made: list[dict[str, object]] = []
    for row, seen in enumerate(detect(media, [dict.fromkeys(CLASSES, reward.limits.threshold)] * len(media))):
        one, mask = max(seen or [], key=lambda pair: pair[0].confidence)
        colour = colours([crop(media[row], mask, one)], [one.name])[0]
        include = [{"class": one.name, "count": 1 + row % 2, "color": colour}, {"class": "zebra", "count": 1}]
        made.append({"tag": "colors", "include": include[: 1 + row // 2 % 2]})
    return made


def made(kind: Any, networks: tuple[Detector, Colours], **options: object) -> GenEval:
    reward = kind(path="not/loaded", clip_path="not/loaded", threshold=0.05, **options)
    reward._loaded = networks
    return reward


def test_the_rewards_end_to_end(networks: tuple[Detector, Colours]) -> None:
    media = drawn(4, seed=7)
    reward = made(geneval, networks)
    metadata = metadata_for(reward, media)
    prompts = ["", "🦓" * 40, "a" * 10_000, "a dog"]
    reward.check_prompts(prompts, metadata)
    scores = reward.score(media, prompts, metadata)
    assert scores.names == ("geneval",) and scores.ok.all() and scores.value[0, 0] == 1 and scores.value[2, 0] == 0
    graded = made(geneval_graded, networks).score(media, prompts, metadata)
    assert graded.names == ("geneval_graded",) and graded.ok.all()
    assert torch.equal(graded.value == 1, scores.value == 1) and 0 < float(graded.value[2, 0]) < 1
    for kind, name in ((geneval_flowgrpo, "geneval_flowgrpo"), (geneval_flowgrpo_strict, "geneval_flowgrpo_strict")):
        other = made(kind, networks).score(media, prompts, metadata)
        assert other.names == (name,) and other.ok.all() and (other.value <= 1).all()
    order = [2, 0, 3, 1]
    swapped = reward.score(media[order], prompts, [metadata[n] for n in order])
    assert torch.equal(swapped.value, scores.value[order])
    assert not torch.equal(reward.score(media, prompts, metadata[1:] + metadata[:1]).value, scores.value)
    assert len(reward.score(media[:0], [], [])) == 0


def test_batches_do_not_matter(networks: tuple[Detector, Colours]) -> None:
    media = drawn(8, seed=3)
    whole = made(geneval_graded, networks, batch=8)
    metadata = metadata_for(whole, media)
    single = made(geneval_graded, networks, batch=1)
    one, all_ = (r.score(media, [""] * 8, metadata) for r in (single, whole))
    assert torch.allclose(one.value, all_.value, atol=1e-5) and one.ok.all() and all_.ok.all()


@pytest.mark.parametrize("size", [(1, 1), (4096, 16)])
def test_odd_sizes(networks: tuple[Detector, Colours], size: tuple[int, int]) -> None:
    media = drawn(1, *size)
    reward = made(geneval, networks)
    assert reward.score(media, [""], metadata_for(reward, media)).value.tolist() == [[1.0]]


def test_half_precision_is_what_is_asked(folders: dict[str, str]) -> None:
    media = drawn(2)
    reward = GenEval(**folders, dtype="bfloat16", threshold=0.05)
    detect, colours = reward._networks()
    assert detect._network.dtype == colours.clip.model.dtype == torch.bfloat16
    assert reward.score(media, ["", ""], metadata_for(reward, media)).ok.all()


def test_a_network_that_gives_nan_has_failed(folders: dict[str, str]) -> None:
    media = drawn(2)
    reward = GenEval(**folders, threshold=0.05)
    metadata = metadata_for(reward, media)
    detect, colours = reward._networks()
    assert reward.score(media, ["", ""], metadata).ok.all()
    colours.clip.model.visual_projection.weight.data.fill_(torch.nan)
    plain = [{"tag": "single_object", "include": [{"class": "dog", "count": 1}]}]
    got = reward.score(media, ["", ""], [metadata[0], *plain])
    assert got.ok.tolist() == [[False], [True]]
    detect._network.class_predictor.bias.data.fill_(torch.inf)
    assert not reward.score(media, ["", ""], metadata).ok.any()


def test_what_is_no_picture_or_no_task_is_refused(networks: tuple[Detector, Colours]) -> None:
    reward = made(geneval, networks)
    plain = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    with pytest.raises(ValueError, match=r"nearest valid: torch\.uint8"):
        reward.score(drawn(1).float() / 255, [""], [plain])
    with pytest.raises(ValueError, match="media is a list"):
        reward.score([""], drawn(1), [plain])
    with pytest.raises(ValueError, match=r"include\[0\].class: 'dgo' is not valid; nearest valid: 'dog'"):
        reward.score(drawn(1), [""], [{**plain, "include": [{"class": "dgo", "count": 1}]}])
    with pytest.raises(ValueError, match=r"prompts: 'a dgo': tag: is missing; nearest valid: 'single_object'"):
        reward.check_prompts(["a dog", "a dgo"], [plain, {}])
    with pytest.raises(ValueError, match=r"prompts: 'dogs': include\[0\].count: 17, and at most 16 are counted"):
        reward.check_prompts(["dogs"], [{**plain, "include": [{"class": "dog", "count": 17}]}])
    for wrong in ({"batch": 0}, {"threshold": 1.0}, {"counting_threshold": -1.0}, {"most": 0}):
        with pytest.raises(ValueError, match="nearest valid"):
            GenEval(**wrong)


def test_the_suite_runs_on_real_networks(folders: dict[str, str], tmp_path: Path) -> None:
    """`tempflow suite geneval` on a folder of pictures: the networks are loaded from their folders, and the tables are
    those of the reward's own scores."""
    media, options = drawn(6, seed=7), {**folders, "threshold": 0.05, "counting_threshold": 0.05}
    reward = GenEval(**options)
    metadata = metadata_for(reward, media[:3])
    metadata = [{**line, "tag": tag} for line, tag in zip(metadata, ("colors", "counting", "color_attr"), strict=True)]
    (tmp_path / "in").mkdir()
    for n, picture in enumerate(media):  # three prompts, two pictures of each
        Image.fromarray(picture.numpy()).save(tmp_path / "in" / f"{n % 3}_{n // 3}.png")
    lines = [{**line, "prompt": f"prompt {n}"} for n, line in enumerate(metadata)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["suite", "geneval", str(tmp_path / "in"), "--prompts", str(tmp_path / "p.jsonl")]
    words += [word for name, value in options.items() for word in (f"--options.{name}", str(value))]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    expected = reward.score(media, [""] * 6, metadata * 2).value[:, 0].tolist()
    told = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {(line["number"], line["sample"]): line["value"] for line in told} == {
        (n % 3, n // 3): value for n, value in enumerate(expected)
    }
    assert 0 < sum(expected) < 6
    rows = {
        row["label"]: row["mean"]
        for table in json.loads((tmp_path / "out" / "summary.json").read_text())["tables"]
        for row in table["rows"]
    }
    for n, tag in enumerate(("colors", "counting", "color_attr")):
        assert rows[tag] == pytest.approx((expected[n] + expected[n + 3]) / 2)
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 6


# ----------------------------------------------------------------------------------------------------------- loading
def changed(folder: str, to: Path, **config: object) -> str:
    shutil.copytree(folder, to)
    file = to / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return str(to)


def test_other_networks_are_refused_by_name(folders: dict[str, str], tmp_path: Path) -> None:
    labels = {str(n): name for n, name in enumerate(COCO)}
    cases = {
        "path: .* is a 'clip'; nearest valid: .*'mask2former'": {"path": folders["clip_path"]},
        "clip_path: .* is a 'mask2former'; nearest valid: .*'clip'": {"clip_path": folders["path"]},
        "path: .*/nowhere' is not there": {"path": str(tmp_path / "nowhere")},
        "clip_path: .*/nowhere' is not there": {"clip_path": str(tmp_path / "nowhere")},
        "path: .* 80 classes: it lacks 'bench'": {
            "path": changed(folders["path"], tmp_path / "a", id2label={**labels, "13": "stool"})
        },
    }
    for message, wrong in cases.items():
        reward = GenEval(**{**folders, **wrong})
        with pytest.raises(ValueError, match=message) as caught:
            reward.prepare()
        assert len(str(caught.value).splitlines()) == 1


def test_weights_that_do_not_fit_are_refused_by_name(folders: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for field, key in (("path", "class_predictor.bias"), ("clip_path", "visual_projection.weight")):
        for fault in ("lacks", "has unexpected"):
            folder = Path(changed(folders[field], tmp_path / f"{field}{fault}"))
            tensors = load_file(folder / "model.safetensors")
            if fault == "lacks":
                del tensors[key]
            else:
                tensors["extra"] = torch.zeros(1)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            reward = GenEval(**{**folders, field: str(folder)})
            name = key if fault == "lacks" else "extra"
            with pytest.raises(ValueError, match=rf"{field}: .* {fault} {name}"):
                reward.prepare()
        pickled = Path(changed(folders[field], tmp_path / f"{field}pickle"))
        (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
        with pytest.raises(ValueError, match=f"{field}: "):
            GenEval(**{**folders, field: str(pickled)}).prepare()


def test_weights_as_transformers_4_saved_them_are_taken(folders: dict[str, str], tmp_path: Path) -> None:
    """Its backbone had no last norm, which is not used, and saved a table that is computed now."""
    from safetensors.torch import load_file, save_file

    folder = Path(changed(folders["path"], tmp_path / "old"))
    tensors = load_file(folder / "model.safetensors")
    within = "model.pixel_level_module.encoder"
    for name in [n for n in tensors if n.startswith((f"{within}.swin.layernorm", f"{within}.layernorm"))]:
        del tensors[name]
    tensors[f"{within}.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = torch.zeros(16, 16).long()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    wanted = [dict.fromkeys(CLASSES, 0.05)]
    old, new = (Detector(str(path), None, "cpu", "float32")(drawn(1), wanted)[0] for path in (folder, folders["path"]))
    assert [one for one, _ in old or []] == [one for one, _ in new or []] != []
