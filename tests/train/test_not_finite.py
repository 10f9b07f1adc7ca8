"""What is not finite is a failure with a name wherever it arises: encoders, network, decoder, rewards, credit, drafts.

Losses and gradients: tests/integration/test_faults.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, SIZE, Bench, Fake, album, brightness, config
from PIL import Image
from torch import Tensor, nn

from tempflow.algorithms import sol_rl
from tempflow.core.scores import Scores
from tempflow.evaluate.suite import draw, evaluate
from tempflow.media import Media, Size
from tempflow.models.finite import (
    GIVEN,
    LATENT,
    PICTURE,
    WHOLE,
    BrokenPicturesError,
    NotFiniteError,
    decoded,
    encoded,
    to_pictures,
    told,
)
from tempflow.models.protocol import Conditioning, Predict
from tempflow.request import Prompt, asked
from tempflow.rewards import RewardError, from_function, score_all
from tempflow.train.experience import check_advantages, credit, tell_broken
from tempflow.train.guards import GuardError
from tempflow.train.trainer import train

NAN, INF = math.nan, math.inf
BAD = PROMPTS[1]
FIXED: dict[str, Any] = {"steps": 3, "guidance": 1.0, "seed": 3, "size": SIZE, "rows": 64}


class Broken(Fake):
    """One that gives `value` at one place: for one prompt, or for the first picture of every call."""

    def __init__(self, place: str, value: float = NAN) -> None:
        super().__init__()
        self.place, self.value = place, value

    def encode(self, prompts: Sequence[Prompt], size: Size) -> Conditioning:
        condition = super().encode(prompts, size)
        if self.place == "encoder":
            condition.tensors["embeds"][[p.text == BAD for p in prompts]] = self.value
        if self.place == "empty prompt" and condition.negative is not None:
            condition.negative["embeds"].fill_(self.value)
        return condition

    def predictor(self, condition: Conditioning, guidance: Any, network: nn.Module | None = None) -> Predict:
        predict = super().predictor(condition, guidance, network)
        if self.place != "network":
            return predict
        bad = torch.tensor([p.text == BAD for p in condition.prompts])
        return lambda x, s, rows: predict(x, s, rows).masked_fill(bad[rows].view(-1, 1, 1, 1), self.value)

    def decode(self, x: Tensor, size: Size) -> Media:
        assert x.isfinite().all()  # an adapter is given nothing else
        if self.place != "decoder":
            return super().decode(x, size)
        images = (x.mean(1, keepdim=True) / 3).expand(-1, 3, -1, -1).clone()
        images[:1, 0, 0, 0] = self.value
        return to_pictures(images.split(2))

    def encode_media(self, media: Media, size: Size) -> Tensor:
        latents = super().encode_media(media, size)
        if self.place == "given pictures":
            latents[media.frames[..., 0].flatten(1).sum(1) % 2 == 0] = self.value
        return latents


SAYS = {
    "network": rf"the model's final latents are not finite \('{BAD}'\); try model.dtype float32",
    "decoder": rf"the decoder's pictures are not finite \('{PROMPTS[0]}'\); try",
}
STOPS = {"encoder": rf"prompt '{BAD}': its 'embeds' from the text encoders", "empty prompt": "prompt '': its 'embeds'"}
VALUES = pytest.mark.parametrize("value", [NAN, INF, -INF])


# -------------------------------------------------------------------------------------------------- a model's failures
@VALUES
@pytest.mark.parametrize("place", SAYS)
def test_an_evaluation_leaves_broken_pictures_out_and_says_so(place: str, value: float) -> None:
    seen: list[str] = []

    def spy(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        seen.extend(prompts)
        return brightness(images, prompts)

    prompts = [Prompt(p) for p in PROMPTS]
    report = evaluate(Broken(place, value), prompts, [from_function(spy)], **FIXED)
    whole = evaluate(Fake(), prompts, [from_function(brightness)], **FIXED)
    lost = [PROMPTS.index(BAD) if place == "network" else 0]
    kept = [n for n in range(6) if n not in lost]
    assert seen == [PROMPTS[n] for n in kept] and report.failed == 1 and report.valid("spy") == 5
    assert report.to_json()["valid"] == {"spy": 5}
    assert torch.isnan(report.scores.value[lost]).all() and report.mean("spy") == report.scores.value[kept].mean()
    if place == "network":
        assert torch.equal(report.scores.value[kept], whole.scores.value[kept])
    rows = report.table().splitlines()
    assert rows[-2] == "spy: 1 of 6 scores failed; its mean is of the other 5"
    assert re.match(rf"1 of 6 pictures are none: {SAYS[place]}", rows[-1])
    assert whole.faults == [] and "failed" not in whole.table()


@pytest.mark.parametrize("place", SAYS)
def test_a_drawing_crosses_out_what_is_none(place: str) -> None:
    media, whole = (draw(m, asked(PROMPTS), **FIXED).pictures() for m in (Broken(place), Fake()))
    lost = PROMPTS.index(BAD) if place == "network" else 0
    assert (media[lost] == torch.tensor([255, 0, 0], dtype=torch.uint8)).all(-1).any()
    if place == "network":
        kept = [n for n in range(6) if n != lost]
        assert torch.equal(media[kept], whole[kept])


@VALUES
@pytest.mark.parametrize("place", STOPS)
def test_a_condition_that_is_not_finite_is_named_before_anything_is_drawn(place: str, value: float) -> None:
    model = Broken(place, value)
    for act in (
        lambda: draw(model, asked(PROMPTS), **FIXED),
        lambda: evaluate(model, [Prompt(p) for p in PROMPTS], [from_function(brightness)], **FIXED),
        lambda: Bench(model).collect(),
    ):
        with pytest.raises(NotFiniteError, match=STOPS[place]):
            act()
    assert model.rows == []


@pytest.mark.parametrize("place", [*SAYS, *STOPS])
def test_a_run_says_it_by_name(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(
        tmp_path / "run",
        iterations=2,
        data={"prompts_per_iteration": 6},
        evaluation={"every": 0, "validation_prompts": 6, "test_prompts": 6},
        guards={"latent_norm": {"action": "off"}},
    )
    counted: list[int] = []

    def spy(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        counted.append(len(images))
        return brightness(images, prompts)

    def go() -> Any:
        return train(settings, model=Broken(place), reward=spy, prompts=PROMPTS)

    if place in STOPS:
        with pytest.raises(NotFiniteError, match=STOPS[place]):
            go()
        return
    run = go()
    said = capsys.readouterr().out
    lost, says = 18 if place == "network" else 1, SAYS[place].replace(PROMPTS[0], ".*")  # which comes first is drawn
    assert re.search(rf"warn: iteration 1: {lost} of 108 pictures are none: {says}.* They are failed", said)
    assert said.count("of 108 pictures are none") == 1  # once a run
    assert "warn: 1 of 6 pictures are none: " in said
    assert "warn: 1 of 6 scores of spy failed; its mean is of the other 5" in said
    assert counted.count(108 - lost) == 2 and run.after.valid("spy") == 5


@VALUES
def test_broken_drafts_are_told_of(value: float) -> None:
    seen = Bench(Broken("network", value), sol_rl(steps=4, group=3, pool=6, draft_steps=2)).collect()
    slot = PROMPTS.index(BAD)
    assert seen.drafts.view(6, 6)[slot].tolist() == [LATENT] * 6 and int((seen.drafts != WHOLE).sum()) == 6
    assert seen.broken.view(6, 3)[slot].tolist() == [LATENT] * 3 and int((seen.broken != WHOLE).sum()) == 3
    said, before = list[str](), set[tuple[str, int]]()
    for _ in range(2):  # the second time nothing is new
        tell_broken(seen, [Prompt(p) for p in PROMPTS], said.append, before)
    assert [line.partition(" are none")[0] for line in said] == [
        "warn: iteration 1: 3 of 18 pictures",
        "warn: iteration 1: 6 of 36 drafts",
    ]


def test_given_pictures_whose_latents_are_not_finite_are_failed_and_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = album(tmp_path / "album")
    settings = config(
        tmp_path / "run",
        iterations=2,
        algorithm={"name": "sft", "pairs": 2},
        data={"train": str(file), "prompts_per_iteration": 6},
        evaluation={"every": 0, "validation_prompts": 1, "test_prompts": 1},
    )
    train(settings, model=Broken("given pictures"), reward=brightness, test_prompts=["fog"])
    assert "pictures are none: the autoencoder's latents of given pictures are not finite (" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- pieces
def test_to_pictures_equals_plain_rounding_and_marks_what_is_none() -> None:
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    want = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(to_pictures(images.split(2)).pictures(), want)
    for n, value in enumerate((NAN, INF, -INF)):
        images[n, n, 1, 1] = value
    with pytest.raises(BrokenPicturesError, match="3 of 5 decoded pictures are not finite") as caught:
        to_pictures(images.split(2))
    assert caught.value.ok.tolist() == [False] * 3 + [True] * 2
    assert torch.equal(caught.value.media.pictures()[3:], want[3:]) and not caught.value.media.frames[:3].any()


@pytest.mark.parametrize(
    "media",
    [torch.zeros(2, 2, 2, 3, dtype=torch.uint8), Media(torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8)), None],
)
def test_media_of_another_kind_are_refused(media: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fake()
    monkeypatch.setattr(model, "decode", lambda x, size: media)
    with pytest.raises(
        ValueError, match=r"fake decoded 2 latents to (1 media|a Tensor|a NoneType); expected Media of 2"
    ):
        decoded(model, torch.zeros(2, 2, 2, 2), SIZE)


def test_nothing_broken_changes_nothing() -> None:
    model, x = Fake(), torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    seen = decoded(model, x, SIZE)
    assert torch.equal(seen.media.frames, model.decode(x, SIZE).frames) and seen.ok.all()
    assert torch.equal(
        encoded(model, asked(PROMPTS), SIZE).tensors["embeds"], model.encode(asked(PROMPTS), SIZE).tensors["embeds"]
    )


def test_lines_name_causes_and_prompts() -> None:
    broken = torch.tensor([WHOLE, LATENT, PICTURE, LATENT, LATENT, LATENT, LATENT, GIVEN])
    lines = told(broken, ["z", "a", "x" * 99, "b", "a", "c", "d", "g"])
    assert [line.split(" are none: ")[0] for line in lines] == ["5 of 8 pictures", "1 of 8 pictures", "1 of 8 pictures"]
    assert "('a', 'b', 'c' and 1 more)" in lines[0] and "x" * 60 in lines[1] and "x" * 61 not in lines[1]
    assert told(torch.zeros(3, dtype=torch.long), ["a"] * 3) == []


# ------------------------------------------------------------------------------------------------------------ rewards
MEDIA = torch.zeros(2, 2, 2, 3, dtype=torch.uint8)


def scored(*results: Any) -> Scores:
    rewards = [from_function(lambda images, prompts, r=r: r, name=f"r{n}") for n, r in enumerate(results)]
    return score_all(rewards, MEDIA, ["a", "b"], [{}, {}], [0, 1])


@pytest.mark.parametrize(
    "value", [NAN, INF, -INF, None, 1e39, 10**400, torch.tensor(NAN), torch.tensor(INF, dtype=torch.bfloat16)]
)
def test_a_score_that_is_not_finite_is_failed(value: Any) -> None:
    scores = scored([1.0, value])
    assert scores.ok[:, 0].tolist() == [True, False] and scores.value[:, 0].isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    "result",
    [
        [1.0, True], [1.0, 1j], [1.0, "2"], [1.0], [1.0, 2.0, 3.0], 1.0, None, "ab", {"a": 1.0, "b": 2.0},
        torch.tensor([1j, 2]), torch.tensor([True, False]), torch.zeros(2, 1), [[1.0], [2.0]],
    ],
)  # fmt: skip
def test_a_score_that_is_no_number_breaks_the_protocol(result: Any) -> None:
    with pytest.raises(RewardError, match="reward 'r0' returned"):
        scored(result)


def test_an_object_that_calls_infinity_a_score_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    class Own:
        name, groupwise = "own", False

        def score(self, media: Any, prompts: Any, metadata: Any) -> Scores:
            value = torch.tensor([[INF if p == "a" else 1.0] for p in prompts])
            return Scores(value, torch.ones_like(value, dtype=torch.bool), ("own",))

    scores = score_all([Own()], MEDIA, ["a", "b"], [{}, {}], [0, 1])
    assert scores.ok[:, 0].tolist() == [False, True] and "although ok" in caplog.text


def test_a_sum_that_is_not_finite_is_no_score() -> None:
    value, ok = scored([3e38, 1.0], [3e38, 1.0]).total()
    assert ok.tolist() == [False, True] and value.isnan().tolist() == [True, False]


# ------------------------------------------------------------------------------------------------------------- credit
@pytest.mark.parametrize("field", ["advantage", "weight"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_an_advantage_that_is_not_finite_moves_no_weight(field: str, value: float) -> None:
    bench = Bench()
    given = credit(bench.context, bench.collect())
    check_advantages(given, 1)
    ok = int(given.advantage.ok.nonzero()[0, 0])
    column = (given.advantage.value if field == "advantage" else given.weight).clone()
    column[ok] = value
    spoilt = replace(given, weight=column)
    if field == "advantage":
        spoilt = replace(given, advantage=replace(given.advantage, value=column))
    with pytest.raises(GuardError, match=rf"iteration 1: the {field} of 1 of \d+ edges is not finite\. No weight was"):
        check_advantages(spoilt, 1)
    left_out = replace(spoilt.advantage, ok=spoilt.advantage.ok & column.isfinite())
    check_advantages(replace(spoilt, advantage=left_out), 1)


def test_diversity_is_of_pictures_alone() -> None:
    """A broken one is black, and far from all others."""
    how = {**FIXED, "samples_per_prompt": 3}
    prompts = [Prompt(p) for p in PROMPTS]
    broken, whole = (evaluate(m, prompts, [from_function(brightness)], **how) for m in (Broken("network"), Fake()))
    assert broken.diversity is not None and whole.diversity is not None
    slot = PROMPTS.index(BAD)
    rest = [n for n in range(6) if n != slot]
    assert math.isnan(broken.diversity[slot]) and torch.equal(broken.diversity[rest], whole.diversity[rest])
    assert broken.to_json()["diversity"]["mean"] == pytest.approx(float(whole.diversity[rest].mean()))
