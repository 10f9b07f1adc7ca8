"""The loop with models that hold elements or have two streams: what moves, what stays, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, SHAPE, SIZE, Bench, Fake, config, flow, tempflow, weights
from PIL import Image
from torch import Tensor, nn

from tempflow.algorithms import (
    Algorithm,
    awm,
    diffusion_nft,
    dynamic_treerpo,
    gcpo,
    online_dpo,
    otca,
    rejection_sft,
    sft,
    vipo,
)
from tempflow.core.credit import PerStream
from tempflow.core.schedule import Schedule, linear
from tempflow.core.state import StateLayout, streams_along
from tempflow.evaluate.suite import draw, evaluate
from tempflow.media import Media, Size
from tempflow.models.family import Family
from tempflow.models.protocol import Conditioning, LaysOut, Predict, layout_of
from tempflow.request import Prompt, asked
from tempflow.rewards import from_function
from tempflow.rewards.protocol import Reward
from tempflow.train.build import by_stream as configured
from tempflow.train.checkpoint import newest, read_weights
from tempflow.train.experience import credit
from tempflow.train.trainer import train

STREAMS = ("video", "sound")


class Duet(Fake):
    """Two streams: the first of a state's two channels is "video", the other "sound"; a network's rows go with them."""

    name = "duet"

    def layout(self, condition: Conditioning, size: Size) -> StateLayout:
        return StateLayout(streams=streams_along(SHAPE, 0, {"video": 1, "sound": 1}))


class Animator(Fake):
    """Image-to-video: the first channel is the given frame, another for each prompt; the network says NaN there."""

    name = "animator"

    def layout(self, condition: Conditioning, size: Size) -> StateLayout:
        free = torch.ones(1, *SHAPE, dtype=torch.bool)
        free[:, 0] = False
        given = torch.tensor([float(len(prompt.text)) for prompt in condition.prompts]).view(-1, 1, 1, 1)
        return StateLayout(free, (given / 10).expand(-1, *SHAPE).contiguous())

    def predictor(self, condition: Conditioning, guidance: Any, network: nn.Module | None = None) -> Predict:
        said = super().predictor(condition, guidance, network)
        frame = torch.arange(2).view(1, 2, 1, 1) == 0
        return lambda x, sigma, rows: torch.where(frame, math.nan, said(x, sigma, rows))


def look(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    return [sum(image.convert("L").tobytes()) / 4 / 255 for image in images]


def other_look(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    return [-float(image.convert("L").tobytes()[0]) / 255 for image in images]


def voice(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    return [image.convert("L").tobytes()[1] / 255 for image in images]


def rewards(first: Any) -> list[Reward]:
    return [from_function(first, name="look"), from_function(voice, name="voice")]


def by_stream(algorithm: Algorithm) -> Algorithm:
    return replace(algorithm, credit=PerStream(algorithm.credit, STREAMS, {"look": "video", "voice": "sound"}))


METHODS = {
    "flow": lambda: flow(),
    "flow, two updates": lambda: flow(),
    "tempflow": lambda: tempflow(kl=0.01),
    "nft": lambda: diffusion_nft(steps=4, group=6),
    "awm": lambda: awm(steps=8, group=6),
}


def trained(model: Fake, algorithm: Algorithm, judges: Sequence[Reward], **context: Any) -> dict[str, Tensor]:
    bench = Bench(model, algorithm, rewards=judges, max_grad_norm=1e9, **context)
    for iteration in range(2):
        metrics = bench.iterate(iteration)
        assert all(math.isfinite(value) for name, value in metrics.items() if not name.startswith("reward")), metrics
    return weights(model)


@pytest.mark.parametrize("name", METHODS)
def test_a_reward_of_one_stream_leaves_the_others_weights_as_they_would_be(name: str) -> None:
    """After one iteration: later ones see other samples, as both streams make one picture."""
    updates = 2 if "updates" in name else 1
    found: list[dict[str, Tensor]] = []
    for first in (look, other_look):
        model = Duet()
        bench = Bench(model, by_stream(METHODS[name]()), rewards=rewards(first), max_grad_norm=1e9, updates=updates)
        bench.iterate()
        found.append(weights(model))
    start = weights(Duet())
    for key in ("mean.weight", "mean.bias"):
        a, b, before = found[0][key], found[1][key], start[key]
        assert torch.equal(a[4:], b[4:]) and not torch.equal(a[4:], before[4:])
        assert not torch.equal(a[:4], b[:4])


def test_a_reward_of_one_stream_alone_does_not_touch_the_other() -> None:
    algorithm = flow()
    algorithm = replace(algorithm, credit=PerStream(algorithm.credit, STREAMS, {"look": "video"}))
    model = Duet()
    after, start = trained(model, algorithm, rewards(look)[:1]), weights(Duet())
    assert torch.equal(after["mean.weight"][4:], start["mean.weight"][4:])
    assert not torch.equal(after["mean.weight"][:4], start["mean.weight"][:4])


def test_a_joint_credit_trains_both() -> None:
    model = Duet()
    after, start = trained(model, flow(), rewards(look)), weights(Duet())
    assert not torch.equal(after["mean.weight"][:4], start["mean.weight"][:4])
    assert not torch.equal(after["mean.weight"][4:], start["mean.weight"][4:])


def test_streams_of_equal_size_train_as_one_would() -> None:
    """The mean over two streams of four elements each is the mean over eight, up to rounding."""
    plain, split = Fake(), Duet()
    a, b = (trained(model, flow(), rewards(look)) for model in (plain, split))
    torch.testing.assert_close(b["mean.weight"], a["mean.weight"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_held_elements_stay_given_and_teach_nothing(name: str) -> None:
    model = Animator()
    bench = Bench(model, METHODS[name](), look, max_grad_norm=1e9, updates=2 if "updates" in name else 1)
    start = weights(model)
    for iteration in range(2):
        experience = bench.collect(iteration)
        given = torch.tensor([len(prompt) / 10 for prompt in PROMPTS])
        edges = experience.forest.edges
        for ends in (edges.parent, edges.child):
            frame = experience.forest.nodes[ends][:, 0]
            assert torch.equal(frame, given[edges.prompt].view(-1, 1, 1).expand_as(frame))
        assert bool(experience.forest.nodes.isfinite().all())
        metrics = bench.update(experience, iteration)
        assert all(math.isfinite(value) for value in metrics.values()), metrics
    after = weights(model)
    assert torch.equal(after["mean.weight"][:4], start["mean.weight"][:4])  # those of the given frame
    assert not torch.equal(after["mean.weight"][4:], start["mean.weight"][4:])


@pytest.mark.parametrize("algorithm", [otca(steps=4, group=6), gcpo(steps=4, group=6, sizes=None)])
def test_what_is_observed_leaves_held_elements_out(algorithm: Algorithm) -> None:
    held, moved = Bench(Animator(), algorithm, look), Bench(Moved(), algorithm, look)
    first, second = (bench.collect() for bench in (held, moved))
    assert first.whole.edges.traits
    for name, column in first.whole.edges.traits.items():
        torch.testing.assert_close(column, second.whole.edges.traits[name])


class Moved(Animator):
    """Another given frame, of which the free elements know nothing."""

    def layout(self, condition: Conditioning, size: Size) -> StateLayout:
        layout = super().layout(condition, size)
        assert layout.clean is not None
        return replace(layout, clean=layout.clean + 100)

    def decode(self, x: Tensor, size: Size) -> Media:
        return super().decode(torch.cat([x[:, :1] - 100, x[:, 1:]], 1), size)


def test_batches_have_the_layout_of_their_rows() -> None:
    for algorithm in (flow(), diffusion_nft(steps=4, group=6)):
        bench = Bench(Animator(), algorithm, look)
        experience = bench.collect()
        given = credit(bench.context, experience)
        batch = bench.batch(experience, given, next(bench.items(experience, given).updates(3)))
        assert batch.layout.clean is not None
        frame = torch.tensor([len(PROMPTS[slot]) / 10 for slot in batch.rows.tolist()])
        assert torch.equal(batch.layout.clean[:, 0, 0, 0], frame) and len(set(batch.rows.tolist())) > 1


def test_a_model_that_starts_at_another_spread_and_ends_above_zero() -> None:
    class Older(Fake):
        def schedule(self, steps: int, size: Size) -> Schedule:
            grid = linear(steps, 2.0).sigmas * 0.9 + 0.02
            return Schedule(grid, spread=0.9)

    for name in ("flow", "tempflow", "nft", "awm"):
        model = Older()
        start = weights(model)
        after = trained(model, METHODS[name](), rewards(look))
        assert not torch.equal(after["mean.weight"], start["mean.weight"])


def test_a_configuration_says_which_stream_a_reward_teaches(tmp_path: Path) -> None:
    """One of video alone moves what makes the video, and leaves the sound's rows as they were, bit for bit."""
    reward = {"name": "jpeg_compressibility", "stream": "video"}
    more: dict[str, Any] = {
        "evaluation": {"metric": "jpeg_compressibility", "validation_prompts": 2, "test_prompts": 2}
    }
    settings = config(tmp_path / "run", iterations=2, rewards=[reward], **more)
    model = Duet()
    before = weights(model)
    run = train(settings, model=model, prompts=list(PROMPTS), quiet=True)
    kept = read_weights(newest(run.folder), "policy")
    video, sound = slice(0, 4), slice(4, 8)  # the network's rows are the state's elements, channel by channel
    for name, was in before.items():
        assert torch.equal(kept[name][sound], was[sound]) and not torch.equal(kept[name][video], was[video])
    for model, stream, message in (
        (
            Fake(),
            "video",
            r"rewards.0.stream: 'video' of 'jpeg_compressibility', but 'fake' has one stream alone; nearest valid: ''",
        ),
        (
            Duet(),
            "vide",
            r"^rewards.0.stream: 'vide' of 'jpeg_compressibility' is no stream of 'duet'; nearest valid: 'video' of ",
        ),
    ):
        other = config(tmp_path / "no", rewards=[{**reward, "stream": stream}], **more)
        with pytest.raises(ValueError, match=message):
            train(other, model=model, prompts=list(PROMPTS), quiet=True)


@pytest.mark.parametrize(
    ("algorithm", "why"),
    [
        (rejection_sft(steps=4, group=6, best=2), "rejection_sft takes one advantage for all streams together"),
        (online_dpo(steps=4, group=6), "online_dpo takes one advantage for all streams together"),
        (vipo(steps=4, group=6, kind="flow"), "vipo takes one advantage for all streams together"),
        (dynamic_treerpo(4, 1, 2, 3, every=1), "dynamic_treerpo points to a prompt's best path, which differs by str"),
        (sft(), "sft is not taught by rewards"),
    ],
)
def test_algorithms_without_streams_refuse_before_any_forward(algorithm: Algorithm, why: str, tmp_path: Path) -> None:
    class Untouched(Duet):
        def encode(self, prompts: Sequence[Prompt], size: Size) -> Conditioning:
            raise AssertionError("a forward")

    rewards = [{"name": "shapes"}, {"name": "jpeg_compressibility", "stream": "video"}]
    settings = config(tmp_path / "no", rewards=rewards)
    message = f"rewards.1.stream: 'video' of 'jpeg_compressibility', but {why}.*; nearest valid: ''"
    with pytest.raises(ValueError, match=message):
        configured(settings, algorithm, Untouched(), asked(PROMPTS)[0])


@pytest.mark.parametrize(("streams", "why"), [(("video", "sound"), "is no stream of 'shapes'"), ((), "has one stream")])
def test_streams_are_looked_at_before_a_model_is_loaded(
    streams: tuple[str, ...], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(*given: object) -> None:
        raise AssertionError("loads")

    monkeypatch.setattr("tempflow.train.build._family", lambda config: Family("x", needed=(), streams=streams))
    monkeypatch.setattr("tempflow.train.trainer.prepare_model", loading)
    rewards = [{"name": "shapes"}, {"name": "jpeg_compressibility", "stream": "vidio"}]
    settings = config(tmp_path / "no", rewards=rewards)
    with pytest.raises(ValueError, match=f"^rewards.1.stream: 'vidio' of 'jpeg_compressibility'.*{why}.*; nearest val"):
        train(settings, prompts=["a red circle"], quiet=True)
    fine = config(tmp_path / "yes", rewards=[{"name": "shapes"}])
    with pytest.raises(AssertionError, match="loads"):
        train(fine, prompts=["a red circle"], quiet=True)


def test_evaluations_hold_what_training_holds() -> None:
    """The given frame is in what is decoded, another for each prompt, whichever prompts a call begins with."""
    how: dict[str, Any] = {"steps": 3, "guidance": 1.0, "seed": 1, "size": SIZE, "rows": 5}
    seen: list[Tensor] = []

    class Watched(Animator):
        def decode(self, x: Tensor, size: Size) -> Media:
            seen.append(x.clone())
            return super().decode(x, size)

    draw(Watched(), asked(PROMPTS), **how)
    evaluate(Watched(), asked(PROMPTS[3:]), rewards(look), first=3, **how)
    for x, prompts in zip(seen, (PROMPTS, PROMPTS[3:]), strict=True):
        given = torch.tensor([len(text) / 10 for text in prompts]).view(-1, 1, 1)
        assert torch.equal(x[:, 0], given.expand(-1, 2, 2)) and bool(x.isfinite().all())
    assert torch.equal(seen[0][3:], seen[1])


# ------------------------------------------------------------------------------------------------------------ protocol
def test_models_without_a_layout_are_whole() -> None:
    model = Fake()
    condition = model.encode(asked(PROMPTS), SIZE)
    assert not isinstance(model, LaysOut) and layout_of(model, condition, SIZE).whole
    assert isinstance(Animator(), LaysOut) and layout_of(Animator(), condition, SIZE, 4).first == 4


def test_a_layout_of_other_rows_is_refused() -> None:
    model = Animator()
    with pytest.raises(ValueError, match="layout: clean has 6 rows; nearest valid: 1, or 2, the prompts"):
        layout_of(Wrong(), model.encode(asked(PROMPTS[:2]), SIZE), SIZE)


class Wrong(Animator):
    def layout(self, condition: Conditioning, size: Size) -> StateLayout:
        return super().layout(self.encode(asked(PROMPTS), size), size)


def test_advantages_of_streams_that_the_model_has_not_are_refused() -> None:
    bench = Bench(Fake(), by_stream(flow()), rewards=rewards(look))
    with pytest.raises(ValueError, match="are not the model's; nearest valid"):
        bench.iterate()
