"""Whole runs on the toy: what they learn, write, keep, and refuse."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, Fake, Velocity, brightness, config, same, weights
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tempflow.config import load_config
from tempflow.core.schedule import Schedule, linear
from tempflow.core.scores import Scores
from tempflow.evaluate.suite import evaluate, fixed_prompts
from tempflow.media import Media, Size
from tempflow.models import resolved_dtype
from tempflow.models.experts import Experts
from tempflow.models.protocol import Conditioning, Predict
from tempflow.request import Prompt
from tempflow.rewards import from_function
from tempflow.train import build
from tempflow.train.guards import GuardError
from tempflow.train.records import plain
from tempflow.train.trainer import Run, train

Images = list[Image.Image]


def go(output: Path, model: Fake | None = None, reward: Any = brightness, quiet: bool = True, **changes: Any) -> Run:
    return train(config(output, **changes), model=model or Fake(), reward=reward, prompts=PROMPTS, quiet=quiet)


class TwoExperts(Fake):
    """Its network is two, each for some of the noise levels, as a single module."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Experts({"high": Velocity(), "low": Velocity()}, (0.8,))

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return [network.get_submodule(f"{name}.mean") for name in ("high", "low")]

    def predictor(self, condition: Conditioning, guidance: Any, network: nn.Module | None = None) -> Predict:
        module, tokens = self.network if network is None else network, condition.tensors["embeds"][:, 0]
        return lambda x, sigma, rows: module(sigma, x=x, sigma=sigma, condition=tokens[rows])


def test_a_model_of_two_networks_trains_both(tmp_path: Path) -> None:
    model = TwoExperts()
    before = weights(model)
    run = go(tmp_path / "run", model)
    after = weights(model)
    assert run.after.mean("reward") > run.before.mean("reward") + 0.03  # each learns from its half of the steps
    assert {name.split(".")[0] for name in before} == {"high", "low"}
    assert all(not torch.equal(after[name], before[name]) for name in before)
    kept = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert kept.keys() == before.keys()


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return go(tmp_path_factory.mktemp("run") / "toy", optimizer={"updates_per_iteration": 2})


def test_the_held_out_reward_rises(finished: Run) -> None:
    assert finished.after.mean("reward") > finished.before.mean("reward") + 0.1
    assert finished.before.values("reward").shape == (12,)
    assert finished.best_iteration > 0
    pattern = r"held-out reward: 0\.\d\d -> 0\.\d\d \(\+0\.\d\d\), \d+\.\d min, \d+ forward-equivalents, \d+ forwards"
    assert re.fullmatch(pattern, finished.last_line), finished.last_line


def test_what_a_run_writes(finished: Run) -> None:
    folder = finished.folder
    metrics, evaluations = lines(folder, "metrics.jsonl"), lines(folder, "evaluation.jsonl")
    assert [m["iteration"] for m in metrics] == list(range(1, 9))
    assert [e["iteration"] for e in evaluations] == [0, 2, 4, 6, 8]
    told = {"reward/brightness", "reward_std/brightness", "failed_rewards", "zero_variance", "trained_edges", "updates"}
    for line in metrics:
        assert told | {"loss", "grad_norm", "log_ratio_max", "log_ratio_abs", "clip_fraction"} <= line.keys()
        assert line["updates"] == 2
    assert metrics[-1]["forwards"] == finished.counter.forwards
    parts = ("rollout_forwards", "train_forwards", "reference_forwards", "old_forwards")
    assert metrics[-1]["forwards"] == sum(metrics[-1][part] for part in parts)
    assert len(lines(folder, "timings.jsonl")) == 8 + 5
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best_iteration"] == finished.best_iteration and summary["metric"] == "reward"
    assert summary["after"]["mean"]["reward"] == pytest.approx(finished.after.mean("reward"))
    assert summary["cost"]["forwards"] == finished.counter.forwards
    samples = json.loads((folder / "samples.json").read_text())
    assert samples["reward"][1] == pytest.approx(finished.after.values("reward").tolist())
    for name in ("before_after.png", "curve.png"):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 100
    assert (folder / "config.yaml").read_text().startswith("name: toy\n")


def test_every_row_through_the_network_is_accounted_for(finished: Run) -> None:
    """Rollout and training by the counter; the rest is evaluation: 5 validations, test and grid before and after."""
    model = finished.model
    assert isinstance(model, Fake)
    looked = 4 * (5 * 6 + 2 * (12 + 12))
    assert sum(model.rows) == finished.counter.forwards + looked


def test_what_chooses_weights_has_other_noise_than_what_reports_them(tmp_path: Path) -> None:
    """Test and validation have the same prompts here, the weights hardly move, and no picture is the same."""
    still = {"learning_rate": 1e-12, "updates_per_iteration": 1}
    run = go(tmp_path / "still", iterations=1, optimizer=still, evaluation={"test_prompts": 6, "every": 1})
    (chosen,) = {line["mean"]["reward"] for line in lines(run.folder, "evaluation.jsonl")[-1:]}
    assert run.before.mean("reward") == pytest.approx(run.after.mean("reward"), abs=1e-4)
    assert abs(chosen - run.before.mean("reward")) > 1e-3


def test_two_runs_of_one_seed_are_identical(finished: Run, tmp_path: Path) -> None:
    again = go(tmp_path / "again", optimizer={"updates_per_iteration": 2})
    for name in ("metrics.jsonl", "evaluation.jsonl", "samples.json"):
        assert (finished.folder / name).read_bytes() == (again.folder / name).read_bytes()
    files = [folder / "model" / "model.safetensors" for folder in (finished.folder, again.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = go(tmp_path / "other", optimizer={"updates_per_iteration": 2}, seed=1)
    assert (finished.folder / "metrics.jsonl").read_bytes() != (other.folder / "metrics.jsonl").read_bytes()
    first = [lines(run.folder, "evaluation.jsonl")[0]["mean"] for run in (finished, other)]
    assert first[0] == first[1]  # evaluation noise is not the run's


def test_batch_sizes_do_not_change_a_run(finished: Run, tmp_path: Path) -> None:
    other = go(tmp_path / "b", optimizer={"updates_per_iteration": 2}, rollout_rows=5, train_rows=7)
    for a, b in zip(lines(finished.folder, "metrics.jsonl")[:3], lines(other.folder, "metrics.jsonl")[:3], strict=True):
        assert a.keys() == b.keys()
        for key in ("reward/brightness", "loss", "grad_norm", "forwards", "trained_edges"):
            assert a[key] == pytest.approx(b[key], rel=2e-2, abs=1e-5), key
    changed = weights(other.model)  # type: ignore[arg-type]
    for name, value in weights(finished.model).items():  # type: ignore[arg-type]
        torch.testing.assert_close(changed[name], value, rtol=0.05, atol=0.02)


def near(images: Images, prompts: list[str]) -> list[float]:
    """Best at a grey of .58: a large learning rate overshoots."""
    return [1 - abs(b - 0.58) for b in brightness(images, prompts)]  # type: ignore[operator]


@pytest.mark.parametrize("ema", [0.0, 0.6])
def test_the_best_validation_is_what_is_kept_saved_and_reported(ema: float, tmp_path: Path) -> None:
    changes = {"optimizer": {"learning_rate": 0.25, "ema_decay": ema}, "evaluation": {"every": 1}, "iterations": 10}
    run = go(tmp_path / "run", reward=near, **changes)
    evaluations = lines(run.folder, "evaluation.jsonl")
    means = [e["mean"]["reward"] for e in evaluations]
    assert run.best_iteration == means.index(max(means)) and 0 < run.best_iteration < 10
    assert max(means) > means[-1] + 1e-3
    saved = load_file(run.folder / "model" / "model.safetensors")
    assert same(saved, weights(run.model))  # type: ignore[arg-type]
    reward, model = from_function(near), Fake()
    model.network.load_state_dict(saved)
    prompts = [Prompt(p) for p in PROMPTS]
    fixed = {"steps": 4, "guidance": 1.0, "seed": 1234, "size": Size(2, 2), "rows": 64}
    best = evaluate(model, fixed_prompts(prompts, 6), [reward], stream="validation", **fixed)
    assert best.mean("near") == pytest.approx(max(means))
    assert evaluate(model, fixed_prompts(prompts, 12), [reward], **fixed).mean("near") == run.after.mean("near")


def test_the_average_is_what_is_validated_and_it_lags(tmp_path: Path) -> None:
    """It takes no part in training: the same metrics, other evaluations."""
    raw, mean = (go(tmp_path / str(ema), optimizer={"ema_decay": ema}) for ema in (0.0, 0.9))
    assert (raw.folder / "metrics.jsonl").read_bytes() == (mean.folder / "metrics.jsonl").read_bytes()
    scores = [[e["mean"]["reward"] for e in lines(r.folder, "evaluation.jsonl")] for r in (raw, mean)]
    assert scores[0][0] == scores[1][0]
    assert all(a > b for a, b in zip(scores[0][1:], scores[1][1:], strict=True))


def test_the_yardstick_is_the_untrained_model_with_its_best_guidance(tmp_path: Path) -> None:
    run = go(tmp_path / "run", iterations=2, evaluation={"yardstick": (1.0, 2.0, 3.0)})
    assert run.yardstick is not None
    guidance, report = run.yardstick
    at = {g: go(tmp_path / str(g), iterations=1, evaluation={"guidance": g}).before for g in (1.0, 2.0, 3.0)}
    assert guidance == max(at, key=lambda g: at[g].mean("reward"))
    assert report.mean("reward") == at[guidance].mean("reward")
    assert go(tmp_path / "none", iterations=1).yardstick is None


def test_the_start_is_kept_when_training_only_harms(tmp_path: Path) -> None:
    """Trained for brightness, the pictures that were right at the start only get worse."""
    model = Fake()
    start = weights(model)
    calls = {"n": 0}

    def drifting(images: Images, prompts: list[str]) -> list[float]:
        calls["n"] += len(images) <= 6  # a validation: every one scores lower than the last
        return [b - 10 * calls["n"] if len(images) <= 6 else b for b in brightness(images, prompts)]  # type: ignore[operator]

    run = go(tmp_path / "run", model, reward=drifting)
    assert run.best_iteration == 0 and same(weights(model), start)


def test_a_guard_in_mid_run_leaves_the_best_weights_saved(tmp_path: Path) -> None:
    model, seen = Fake(), {"rollouts": 0}

    def breaks(images: Images, prompts: list[str]) -> list[float | None]:
        if len(images) == 54:
            seen["rollouts"] += 1
        return [None] * len(images) if seen["rollouts"] == 6 and len(images) == 54 else brightness(images, prompts)

    with pytest.raises(GuardError, match="iteration 6: all 54 rewards failed"):
        go(tmp_path / "run", model, reward=breaks)
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert same(saved, weights(model)) and not same(saved, weights(Fake()))
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 5


def test_an_existing_run_is_refused_before_the_first_forward(finished: Run) -> None:
    before = (finished.folder / "metrics.jsonl").read_bytes()
    model = Fake()
    with pytest.raises(ValueError, match=r"output: '.*toy' already holds a run"):
        go(finished.folder, model)
    assert model.rows == [] and (finished.folder / "metrics.jsonl").read_bytes() == before


def test_what_the_model_cannot_draw_is_refused_before_the_first_forward(tmp_path: Path) -> None:
    model, settings = Fake(), config(tmp_path / "run", model={"height": 4})
    with pytest.raises(ValueError, match=r"^model\.height, width: 4×2 must be 2×2"):
        train(settings, model=model, reward=brightness, prompts=PROMPTS, quiet=True)
    assert model.rows == [] and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": {"name": "mix_grpo_flash", "steps": 8}},
            "algorithm.compress: 0.4, but the model's grid ends at",
        ),
        (
            {"algorithm": {"name": "e2po", "steps": 4, "kl": 0.0}},
            "algorithm.conditions: the model 'fake' does not show",
        ),
        ({"evaluation": {"steps": 3}}, "evaluation.steps: 3 is not 4; nearest valid: 4"),
        (
            {"model": {"guidance": 2.0, "height": 2, "width": 2}},
            "model.guidance: guidance 2, and 'fake' has no negative",
        ),
        ({"evaluation": {"yardstick": [1, 3], "steps": 4}}, "evaluation.yardstick: guidance 3, and 'fake' has no neg"),
    ],
)
def test_what_the_model_does_not_take_is_named_as_the_configuration_does_before_the_first_forward(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    class Particular(Fake):
        encode_inputs = None  # type: ignore[assignment]  # as if it were not there

        def encode(self, prompts: Sequence[Prompt], size: Size) -> Conditioning:
            return replace(super().encode(prompts, size), negative=None)

        def schedule(self, steps: int, size: Size) -> Schedule:
            if steps < 4:
                raise ValueError(f"steps: {steps} is not 4; nearest valid: 4")
            return Schedule(linear(steps, 2.0).sigmas * 0.9 + 0.02)

    model = Particular()
    with pytest.raises(ValueError, match="^" + message):
        train(config(tmp_path / "run", **changes), model=model, reward=brightness, prompts=PROMPTS, quiet=True)
    assert model.rows == [] and not (tmp_path / "run").exists()


def test_no_prompts_and_nothing_to_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts: the list is empty"):
        train(config(tmp_path / "a"), model=Fake(), reward=brightness, prompts=[])
    frozen = Fake()
    frozen.network.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires gradients"):
        go(tmp_path / "b", frozen)
    with pytest.raises(ValueError, match="cannot be called"):
        go(tmp_path / "c", reward=3)
    assert list(tmp_path.iterdir()) == []


class Steps:
    """Watches AdamW: the learning rate of every step, and what it added to each parameter."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rates: list[float] = []
        self.moves: list[list[Tensor]] = []
        original = torch.optim.AdamW.step

        def step(optimizer: torch.optim.AdamW, closure: Any = None) -> Any:
            group = optimizer.param_groups[0]
            before = [p.detach().clone() for p in group["params"]]
            result = original(optimizer, closure)
            self.rates.append(group["lr"])
            self.moves.append([p.detach() - b for p, b in zip(group["params"], before, strict=True)])
            return result

        patch.setattr(torch.optim.AdamW, "step", step)


def test_warm_up_raises_the_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    go(tmp_path / "warm", iterations=5, optimizer={"learning_rate": 0.01, "warmup_iterations": 3})
    assert steps.rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert max(float(m.abs().max()) for m in steps.moves[0]) == pytest.approx(0.0025, rel=1e-2)


def test_the_optimizer_is_the_configured_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    original = torch.optim.AdamW.__init__

    def init(self: torch.optim.AdamW, parameters: Any, **options: Any) -> None:
        made.append(options)
        original(self, parameters, **options)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", init)
    chosen = {"learning_rate": 0.003, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.02}
    go(tmp_path / "run", iterations=1, optimizer=chosen)
    want = {"lr": 0.003, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.02}
    assert {k: made[0][k] for k in want} == want


class Pair:
    """A reward object with the members of the protocol."""

    name, groupwise = "pair", True

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def score(self, media: Media, prompts: Any, metadata: Any) -> Scores:
        self.sizes.append(len(media))
        assert len(set(prompts)) == 1
        value = media.pictures().float().mean((1, 2, 3))[:, None] / 255
        return Scores(value, torch.ones_like(value, dtype=torch.bool), ("pair",))


def test_several_rewards_functions_and_objects_are_summed(tmp_path: Path) -> None:
    pair = Pair()
    run = go(tmp_path / "run", reward=[pair, brightness], iterations=2)
    assert set(run.before.scores.names) == {"pair", "brightness", "reward"}
    assert run.after.mean("reward") == pytest.approx(run.after.mean("pair") + run.after.mean("brightness"), rel=1e-5)
    assert set(pair.sizes) == {1, 18}  # evaluation draws one a prompt; a rollout's groups are whole
    assert {"reward/pair", "reward/brightness"} <= lines(run.folder, "metrics.jsonl")[0].keys()


def test_a_function_called_reward_works(tmp_path: Path) -> None:
    def reward(images: Images, prompts: list[str]) -> list[float | None]:
        return brightness(images, prompts)

    run = go(tmp_path / "run", reward=reward, iterations=1)
    assert run.before.scores.names == ("reward",)


def test_configured_reward_weights_reach_advantages_and_the_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other sign turns the first step round."""
    steps = Steps(monkeypatch)
    for name, weight in (("plus", 2.0), ("minus", -2.0)):
        rewards = [{"name": "jpeg_compressibility", "weight": weight}]
        settings = config(tmp_path / name, iterations=1, rewards=rewards)
        run = train(settings, model=Fake(), prompts=PROMPTS, quiet=True)
        assert run.before.mean("reward") == pytest.approx(weight * run.before.mean("jpeg_compressibility"), rel=1e-5)
    plus, minus = steps.moves
    for a, b in zip(plus, minus, strict=True):
        torch.testing.assert_close(a, -b, rtol=1e-3, atol=1e-6)
    assert max(float(m.abs().max()) for m in plus) > 0.01


def test_test_prompts_are_apart_from_the_others(tmp_path: Path) -> None:
    asked: list[set[str]] = []

    def spy(images: Images, prompts: list[str]) -> list[float | None]:
        asked.append(set(prompts))
        return brightness(images, prompts)

    settings = config(tmp_path / "run", iterations=1, evaluation={"test_prompts": 2})
    train(settings, model=Fake(), reward=spy, prompts=PROMPTS[:4], test_prompts=PROMPTS[4:], quiet=True)
    held = set(PROMPTS[4:])
    assert asked[0] == asked[-1] == held and not any(used & held for used in asked[1:-1])


def test_quiet_is_silent_and_else_the_last_line_says_it_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tmp_path / "quiet", iterations=1)
    assert capsys.readouterr().out == ""
    run = go(tmp_path / "loud", iterations=2, quiet=False)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == run.last_line
    assert any(line.startswith("toy 2/2  reward brightness 0.") for line in said)
    assert any("held-out test, 12 pictures" in line for line in said)


def test_without_matplotlib_a_run_still_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = go(tmp_path / "run", iterations=1, quiet=False)
    assert "pip install 'tempflow[plots]'" in capsys.readouterr().out
    assert (run.folder / "summary.json").is_file() and not (run.folder / "curve.png").exists()


def test_failed_scores_are_null_in_json_never_nan_or_zero(tmp_path: Path) -> None:
    def fails(images: Images, prompts: list[str]) -> list[float | None]:
        return [None if p == "fog" else r for p, r in zip(prompts, brightness(images, prompts), strict=True)]

    run = go(tmp_path / "run", reward=fails, iterations=2)
    assert lines(run.folder, "evaluation.jsonl")[0]["failed"] == 1
    samples = lines(run.folder, "samples.json")[0]["fails"][0]
    assert samples.count(None) == 2 and 0.0 not in samples
    nan = float("nan")
    assert plain({"a": [nan, 1.0, float("inf")], "b": {"c": (nan, "x", 2)}}) == {
        "a": [None, 1.0, None],
        "b": {"c": [None, "x", 2]},
    }


def test_trackers_get_metrics_validations_and_pictures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = go(tmp_path / "run", iterations=4, track={"to": ("tensorboard",), "images_every": 2})
    (events,) = {file.parent for file in run.folder.rglob("*tfevents*")}
    reader = accumulator.EventAccumulator(str(events), {"images": 0, "scalars": 0})
    reader.Reload()
    tags = reader.Tags()
    assert {"loss", "forwards", "validation/reward"} <= set(tags["scalars"])
    assert [e.step for e in reader.Scalars("validation/reward")] == [0, 2, 4]
    assert tags["images"] and {e.step for tag in tags["images"] for e in reader.Images(tag)} == {2, 4}


@pytest.mark.parametrize(("iterations", "warned"), [(3, True), (4, True), (5, False)])
def test_a_warm_up_that_outlasts_the_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], iterations: int, warned: bool
) -> None:
    short = config(tmp_path / "run", iterations=iterations, optimizer={"warmup_iterations": 4, "learning_rate": 0.1})
    train(short, model=Fake(), reward=brightness, prompts=PROMPTS)
    out = capsys.readouterr().out
    assert ("warmup_iterations 4 outlasts" in " ".join(out.split())) == warned
    if warned:
        assert f"ends at {0.1 * iterations / 5:.2g}, not 0.1" in " ".join(out.split())


def test_a_runs_records_name_the_dtype_that_auto_meant(tmp_path: Path) -> None:
    chosen = config(tmp_path / "toy", iterations=1, model={"dtype": "auto", "height": 2, "width": 2})
    run = train(chosen, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True)
    assert load_config(run.folder / "config.yaml").model.dtype == resolved_dtype("auto", "cpu") != "auto"


def test_it_says_how_prompts_are_used(tmp_path: Path) -> None:
    said: list[str] = []
    lines = [{"prompt": "a", "tag": "x"}, {"prompt": "b", "tag": "y"}, {"prompt": "c"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {**dict.fromkeys(("train", "validation", "test"), str(tmp_path / "p.jsonl")), "prompts_per_iteration": 4}
    settings = config(tmp_path / "run", data=data, evaluation={"validation_prompts": 7, "test_prompts": 2})
    sets = build.prompt_sets(settings, build.prompt_sources(settings, None, None, ()), said.append)
    assert [p.text for p in sets["validation"]] == ["a", "b", "c"] * 2 + ["a"]
    assert said == [
        "data.validation: 7 are drawn of 3 prompts: each comes 2 to 3 times",
        "data.test: 2 of 3 prompts are used",
        "data.train: 4 prompts an iteration of 3 prompts: each comes 1 to 2 times",
        "data.train: 1 of 3 prompts have no kind, so draws are not balanced by it",
    ]
    said.clear()
    few = settings.replace(iterations=1, data=settings.data.model_copy(update={"prompts_per_iteration": 2}))
    build.prompt_sets(few, build.prompt_sources(few, ["a", "b", "c"], None, ()), said.append)
    assert said[-1] == "data.train: 1 iterations draw 2 of 3 prompts"
    with pytest.raises(ValueError, match=r'prompts\[0\]: "image": pictures would change what is drawn'):
        build.prompt_sources(few, [{"prompt": "a", "image": "a.png"}], None, ())
    assert build.prompt_sources(few, [{"prompt": "a", "image": "a.png"}], None, ("image",))["prompts"]
