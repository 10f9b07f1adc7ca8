"""E²PO: what its conditions are for (sampling alone), what it is without them, and what does not depend on them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake import PROMPTS, SIZE, Bench, Fake, brightness, config, same, weights
from loop_checks import check_errors, check_learns
from PIL import Image
from torch import Tensor, nn

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.diffusion_nft import diffusion_nft
from tempflow.algorithms.drm_grpo import drm_grpo
from tempflow.algorithms.e2po import e2po
from tempflow.core import plan
from tempflow.core.plan import Cost
from tempflow.models.conditions import Learned, _number, moved_conditions, perturbed
from tempflow.models.protocol import Conditioning, Predict, TextInputs
from tempflow.request import Prompt, Source, asked
from tempflow.train import trainer
from tempflow.train.experience import credit
from tempflow.train.trainer import train

SMALL: dict[str, Any] = {"steps": 4, "noises": 2, "conditions": 3}
NFT: dict[str, Any] = {"steps": 4, "group": 6}


def small(**changes: Any) -> Algorithm:
    return e2po(**{**SMALL, **changes})


def crossed_nft() -> Algorithm:
    """DiffusionNFT on two noises, each drawn three times."""
    return replace(diffusion_nft(**NFT), plan=lambda i, s: replace(plan.ode(4, 6), start=(0, 0, 0, 1, 1, 1)))


def gradient(bench: Bench) -> dict[str, Tensor]:
    bench.context = replace(bench.context, max_grad_norm=1e9)
    bench.iterate()
    return {n: p.grad.clone() for n, p in bench.model.network.named_parameters() if p.grad is not None}


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-5) -> bool:
    size = max(float(t.abs().max()) for t in b.values())
    return size > 1e-4 and all(float((a[n] - b[n]).abs().max()) <= tolerance * size for n in b)


# ------------------------------------------------------------------------------------------- without perturbation
@pytest.mark.parametrize("off", [{"fade": 0.0}, {"init": 0.0, "embed_steps": 0}], ids=["no fade", "no offset"])
def test_without_perturbation_it_is_diffusion_nft_on_repeated_noises(off: dict[str, Any]) -> None:
    plain, ours = Bench(algorithm=crossed_nft()), Bench(algorithm=small(**off))
    a, b = plain.collect(), ours.collect()
    assert torch.equal(a.forest.nodes, b.forest.nodes) and torch.equal(a.scores.value, b.scores.value)
    plain.update(a)
    ours.update(b)
    assert same(weights(plain.model), weights(ours.model))


def test_one_condition_is_diffusion_nft() -> None:
    plain, ours = Bench(algorithm=diffusion_nft(**NFT)), Bench(algorithm=small(noises=6, conditions=1))
    for iteration in range(2):
        assert plain.iterate(iteration) == ours.iterate(iteration)
    assert same(weights(plain.model), weights(ours.model))


def test_perturbed_pictures_differ_and_the_clean_ones_do_not() -> None:
    """Of each noise the first is as DiffusionNFT draws it, the others are their own."""
    plain, ours = Bench(algorithm=crossed_nft()).collect(), Bench(algorithm=small()).collect()

    def leaves(experience: Any) -> Tensor:
        return experience.forest.nodes[experience.forest.edges.child].view(6, 2, 3, -1)

    clean, drawn = leaves(plain), leaves(ours)
    assert torch.equal(drawn[:, :, 0], clean[:, :, 0])
    apart = torch.cdist(drawn, drawn)[..., *torch.triu_indices(3, 3, 1)]
    assert float(apart.min()) > 1e-4


# ------------------------------------------------------------------------------- sampled by one, trained by another
class Watched(Fake):
    """Notes the conditions of every forward, and whether it was for training."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[bool, list[Tensor]] = {True: [], False: []}
        self.sampling = True

    def predictor(self, condition: Conditioning, guidance: float, network: nn.Module | None = None) -> Predict:
        inner, embeds = super().predictor(condition, guidance, network), condition.tensors["embeds"]

        def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            self.seen[self.sampling].append(torch.cat([sigma[:, None], embeds[rows, 0]], 1))
            return inner(x, sigma, rows)

        return predict


def test_training_asks_with_the_clean_condition_and_sampling_fades_the_others() -> None:
    model = Watched()
    bench = Bench(model, small(fade=0.5), train_rows=7, rollout_rows=10)
    experience = bench.collect()
    model.sampling = False
    bench.update(experience)
    clean = model.encode(asked(PROMPTS), SIZE).tensors["embeds"][:, 0]
    trained, sampled = torch.cat(model.seen[False]), torch.cat(model.seen[True])
    assert len(trained) == 6 * 6 * 3 * 3 and len(sampled) == 6 * 6 * 4  # policy, old, reference

    def away(seen: Tensor) -> Tensor:
        return (seen[:, None, 1:] - clean).norm(dim=-1).min(1).values

    assert float(away(trained).max()) == 0
    sigma, distance = sampled[:, 0], away(sampled)
    by_step = {s: distance[sigma == s] for s in sigma.unique().tolist()}
    assert all(int((d == 0).sum()) == (12 if s > 0.5 else 36) for s, d in by_step.items())  # a third is clean
    means = [d.mean().item() for _, d in sorted(by_step.items())]
    assert means == sorted(means) and means[0] == 0 < means[-1]


def test_conditions_are_made_once_a_step_whatever_the_chunks() -> None:
    made: list[int] = []

    class Counted(Fake):
        def predictor(self, condition: Conditioning, guidance: float, network: nn.Module | None = None) -> Predict:
            made.append(len(condition))
            return super().predictor(condition, guidance, network)

    Bench(Counted(), small(), rollout_rows=5).collect()
    assert made.count(6 * 3) == 4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guidance_contrasts_with_an_empty_prompt_that_is_not_perturbed(guidance: float) -> None:
    """v = v_∅ + g·(v_k − v_∅), with v_k of the perturbed condition and v_∅ of the empty prompt as it is."""
    model, given = Fake(), small(fade=1.0).conditions
    assert given is not None
    condition = model.encode(asked(PROMPTS), SIZE)
    offsets = Learned().of(model, asked(PROMPTS), given, 5)
    moved = moved_conditions(model, condition, offsets)
    x, sigma = torch.randn(18, 2, 2, 2, generator=torch.Generator().manual_seed(1)), torch.full((18,), 0.75)
    with torch.no_grad():
        found = perturbed(model, condition, moved, given.strength, guidance)(x, sigma, torch.arange(18))
        own = condition.tensors["embeds"].repeat_interleave(3, 0)
        told = own + 0.75 * torch.cat([o.delta["text"] for o in offsets])
        v, base = model.network(x, sigma, told[:, 0]), model.network(x, sigma, torch.zeros(18, 2))
    torch.testing.assert_close(found, base + guidance * (v - base))
    metrics = Bench(Fake(), small(), guidance=guidance).iterate()
    assert metrics["updates"] == 1 and metrics["grad_norm"] > 0


# ---------------------------------------------------------------------------------------------------- what it costs
def test_cost_of_the_papers_settings() -> None:
    assert e2po().cost(0, 1) == Cost(480, 48, 432)
    assert e2po(noises=2, conditions=4).cost(0, 1) == Cost(80, 8, 72)
    assert e2po(noises=8, conditions=3).cost(0, 1) == Cost(240, 24, 216)


def test_counted_forwards_are_the_cost() -> None:
    algorithm = small()
    bench = Bench(algorithm=algorithm, train_rows=11, rollout_rows=13)
    metrics = bench.iterate()
    cost, counter = algorithm.cost(0, len(PROMPTS)), bench.counter
    assert counter.rollout == cost.forwards and counter.decodes == counter.reward_calls == cost.leaves
    assert counter.train == metrics["trained_edges"] == cost.trained_edges
    assert counter.reference == 2 * cost.trained_edges
    assert sum(bench.model.rows) == counter.forwards and max(bench.model.rows) <= 13


def test_equal_rewards_give_no_gradient() -> None:
    """Every r is ½, and at v = v_old its gradient is 0."""
    bench = Bench(algorithm=small(), reward=lambda images, prompts: [0.5] * len(images), max_grad_norm=1e9)
    metrics = bench.iterate()
    assert metrics["grad_norm"] <= 1e-6 and metrics["zero_variance"] == 1


def test_advantages_are_the_groups_of_all_conditions() -> None:
    bench = Bench(algorithm=small(std="group"))
    experience = bench.collect()
    value = credit(bench.context, experience).advantage.value.view(6, 6).double()
    reward = experience.scores.value.view(6, 6).double()
    want = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, unbiased=False, keepdim=True) + 1e-4)
    torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
    assert bool((experience.forest.edges.prompt == torch.arange(6).repeat_interleave(6)).all())


# ------------------------------------------------------------------------------------------------ what must not matter
def patchy(images: list[Image.Image], prompts: list[str]) -> list[float | None]:
    values = brightness(images, prompts)
    return [None if p == "fog" and n % 3 else v for n, (p, v) in enumerate(zip(prompts, values, strict=True))]


def test_batches_and_chunks_of_prompts_do_not_matter() -> None:
    whole = Bench(algorithm=small(), reward=brightness).collect()
    want = gradient(Bench(algorithm=small(), reward=patchy, train_rows=1000))
    assert close(gradient(Bench(algorithm=small(), reward=patchy, train_rows=7, rollout_rows=5)), want)
    parts = Bench(algorithm=small(), reward=brightness, rollout_leaves=12)  # two prompts at once
    torch.testing.assert_close(parts.collect().forest.nodes, whole.forest.nodes)


def test_offsets_are_the_prompts_own_whatever_stands_beside_it() -> None:
    model, conditions = Fake(), small().conditions
    assert conditions is not None
    together = [o.delta["text"] for o in Learned().of(model, asked(PROMPTS), conditions, 5)]
    for prompt, want in zip(PROMPTS, together, strict=True):
        (alone,) = Learned().of(model, asked([prompt]), conditions, 5)
        assert torch.equal(alone.delta["text"], want)
    again = Learned()
    twice = [again.of(model, asked([PROMPTS[2], PROMPTS[0], PROMPTS[2]]), conditions, 5) for _ in range(2)]
    for offsets in twice:
        assert all(torch.equal(o.delta["text"], together[n]) for o, n in zip(offsets, (2, 0, 2), strict=True))
    (other,) = Learned().of(model, asked([PROMPTS[0]]), conditions, 6)
    assert not torch.equal(other.delta["text"], together[0])


def test_offsets_are_a_prompts_with_its_sources() -> None:
    """Whose path does not matter. Without sources they are those of the text alone, drawn by a number that stays."""
    assert _number(Prompt("fog")) == int.from_bytes(hashlib.blake2b(b"fog", digest_size=8).digest(), "little")
    model, conditions, text = Fake(), small().conditions, PROMPTS[0]
    assert conditions is not None

    def prompt(*digests: str, path: str = "a.png") -> Prompt:
        return Prompt(text, sources=tuple(Source(Path(path), digest) for digest in digests))

    apart = [prompt(), prompt("1"), prompt("2"), prompt("1", "2"), prompt("2", "1")]
    learned = Learned()
    found = [o.delta["text"] for o in learned.of(model, [*apart, prompt("1", path="b.png")], conditions, 5)]
    assert all(not torch.equal(a, b) for n, a in enumerate(found[:5]) for b in found[:n])
    assert torch.equal(found[5], found[1]) and len(learned._kept) == 5
    (plain,) = Learned().of(model, asked([text]), conditions, 5)
    assert torch.equal(found[0], plain.delta["text"])


def test_kept_offsets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempflow.models.conditions.KEPT_BYTES", 3 * 2 * 4 * 2)  # two prompts of [3, 1, 2] floats
    learned, model, conditions = Learned(), Fake(), small().conditions
    assert conditions is not None
    want = Learned().of(model, asked(PROMPTS), conditions, 5)
    for _ in range(2):
        found = learned.of(model, asked(PROMPTS), conditions, 5)
        assert all(torch.equal(a.delta["text"], b.delta["text"]) for a, b in zip(found, want, strict=True))
    assert len(learned._kept) == 2


def test_a_slot_does_not_change_a_prompts_conditions() -> None:
    """The same prompt in two slots is drawn from other noises, with the same conditions."""
    model = Watched()
    Bench(model, small(fade=1.0)).collect(prompts=[PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    first = model.seen[True][0][:, 1:].view(3, 2, 3, 2)
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])


# --------------------------------------------------------------------------------------------------------- and so on
def test_it_learns() -> None:
    check_learns(small())


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"iterations": 4, "checkpoint": {"every": 2}, "algorithm": {"name": "e2po", **SMALL}}

    def go(name: str, resume: bool = False) -> Path:
        settings = config(tmp_path / name, **options)
        return train(settings, model=Fake(), reward=brightness, prompts=PROMPTS, quiet=True, resume=resume).folder

    class Killed(BaseException):
        pass

    calls = {"left": 3}

    def dies(*arguments: Any) -> Any:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise Killed
        return learn(*arguments)

    whole, learn = go("whole"), trainer.learn
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "learn", dies)
        with pytest.raises(Killed):
            go("cut")
    cut = go("cut", resume=True)
    for file in ("metrics.jsonl", "model/model.safetensors"):
        assert (whole / file).read_bytes() == (cut / file).read_bytes()


def test_models_that_do_not_show_what_enters_their_encoders_are_refused() -> None:
    class Bare(Fake):
        encode_inputs = None  # type: ignore[assignment]

    del Bare.encode_inputs
    model = Fake()
    shut = type("Shut", (), {k: getattr(model, k) for k in dir(model) if not k.startswith("__")} | {"name": "shut"})
    del shut.encode_inputs
    with pytest.raises(ValueError, match=r"conditions: the model 'shut' does not show what enters its text encoders"):
        Learned().of(shut(), asked(PROMPTS), small().conditions, 5)  # type: ignore[arg-type]


def test_variants_need_conditions() -> None:
    with pytest.raises(ValueError, match="conditions: 1, but the plan has variant 2; nearest valid: 3"):
        replace(small(), conditions=None)
    with pytest.raises(ValueError, match="conditions: 1, but the plan has variant 1; nearest valid: 2"):
        replace(drm_grpo(steps=4), plan=lambda i, s: replace(plan.candidates(4, 2, 2), variant=(0, 1)))


def test_bad_arguments() -> None:
    check_errors(
        e2po,
        [
            ({"conditions": 0}, "conditions: 0 must be at least 1; nearest valid: 1"),
            ({"noises": 0}, "noises: 0 must be at least 1"),
            ({"noises": 1, "conditions": 1}, "noises: 1 must be at least 2, or there is nothing to compare with"),
            ({"fade": -0.1}, "fade: -0.1 must be in [0, 1]; nearest valid: 0"),
            ({"init": 0.0}, "init: 0 leaves equal conditions no direction to part in"),
            ({"embed_rate": -1.0}, "embed_rate: -1.0 must be finite and above 0"),
            ({"kl": -1.0}, "kl: -1.0 must be finite and ≥ 0"),
        ],
    )


def test_offsets_belong_to_what_enters_the_encoders() -> None:
    """Another encoder, or a picture beside the text, has other inputs for one text."""

    class Other(Fake):
        def text_inputs(self, prompt: Prompt) -> TextInputs:
            own = super().text_inputs(prompt)
            return replace(own, tokens={name: tokens + 1 for name, tokens in own.tokens.items()})

    learned, conditions = Learned(), small().conditions
    assert conditions is not None
    kept = [learned.of(m, asked(PROMPTS[:1]), conditions, 5)[0].delta["text"] for m in (Fake(), Other(), Fake())]
    assert torch.equal(kept[1], Learned().of(Other(), asked(PROMPTS[:1]), conditions, 5)[0].delta["text"])
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])
