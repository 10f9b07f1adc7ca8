"""Nothing that is wrong moves a weight."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
import torch
from fake import Bench, Fake, brightness, flow, same, tempflow, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tempflow.cli.parse import configured
from tempflow.config.guards import GuardsConfig
from tempflow.request import Prompt
from tempflow.rewards import from_function
from tempflow.strict import ConfigError, validated
from tempflow.train import guards
from tempflow.train.guards import Alarm, GuardError, NonFiniteError
from tempflow.train.signals import Signals


def poison(model: Fake) -> None:
    """From now on one row of every forward is NaN."""

    def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        mask = torch.zeros_like(out)
        mask[-1] = math.nan
        return out + mask

    model.network.register_forward_hook(hook)


def test_nan_in_the_models_output_stops_before_weights_move() -> None:
    bench = Bench()
    experience = bench.collect()
    before = weights(bench.model)
    poison(bench.model)
    with pytest.raises(GuardError, match=r"iteration 1: non_finite: the loss is nan. No weight was changed"):
        bench.update(experience)
    assert same(weights(bench.model), before) and not bench.optimizer.state


def test_nan_during_the_rollout_stops_too() -> None:
    bench = Bench()
    before = weights(bench.model)
    poison(bench.model)
    with pytest.raises(GuardError, match="the loss is nan"):
        bench.iterate()
    assert same(weights(bench.model), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_weights_move(bad: float) -> None:
    """The loss itself is finite here; of many micro-batches only the last one's gradient is bad."""
    bench = Bench(train_rows=20)
    experience = bench.collect()
    before = weights(bench.model)
    calls = []

    def spoil(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * bad if len(calls) == 5 else gradient

    bench.model.network.mean.bias.register_hook(spoil)
    with pytest.raises(GuardError, match=r"the gradient norm is (nan|inf). No weight was changed"):
        bench.update(experience)
    assert same(weights(bench.model), before) and len(calls) > 1


def test_a_later_update_stops_at_the_weights_of_the_last_good_one() -> None:
    bench = Bench(updates=2)
    bench.iterate(0)
    good = weights(bench.model)
    poison(bench.model)
    with pytest.raises(GuardError, match="iteration 2: non_finite: the loss is nan"):
        bench.iterate(1)
    assert same(weights(bench.model), good)


@pytest.mark.parametrize("answer", [math.nan, None, math.inf])
def test_rewards_that_all_failed_stop_the_run(answer: float | None) -> None:
    bench = Bench(reward=lambda images, prompts: [answer] * len(images))
    before = weights(bench.model)
    with pytest.raises(GuardError, match=r"iteration 1: all 108 rewards failed"):
        bench.iterate()
    assert same(weights(bench.model), before)


def test_a_reward_of_weight_zero_may_fail() -> None:
    """It is only looked at; nothing is learnt from it, so it stops nothing."""
    algorithm = tempflow()
    credit = replace(algorithm.credit, reward_weights={"brightness": 1.0, "broken": 0.0})
    broken = from_function(lambda images, prompts: [None] * len(images), name="broken")
    rewards = [from_function(brightness), broken]
    metrics = Bench(algorithm=replace(algorithm, credit=credit), rewards=rewards).iterate()
    assert metrics["updates"] == 1 and metrics["failed_rewards"] == 108
    assert math.isnan(metrics["reward/broken"]) and metrics["zero_variance"] < 1


def test_one_nan_reward_is_dropped_and_harmless() -> None:
    def reward(images: list, prompts: list[str]) -> list[float | None]:  # type: ignore[type-arg]
        return [math.nan, *brightness(images, prompts)[1:]]

    bench = Bench(reward=reward)
    metrics = bench.iterate()
    assert metrics["failed_rewards"] == 1 and math.isfinite(metrics["loss"])
    assert all(bool(t.isfinite().all()) for t in weights(bench.model).values())


def guidance_changes(bench: Bench) -> Callable[[], object]:
    experience = bench.collect()
    changed = replace(experience, prompts=tuple(Prompt(str(n) * (n + 1)) for n in range(6)))
    bench.context = replace(bench.context, guidance=1.5)
    return lambda: bench.update(changed)


@pytest.mark.parametrize("algorithm", [tempflow(), flow()], ids=["tempflow", "flow"])
def test_dropout_trips_the_first_ratio_guard(algorithm) -> None:  # type: ignore[no-untyped-def]
    bench = Bench(Fake(dropout=0.5), algorithm)
    before = weights(bench.model)
    with pytest.raises(GuardError, match=r"iteration 1: first_ratio: .* roundings .* above the limit 12.*dropout"):
        bench.iterate()
    assert same(weights(bench.model), before)
    bench.model.network.eval()
    seen = bench.iterate()
    assert seen["log_ratio_max"] == 0 and seen["rollout_gap_max"] < 4


def test_changed_guidance_trips_the_first_ratio_guard() -> None:
    bench = Bench()
    before = weights(bench.model)
    with pytest.raises(GuardError, match="guidance"):
        guidance_changes(bench)()
    assert same(weights(bench.model), before)


def test_the_first_ratio_is_checked_at_the_first_update_whenever_that_is() -> None:
    """An iteration without spread has no update; the check waits for the one that has."""
    flat = {"on": True}

    def reward(images: list, prompts: list[str]) -> list[float | None]:  # type: ignore[type-arg]
        return [0.5] * len(images) if flat["on"] else brightness(images, prompts)

    bench = Bench(Fake(dropout=0.5), reward=reward)
    assert bench.iterate(0)["updates"] == 0
    flat["on"] = False
    with pytest.raises(GuardError, match="first_ratio"):
        bench.iterate(1)


def test_later_updates_may_leave_the_first_ratios_bound() -> None:
    bench = Bench(updates=4, rate=0.2)
    assert bench.iterate()["log_ratio_max"] > 0.1 * 0.02


def test_clip_gradients_clips_and_returns_the_norm_before() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert guards.clip_gradients([p], 1.0, 0) == pytest.approx(5.0)
    assert float(p.grad.norm()) == pytest.approx(1.0, abs=1e-5)
    assert guards.clip_gradients([p], 2.0, 0) == pytest.approx(1.0, abs=1e-5)
    assert float(p.grad.norm()) == pytest.approx(1.0, abs=1e-5)


# --------------------------------------------------------------------------------------------- runs left alone
HEALTHY = {"latent_rms": 0.95, "diversity": 0.16, "high_frequency": 0.034, "grid": 0.001}
"""Figures of the shapes model."""


def watched(**changed: dict[str, object] | int) -> GuardsConfig:
    """The defaults but for what is given, and with the one guard on that is off by default."""
    return GuardsConfig.model_validate({"velocity_norm": {"action": "warn"}} | changed)


def leaves(failed: Sequence[float] = (0.0, 0.0, 0.0), prompts: int = 3, **figures: float | Sequence[float]) -> Signals:
    """Signals of `prompts` slots with six leaves each; what is not given is healthy."""

    def column(name: str) -> Tensor:
        value = figures.get(name, HEALTHY[name])
        return torch.tensor(value, dtype=torch.float64).expand(prompts).clone()

    slots, counts = torch.arange(prompts), torch.full((prompts,), 6)
    share = torch.tensor(failed, dtype=torch.float64)
    return Signals(slots, counts, *(column(n) for n in HEALTHY), share)


Look = Callable[[GuardsConfig, guards.State, int], tuple[guards.State, list[Alarm]]]


def rollouts(signals: Iterable[Signals]) -> list[Look]:
    return [lambda c, s, i, x=x: guards.watch_rollout(c, s, i, x) for x in signals]


def updates(name: str, values: Iterable[float]) -> list[Look]:
    return [lambda c, s, i, v=v: guards.watch_update(c, s, i, {name: v}) for v in values]


def validations(pairs: Iterable[tuple[float, float]]) -> list[Look]:
    return [lambda c, s, i, t=t, g=g: guards.watch_validation(c, s, i, t, {"aesthetic": g}) for t, g in pairs]


def steps(faults: Iterable[bool]) -> list[Look]:
    def error(iteration: int) -> NonFiniteError:
        with pytest.raises(NonFiniteError) as caught:
            guards.check_finite_loss(torch.tensor(math.nan), iteration)
        return caught.value

    return [lambda c, s, i, f=f: guards.watch_step(c, s, i, error(i) if f else None) for f in faults]


def ratios(values: Iterable[float]) -> list[Look]:
    return [lambda c, s, i, v=v: guards.watch_first_ratio(c, s, i, v, (24, 6)) for v in values]


def play(config: GuardsConfig, looks: Sequence[Look], state: guards.State | None = None, first: int = 0) -> list[Alarm]:
    """All alarms of a sequence; with every state through JSON, and no state changed in place."""
    state, alarms = state or guards.fresh_state(), []
    for iteration, look in enumerate(looks, first):
        before = json.dumps(state)
        state, fired = look(config, json.loads(before), iteration)
        unchanged = json.loads(before)
        again = look(config, unchanged, iteration)
        assert repr(again) == repr((state, fired)) and json.dumps(unchanged) == before  # by repr: a NaN is no equal
        assert json.loads(json.dumps(state, allow_nan=False)) == state
        alarms += fired
    return alarms


SIX = [leaves()] * 6
CASES: dict[str, tuple[list[Look], list[Look], float]] = {
    # guard: what trips it, its healthy neighbour, the limit
    "non_finite": (steps([False, True]), steps([False, False]), 0),
    "first_ratio": (ratios([12.1]), ratios([11.9]), 12),
    "clip_fraction": (updates("clip_fraction", [0.1, 0.51]), updates("clip_fraction", [0.1, 0.49, 0.5]), 0.5),
    "zero_variance": (
        updates("zero_variance", [0.5] + [0.91] * 20),
        updates("zero_variance", [1.0] * 10 + [0.79] * 19),
        0.9,
    ),
    "kl": (updates("kl", [0.1, 1.01]), updates("kl", [0.99] * 9), 1.0),
    "reward_failures": (rollouts([leaves((0.1, 0.1, 0))]), rollouts([leaves((0.1, 0, 0))] * 9), 0.05),
    "gold": (validations([(0.3, 0.5), (0.4, 0.39), (0.5, 0.39)]), validations([(0.3, 0.5)] + [(0.5, 0.41)] * 9), 0.2),
    "diversity": (rollouts(SIX + [leaves(diversity=0.045)] * 5), rollouts(SIX + [leaves(diversity=0.05)] * 9), 0.3),
    "latent_norm": (rollouts(SIX + [leaves(latent_rms=1.95)] * 5), rollouts(SIX + [leaves(latent_rms=1.85)] * 9), 2.0),
    "velocity_norm": (updates("velocity_norm", [1.0, 1.51]), updates("velocity_norm", [0.67, 1.0, 1.49]), 1.5),
    "artefacts": (rollouts(SIX + [leaves(grid=0.031)] * 5), rollouts(SIX + [leaves(grid=0.029)] * 9), 3.0),
}


def test_every_guard_has_a_case() -> None:
    assert set(CASES) == set(GuardsConfig.model_fields) - {"repeat", "idle"}


@pytest.mark.parametrize("guard", CASES)
def test_a_guard_fires_on_what_it_is_for_and_not_on_its_healthy_neighbour(guard: str) -> None:
    ill, well, limit = CASES[guard]
    assert play(watched(), well) == []
    alarm = play(watched(), ill)[-1]
    assert alarm.guard == guard and alarm.limit == limit
    assert alarm.message.startswith(f"iteration {len(ill) - 1}: {guard}: ")
    assert f"{alarm.value:.3g}" in alarm.message and f"{limit:g}" in alarm.message and "Look at" in alarm.message
    assert play(watched(), ill[:-1]) == [], "it fires when the limit is passed, not before"


@pytest.mark.parametrize("guard", [g for g in CASES if g != "non_finite"])
def test_a_guard_that_is_off_is_silent_and_remembers_all_the_same(guard: str) -> None:
    ill, _, _ = CASES[guard]
    off = watched(**{guard: {"action": "off"}})
    assert play(off, ill) == []
    state = guards.fresh_state()
    for iteration, look in enumerate(ill[:-1]):
        state, _ = look(off, state, iteration)
    _, alarms = ill[-1](watched(), state, len(ill) - 1)
    assert [a.guard for a in alarms] == [guard], "turned on at a resume, it knows its baseline"


@pytest.mark.parametrize("guard", CASES)
def test_stop_stops(guard: str) -> None:
    alarms = play(watched(**{guard: {"action": "stop"}}), CASES[guard][0])
    assert alarms[-1].action == "stop"
    with pytest.raises(GuardError, match=re.escape(alarms[-1].message)):
        guards.enforce(alarms, lambda line: None)


@pytest.mark.parametrize("guard", CASES)
def test_the_flags_that_a_message_names_are_those_of_the_command_line(guard: str) -> None:
    message = play(watched(), CASES[guard][0])[-1].message
    flags = re.findall(r"--guards\.\S+", message)
    option, field = f"--guards.{guard}".replace("_", "-"), flags[0].split(".")[-1]
    assert flags == [f"{option}.{field}", f"{option}.action"]
    value = watched().model_dump()[guard][field]
    made = configured("train", ["shapes_tempflow", "--algorithm.kl", "1", flags[0], str(value), flags[1], "stop"])
    assert made.guards == GuardsConfig.model_validate({guard: {"action": "stop", field: value}})


@pytest.mark.parametrize("guard", CASES)
def test_a_resumed_run_hears_what_the_uninterrupted_one_does(guard: str) -> None:
    ill, well, _ = CASES[guard]
    looks = [*well, *ill, *ill]
    whole = play(watched(), looks)
    for cut in range(0, len(looks), 3):
        state = guards.fresh_state()
        for iteration, look in enumerate(looks[:cut]):
            state, _ = look(watched(), state, iteration)
        rest = play(watched(), looks[cut:], json.loads(json.dumps(state)), cut)
        assert rest == (whole[-len(rest) :] if rest else []) and len(rest) <= len(whole)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 2), min_size=5, max_size=30), st.floats(0.1, 100))
def test_trends_have_no_unit(values: list[float], unit: float) -> None:
    """Diversity and latent norm in another unit fire the same alarms at the same ratios."""

    def fired(scale: float) -> list[tuple[str, float]]:
        looks = rollouts([leaves(diversity=v * scale, latent_rms=v * scale) for v in values])
        return [(a.guard, a.value) for a in play(watched(), looks)]

    one, other = fired(1.0), fired(unit)
    near = {"diversity": (0.3,), "latent_norm": (0.5, 2.0)}
    if not any(abs(v - bound) < 1e-6 for g, v in one + other for bound in near[g]):
        assert [g for g, _ in one] == [g for g, _ in other]
        assert [v for _, v in one] == pytest.approx([v for _, v in other])


def test_a_standing_warning_speaks_when_it_starts_and_then_seldom() -> None:
    config, lines = watched(repeat=10), list[str]()
    values = [0.1] * 3 + [0.9] * 12 + [0.1] * 2 + [0.9] * 12
    state = guards.fresh_state()
    for iteration, look in enumerate(updates("clip_fraction", values)):
        state, alarms = look(config, state, iteration)
        assert len(alarms) == (values[iteration] > 0.5)
        guards.enforce(alarms, lines.append)
    assert [line.split(":")[1].strip() for line in lines] == ["iteration 3", "iteration 13", "iteration 23"]
    assert all(line.startswith("warn: ") for line in lines)


def test_enforce_says_the_others_before_it_stops() -> None:
    ill = rollouts(SIX + [leaves((0.5, 0, 0), diversity=0.0, latent_rms=9.0)] * 5)
    config = watched(reward_failures={"action": "skip"}, latent_norm={"action": "stop"}, diversity={"action": "stop"})
    alarms, lines = play(config, ill)[-3:], list[str]()
    with pytest.raises(GuardError) as caught:
        guards.enforce([replace(a, silent=False) for a in alarms], lines.append)
    assert len(lines) == 1 and lines[0].startswith("skip: iteration 10: reward_failures: 0.167 of the scores failed")
    assert lines[0].endswith("(skipped: prompts 0)")
    assert "diversity: " in str(caught.value) and "latent_norm: " in str(caught.value)
    guards.enforce([], lines.append)
    assert len(lines) == 1


def test_skip_names_the_groups_with_failures() -> None:
    config = watched(reward_failures={"action": "skip"})
    alarms = play(config, rollouts([leaves((0.5, 0, 0.2))]))
    assert guards.skipped(alarms) == {0, 2} and alarms[0].value == pytest.approx(0.7 / 3)
    assert guards.skipped(play(config, rollouts([leaves((0.1, 0, 0))]))) == set()
    assert guards.skipped(play(watched(), rollouts([leaves((0.5, 0, 0.2))]))) == set(), "a warning skips nothing"


def test_only_a_skip_skips() -> None:
    warned = Alarm("kl", "warn", "", 2.0, 1.0, prompts=(3,))
    assert guards.skipped([warned, replace(warned, action="skip", prompts=(1, 2))]) == {1, 2}


def test_the_state_does_not_grow() -> None:
    state = guards.fresh_state()
    for iteration in range(30):
        state, _ = guards.watch_rollout(watched(), state, iteration, leaves())
        state, _ = guards.watch_update(watched(), state, iteration, {"zero_variance": 0.1})
        if iteration == 20:
            size = len(json.dumps(state))
    assert len(json.dumps(state)) == size


def test_skip_judges_the_diversity_of_each_group() -> None:
    lone = rollouts([*SIX, leaves(diversity=(0.16, 0.04, math.nan))])
    assert play(watched(), lone) == []
    alarms = play(watched(diversity={"action": "skip"}), lone)
    assert guards.skipped(alarms) == {1} and alarms[0].value == pytest.approx(0.25)


def test_figures_that_were_not_measured_are_not_judged() -> None:
    nothing = dict.fromkeys(("diversity", "high_frequency", "grid"), math.nan)
    config = watched(diversity={"action": "skip"}, artefacts={"action": "stop"}, reward_failures={"limit": 0.0})
    assert play(config, rollouts([leaves((math.nan,) * 3, **nothing)] * 9)) == []
    assert play(watched(zero_variance={"window": 1}), updates("loss", [9.0] * 30)) == []
    blank = {"diversity": 0.0, "high_frequency": 0.0, "grid": 0.0, "latent_rms": 0.0}
    assert play(config, rollouts([leaves(**blank)] * 9)) == [], "a baseline of 0 has no shares"


def test_latents_that_are_not_finite_fire_at_once() -> None:
    for value in (math.nan, math.inf):
        alarms = play(watched(), rollouts([leaves(latent_rms=value)]))
        assert [a.guard for a in alarms] == ["latent_norm"] and str(value) in alarms[0].message


@pytest.mark.parametrize("figure", ["high_frequency", "grid"])
def test_artefacts_of_either_kind_are_named(figure: str) -> None:
    (alarm,) = play(watched(), rollouts([*SIX, *[leaves(**{figure: 0.104})] * 5]))[-1:]
    assert figure in alarm.message and "0.104" in alarm.message


def test_nothing_faint_is_an_artefact() -> None:
    faint = [leaves(high_frequency=1e-4)] * 6 + [leaves(high_frequency=0.02)] * 9
    assert play(watched(), rollouts(faint)) == []


def test_latents_that_shrink_fire_too() -> None:
    alarm = play(watched(), rollouts([*SIX, *[leaves(latent_rms=0.4)] * 5]))[-1]
    assert alarm.guard == "latent_norm" and alarm.value == pytest.approx(0.4 / 0.95)


def test_gold_needs_a_rise_of_the_trained_reward_and_forgives_one_bad_look() -> None:
    assert play(watched(), validations([(0.3, 0.5), (0.3, 0.2), (0.2, 0.2), (0.3, 0.1)])) == [], "both fall"
    assert play(watched(), validations([(0.3, 0.5), (0.4, 0.2), (0.4, 0.45), (0.5, 0.2)])) == [], "not in a row"
    assert play(watched(), validations([(0.3, 0.5), (0.4, math.nan), (math.nan, 0.2), (0.4, 0.2)])) == []
    assert len(play(watched(), validations([(0.3, 0.2), (0.4, 0.5), (0.5, 0.3), (0.6, 0.3)]))) == 1


def test_gold_around_zero_is_measured_by_what_it_had_gained() -> None:
    """−1 → 0.01 → −0.1 is a fall by a tenth of the gain, not by eleven times the best."""
    assert play(watched(), validations([(0.1, -1.0), (0.2, 0.01), (0.3, -0.1), (0.4, -0.1)])) == []
    assert len(play(watched(), validations([(0.1, -1.0), (0.2, 0.01), (0.3, -0.3), (0.4, -0.3)]))) == 1


def test_the_worst_of_several_gold_rewards_is_named() -> None:
    state, config = guards.fresh_state(), watched(gold={"patience": 1})
    state, _ = guards.watch_validation(config, state, 0, 0.1, {"a": 1.0, "b": 1.0, "c": 1.0})
    _, (alarm,) = guards.watch_validation(config, state, 9, 0.2, {"a": 0.7, "b": 0.5, "c": 1.2})
    assert "b, which is not trained, fell from 1 to 0.5" in alarm.message and alarm.value == 0.5


def test_dropped_steps_in_a_row_stop_and_good_ones_between_do_not() -> None:
    config = watched(non_finite={"action": "skip", "patience": 3})
    assert {a.action for a in play(config, steps([True, True, True, False] * 9))} == {"skip"}
    alarms = play(config, steps([True] * 4))
    assert [a.action for a in alarms] == ["skip"] * 3 + ["stop"] and alarms[-1].value == 4
    assert "the loss is nan. No weight was changed" in alarms[-1].message


def test_a_dropped_step_leaves_weights_and_moments_as_if_it_had_not_been() -> None:
    config = watched(non_finite={"action": "skip"})

    def run(scales: Sequence[float]) -> tuple[Tensor, Tensor]:
        p, state = nn.Parameter(torch.ones(3)), guards.fresh_state()
        optimizer = torch.optim.AdamW([p], lr=0.1)
        for iteration, scale in enumerate(scales):
            fault = None
            p.grad = torch.tensor([0.1, 0.2, 0.3]) * scale
            try:
                guards.clip_gradients([p], 1.0, iteration)
            except NonFiniteError as error:
                fault = error
            state, alarms = guards.watch_step(config, state, iteration, fault)
            guards.enforce(alarms, lambda line: None)
            if fault is None:
                optimizer.step()
        return p.detach(), optimizer.state[p]["exp_avg_sq"]

    for got, expected in zip(run([1, math.nan, 2, math.inf, math.nan, 3]), run([1, 2, 3]), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(GuardError, match=r"steps dropped in a row: 4, above the limit 3"):
        run([1, *[math.nan] * 4])


def test_a_run_that_skips_everything_does_not_go_on_for_days() -> None:
    config = watched(reward_failures={"action": "skip"}, idle=5)
    every, some = leaves((0.5, 0.5, 0.5)), leaves((0.5, 0.5, 0))
    assert all(a.action == "skip" for a in play(config, rollouts([*[every] * 5, some, *[every] * 5])))
    alarm = play(config, rollouts([every] * 6))[-1]
    assert (alarm.guard, alarm.action, alarm.value, alarm.limit) == ("idle", "stop", 6, 5)
    assert "--guards.idle" in alarm.message


def test_the_first_ratio_may_be_allowed_more() -> None:
    assert play(watched(first_ratio={"limit": 50}), ratios([49])) == []
    for value in (math.nan, math.inf):
        assert play(watched(), ratios([value]))[0].action == "stop"
    assert "unequal rows (rollout_rows 24, train_rows 6)" in play(watched(), ratios([17]))[0].message
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        watched(first_ratio={"limit": 0.1})  # a share of the clip, as it once was, is not taken for roundings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kl": {"limit": 0.0}}, "kl.limit: 0.0 must be above 0"),
        ({"kl": {"action": "skip"}}, "kl.action: 'skip' is not one of off, warn, stop"),
        ({"non_finite": {"action": "off"}}, "non_finite.action: 'off' is not one of skip, stop; nearest valid"),
        ({"diversity": {"limit": 1.0}}, "diversity.limit: 1.0 must be below 1"),
        ({"latent_norm": {"limit": 1.0}}, "latent_norm.limit: 1.0 must be above 1"),
        ({"goldd": {}}, "goldd: unknown field; did you mean 'gold'?"),
    ],
)
def test_a_bad_guard_is_explained(given: dict[str, dict[str, object]], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        validated(GuardsConfig, given)
