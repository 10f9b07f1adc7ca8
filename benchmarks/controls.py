"""Is the gain honest? Two controls beside the demo's own runs, at equal forward-equivalents, all judged on test.

    python -m benchmarks.controls --demo runs/demo-0 [--demo runs/demo-1 …] --output runs/controls

`shuffled`: the same run with rewards dealt to the wrong pictures (gain must be ≤ 0.02 in absolute value or negative).
`own samples`: rejection fine-tuning. The base samples train prompts; verified-right samples are trained on with the
flow-matching loss, refreshed with the newest weights, until as much compute is spent as the demo spent.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.runs import summary
from tempflow.config import Config, load_config
from tempflow.core import plan
from tempflow.core.cost import equivalents
from tempflow.core.dynamics import ODE
from tempflow.core.rng import Stream
from tempflow.core.rollout import Noise, rollout
from tempflow.core.scores import Scores
from tempflow.data.prompts import load_prompts
from tempflow.evaluate.suite import evaluate, fixed_prompts
from tempflow.media import Media
from tempflow.rewards import build
from tempflow.rewards.protocol import Reward
from tempflow.train.build import prepare_model
from tempflow.train.trainer import train
from tempflow.train.weights import Trainable

TRAINED = equivalents(0, 1, guided=False)
"""Forward-equivalents of a trained row."""


class Shuffled:
    """A reward whose scores are dealt out at random among the pictures of a call."""

    groupwise = False

    def __init__(self, inner: Reward) -> None:
        self.inner, self.name, self.calls = inner, inner.name, 0

    def score(self, media: Media, prompts, metadata) -> Scores:
        scores = self.inner.score(media, prompts, metadata)
        self.calls += 1
        order = Stream(0, "shuffled").permutation((self.calls,), len(scores))
        return scores.select(torch.tensor(order))


def shuffled(config: Config, out: Path) -> dict:
    folder = out / "shuffled"
    if not (folder / "summary.json").exists():
        fresh = config.model_copy(update={"output": str(folder), "name": "shuffled"})
        train(fresh, reward=[Shuffled(build(r.name)) for r in config.rewards], quiet=True)
    return summary(folder)


def own_samples(config: Config, budget: int, out: Path, rounds: int = 10, batch: int = 96) -> dict:
    """Rejection fine-tuning on verified samples; a third of the budget samples, the rest trains."""
    file = out / "own_samples.json"
    if file.exists():
        return json.loads(file.read_text())
    e, size = config.evaluation, config.size
    torch.set_num_threads(config.threads or torch.get_num_threads())
    model, judge = prepare_model(config), [build("shapes_strict")]
    trainable = Trainable(model.network)
    optimizer = torch.optim.AdamW(
        trainable.masters,
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        weight_decay=0.0,
        fused=True,
    )
    prompts, schedule, shape = load_prompts(config.data.train), model.schedule(e.steps, size), model.noise_shape(size)
    look = {"steps": e.steps, "guidance": e.guidance, "seed": e.seed, "size": size, "rows": config.rollout_rows}
    validation = fixed_prompts(load_prompts(config.data.validation), e.validation_prompts)
    test = fixed_prompts(load_prompts(config.data.test), e.test_prompts)
    before = evaluate(model, test, judge, **look)
    best, spent, kept = (evaluate(model, validation, judge, **look).mean("shapes_strict"), trainable.state()), 0, 0
    for r in range(rounds):
        count = budget // (3 * rounds * e.steps)
        order = fixed_prompts(prompts, count)
        condition = model.encode(order, size)
        predict = model.predictor(condition, 1.0)
        forest = rollout(
            [plan.ode(e.steps, 1)] * count, ODE(), schedule, predict, Noise(config.seed, r), shape=shape,
            max_rows=config.rollout_rows,
        )  # fmt: skip
        x0 = forest.nodes[forest.leaves.node]
        right = (
            judge[0].score(model.decode(x0, size), [p.text for p in order], [p.metadata for p in order]).value[:, 0]
            > 0.5
        )
        chosen = right.nonzero()[:, 0]
        spent, kept = spent + count * e.steps, kept + len(chosen)
        steps = (budget // rounds - count * e.steps) // (TRAINED * batch)
        for step in range(steps):
            ids = [(r, step, b) for b in range(batch)]
            rows = chosen[torch.tensor(Stream(config.seed, "rows").integers((r, step), len(chosen), batch))]
            sigma = torch.sigmoid(Stream(config.seed, "sigma").normal(ids, ()))
            noise = Stream(config.seed, "noise").normal(ids, shape)
            mixed = torch.lerp(x0[rows], noise, sigma[:, None, None, None])
            trainable.zero_grad()
            (predict(mixed, sigma, rows).float() - (noise - x0[rows])).square().mean().backward()
            trainable.collect()
            torch.nn.utils.clip_grad_norm_(trainable.masters, config.optimizer.max_grad_norm)
            optimizer.step()
            trainable.publish()
        spent += TRAINED * steps * batch
        score = evaluate(model, validation, judge, **look).mean("shapes_strict")
        best = max(best, (score, trainable.state()), key=lambda pair: pair[0])
        print(f"own samples, round {r + 1}: {len(chosen)}/{count} right, validation {score:.3f}", flush=True)
    trainable.load(best[1])
    after = evaluate(model, test, judge, **look)
    result = {"before": before.to_json(), "after": after.to_json(), "forward_equivalents": spent, "kept": kept}
    file.write_text(json.dumps(result))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, action="append", required=True, help="a finished run to compare with")
    parser.add_argument("--output", dest="out", type=Path, default=Path("runs/controls"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["shuffled", "own_samples"])
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    config = load_config(a.demo[0] / "config.yaml").model_copy(update={"threads": a.threads})
    budget = summary(a.demo[0])["cost"]["forward_equivalents"]
    rows = {f"demo {d.name}": summary(d) for d in a.demo}
    if a.only != "own_samples":
        rows["shuffled rewards"] = shuffled(config, a.out)
    if a.only != "shuffled":
        rows["own verified samples"] = own_samples(config, budget, a.out)
    for name, row in rows.items():
        before, after = (row[k]["mean"]["shapes_strict"] for k in ("before", "after"))
        spent = row.get("cost", row)["forward_equivalents"]
        print(f"{name:24s} {before:.3f} -> {after:.3f} ({after - before:+.3f}), {spent} forward-equivalents")


if __name__ == "__main__":
    main()
