"""Whole runs on pictures from disk: what they write, resuming, LoRA, and what is refused before any forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Fake, album, brightness, config, same, weights
from PIL import Image

from tempflow.request import Prompt
from tempflow.train import checkpoint, trainer
from tempflow.train.records import LINES, Run
from tempflow.train.trainer import train

FIELDS: dict[str, dict[str, Any]] = {"diffusion_dpo": {"beta": 20.0}, "sft": {}}
every = pytest.mark.parametrize("name", FIELDS)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return album(tmp_path / "data")


def go(output: Path, source: Path, name: str, model: Any = None, resume: bool = False, **changes: Any) -> Run:
    prompts = output.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    data = {"train": str(source), "validation": str(prompts), "test": str(prompts), "prompts_per_iteration": 4}
    settings = config(
        output,
        algorithm={"name": name, **FIELDS[name]},
        data=data,
        evaluation={"metric": "reward", "every": 2},
        **{"iterations": 6, "checkpoint": {"every": 2}, **changes},
    )
    model = Fake() if model is None else model
    return train(settings, model=model, reward=brightness, quiet=True, resume=resume)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@every
def test_a_run_learns_what_it_is_shown(name: str, pairs: Path, tmp_path: Path) -> None:
    """The chosen pictures are bright; validation samples and scores as ever."""
    run = go(tmp_path / "run", pairs, name, iterations=10)
    assert run.after.mean("brightness") > run.before.mean("brightness") + 0.05
    assert (run.counter.rollout, run.counter.decodes, run.counter.reward_calls) == (0, 0, 0)
    metrics = lines(run.folder, "metrics.jsonl")
    assert len(metrics) == 10 and not any(key.startswith("reward/") for key in metrics[0])
    assert lines(run.folder, "steps.jsonl")[0]["steps"][0]["step"] == 0
    assert lines(run.folder, "alarms.jsonl") == []
    assert any({"encode", "train"} <= line.keys() for line in lines(run.folder, "timings.jsonl"))


@every
def test_a_resumed_run_ends_as_the_whole_one(
    name: str, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(tmp_path / "whole", pairs, name).folder

    class Killed(BaseException):
        pass

    encode, reads = Fake.encode_media, list[int]()

    def dies(*given: Any) -> torch.Tensor:
        """After the checkpoint of iteration 2, in the middle of iteration 4."""
        reads.append(1)
        if len(reads) == 3 * 4 + 2:
            raise Killed
        return encode(*given)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Fake, "encode_media", dies)
        go(tmp_path / "part", pairs, name)
    assert len(lines(tmp_path / "part", "metrics.jsonl")) == 3
    part = go(tmp_path / "part", pairs, name, resume=True).folder
    for file in (*LINES, "model/model.safetensors"):
        assert (part / file).read_bytes() == (whole / file).read_bytes(), file
    ends = [checkpoint.read(checkpoint.newest(folder)).tensors[checkpoint.WEIGHTS] for folder in (part, whole)]
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())


def test_the_rewards_weights_judge_and_do_not_reach_the_pairs(pairs: Path, tmp_path: Path) -> None:
    """The pictures' scores have another name than any reward, and a weight of 0 must not silence them."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    settings = config(
        tmp_path / "run",
        iterations=1,
        algorithm={"name": "diffusion_dpo"},
        data={"train": str(pairs), "validation": str(prompts), "test": str(prompts), "prompts_per_iteration": 4},
        rewards=[{"name": "jpeg_compressibility", "weight": 3.0}],
    )
    run = train(settings, model=Fake(), quiet=True)
    assert lines(run.folder, "metrics.jsonl")[0]["failed_rewards"] == 0
    look = lines(run.folder, "evaluation.jsonl")[0]["mean"]
    assert look["reward"] == pytest.approx(3 * look["jpeg_compressibility"])


def test_prompts_given_as_objects_name_pictures_in_the_working_directory(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pairs.parent)
    prompts = [Prompt(p, {"image": f"{n}_chosen.png"}) for n, p in enumerate(PROMPTS)]
    settings = config(tmp_path / "run", algorithm={"name": "sft"}, iterations=1)
    train(settings, model=Fake(), reward=brightness, prompts=prompts, quiet=True)
    monkeypatch.chdir(tmp_path)
    settings = config(tmp_path / "other", algorithm={"name": "sft"}, iterations=1)
    with pytest.raises(ValueError, match=r"prompts: prompt 1 \('a dim lamp'\), image '0_chosen\.png': .* is no file"):
        train(settings, model=Fake(), reward=brightness, prompts=prompts, quiet=True)


# ------------------------------------------------------------------------------------------------------------- refused
def spoilt(folder: Path, **changes: object) -> None:
    """The third line of the data with other values; None takes a key away."""
    found = lines(folder, "pairs.jsonl")
    found[2] = {k: v for k, v in {**found[2], **changes}.items() if v is not None}
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, found)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected": None, "rejectd": "x.png"}, r"prompt 3 \(.*\): no \"rejected\"; did you mean 'rejectd'\?"),
        ({"chosen": "../2_chosen.png"}, r"prompt 3 \(.*\), chosen '\.\./2_chosen\.png': leads out of"),
        ({"chosen": "large.png"}, r"prompt 3 \(.*\), chosen 'large\.png': is 4×2 .*the run draws 2×2"),
        ({"chosen": "text.png"}, r"prompt 3 \(.*\), chosen 'text\.png': no picture"),
    ],
)
def test_faults_in_the_data_stop_a_run_before_its_first_forward(
    changes: dict[str, object], message: str, pairs: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (2, 4)).save(pairs.parent / "large.png")
    (pairs.parent / "text.png").write_text("no")
    spoilt(pairs.parent, **changes)
    model = Fake()
    with pytest.raises(ValueError, match=r"data\.train: .*pairs\.jsonl: " + message):
        go(tmp_path / "run", pairs, "diffusion_dpo", model)
    assert model.rows == [] and not (tmp_path / "run").exists()


def test_a_source_without_pictures_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", algorithm={"name": "sft"}, data={"train": "shapes:train"})
    with pytest.raises(ValueError, match=r"data.train: shapes:train: prompt 1 .*: no \"image\"; a line looks like"):
        train(settings, model=Fake(), reward=brightness, quiet=True)


def test_a_picture_that_breaks_while_training_stops_the_run_and_it_goes_on(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a score of 0, never another picture in its place."""
    whole = go(tmp_path / "whole", pairs, "sft").folder
    kept = (pairs.parent / "0_chosen.png").read_bytes()

    encode, reads = Fake.encode_media, list[int]()

    def cuts(*given: Any) -> torch.Tensor:
        reads.append(1)
        if len(reads) == 12:
            for file in pairs.parent.glob("*_chosen.png"):
                file.with_suffix(".kept").write_bytes(file.read_bytes())
                file.write_bytes(file.read_bytes()[:40])
        return encode(*given)

    with monkeypatch.context() as patch:
        patch.setattr(Fake, "encode_media", cuts)
        with pytest.raises(ValueError, match=r"image '\d_chosen\.png': no picture that can be read"):
            go(tmp_path / "run", pairs, "sft")
    for file in pairs.parent.glob("*.kept"):
        file.rename(file.with_suffix(".png"))
    assert (pairs.parent / "0_chosen.png").read_bytes() == kept
    again = go(tmp_path / "run", pairs, "sft", resume=True).folder
    assert (again / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------------- the real adapter
@pytest.mark.slow
def test_a_lora_on_the_shapes_model_and_the_base_stays(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    from tempflow.models import load
    from tempflow.shapes.prompts import balanced

    folder, base = tmp_path / "data", load("shapes")
    folder.mkdir()
    texts = [s.prompt for s in balanced("train", 2)]
    found = []
    for n, text in enumerate(texts):
        for key, colour in (("chosen", "red"), ("rejected", "black")):
            Image.new("RGB", (32, 32), colour).save(folder / f"{n}{key}.png")
        found.append({"prompt": text, "chosen": f"{n}chosen.png", "rejected": f"{n}rejected.png"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, found)))
    settings = config(
        tmp_path / "run",
        iterations=2,
        algorithm={"name": "diffusion_dpo", "pairs": 2},
        model={"height": 32, "width": 32, "training": "lora", "lora_rank": 2, "lora_alpha": 4},
        data={"train": str(folder / "pairs.jsonl"), "prompts_per_iteration": 2},
        evaluation={"metric": "shapes_strict", "validation_prompts": 1, "test_prompts": 1, "steps": 2},
    )
    model = trainer.prepare_model(settings)
    before = weights(model)  # type: ignore[arg-type]
    run = train(settings, model=model, quiet=True)
    after = weights(model)  # type: ignore[arg-type]
    assert all(torch.equal(after[n], t) for n, t in before.items() if "lora" not in n)
    policy = checkpoint.read_weights(checkpoint.newest(run.folder), "policy")
    assert policy.keys() == {n for n in before if "lora" in n} and not same(policy, {n: before[n] for n in policy})
    assert len(base.network.state_dict()) > 0 and (run.folder / "model" / "pytorch_lora_weights.safetensors").is_file()
