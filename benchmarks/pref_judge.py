"""Pref-GRPO end to end by a judge that errs, over the wire: `shapes` is trained by a local endpoint's win rates.

    python -m benchmarks.pref_judge [--seeds 0 1 2] [--iterations 80] [--rate 1e-4] [--train-steps N]
                                    [--loss pref_grpo|v_grpo] [--output runs/pref_judge]

The endpoint is `benchmarks.judge_server` in this process: it compares two pictures by the verifier's graded score, but
10 % of its questions get no verdict and in 20 % of the others the first picture wins whatever it shows. The run knows
the win rates alone; `--loss v_grpo` trains on the same ones with V-GRPO's loss. The strict verifier looks at
validation, by which the best weights are chosen, and at the test split before the first and after the last iteration.
Prints each seed's test score before and after with the interval of the gain over prompts, and that of all seeds;
processor time is this process's, the judge's work in it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from benchmarks.judge_server import JudgeServer, verifier_judge
from benchmarks.runs import gain, lines, samples, summary, tested
from tempflow.config import Config
from tempflow.rewards.judge_pairs import judge_pairs
from tempflow.train.trainer import train

METRIC = "shapes_strict"


GRPO = {
    "name": "pref_grpo",
    "steps": 6,
    "noise_level": 0.9,
    "shared_noise": False,
    "clip": 7e-3,
    "eps": 0.1,
    "win_rate": False,  # the reward is a win rate already
}
VARIATIONAL = {"name": "v_grpo", "steps": 6, "pairs": 4, "eps": 0.1}
"""Settings of the recipes of `shapes`: Pref-GRPO, and the same win rates with V-GRPO's loss."""


def config(folder: str, seed: int, given: argparse.Namespace) -> Config:
    steps = {} if given.train_steps is None else {"train_steps": given.train_steps}
    algorithm = {**GRPO, "train_steps": None, **steps} if given.loss == "pref_grpo" else VARIATIONAL
    return Config.model_validate(
        {
            "name": f"pref-judge-{seed}",
            "seed": seed,
            "iterations": given.iterations,
            "threads": 1,
            "output": folder,
            "algorithm": {**algorithm, "group": given.group},
            "rollout_rows": 192,
            "data": {"prompts_per_iteration": given.prompts},
            "optimizer": {"learning_rate": given.rate, "warmup_iterations": 10, "ema_decay": 0.9},
            "evaluation": {
                "every": 20,
                "validation_prompts": 360,
                "test_prompts": 1008,
                "metric": METRIC,
                "gold": (METRIC,),
                "seed": 4321,
            },
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--prompts", type=int, default=12, help="prompts an iteration")
    parser.add_argument("--group", type=int, default=12, help="pictures a prompt")
    parser.add_argument("--loss", choices=("pref_grpo", "v_grpo"), default="pref_grpo", help="whose loss it is")
    parser.add_argument(
        "--train-steps", type=int, help="pref_grpo: steps of the six that are trained; default: all but the last"
    )
    parser.add_argument("--failures", type=float, default=0.1, help="share of questions without a verdict")
    parser.add_argument("--bias", type=float, default=0.2, help="share of the others in which the first picture wins")
    parser.add_argument("--output", default="runs/pref_judge")
    given = parser.parse_args()
    runs = [config(f"{given.output}/{seed}", seed, given) for seed in given.seeds]
    for run in runs:
        if not (Path(run.output) / "summary.json").exists():
            trained(run, given.failures, given.bias)
    told(runs)


def trained(run: Config, failures: float, bias: float) -> None:
    """Trains it, and notes the processor time and the questions beside the run's folder."""
    began = time.process_time()
    with JudgeServer(verifier_judge(failures, bias, run.seed), keep=False) as server:
        reward = judge_pairs(
            url=server.url, model="judge", template="unified_1_pairs", orders="counter", concurrency=4, retries=1
        )
        train(run, reward=reward, quiet=True)
        used = {"processor_seconds": time.process_time() - began, "questions": server.count}
    Path(f"{run.output}.json").write_text(json.dumps(used))


def told(runs: list[Config]) -> None:
    prompts = tested(runs[0])
    before, after = (np.stack([samples(run.output, METRIC)[n] for run in runs]) for n in (0, 1))
    for n, run in enumerate(runs):
        mean, low, high = gain(after[n : n + 1], before[n : n + 1], prompts)
        curve = " ".join(f"{line['mean'][METRIC]:.3f}" for line in lines(run.output, "evaluation.jsonl"))
        used = json.loads(Path(f"{run.output}.json").read_text())
        print(
            f"seed {run.seed}: test {before[n].mean():.3f} → {after[n].mean():.3f}, "
            f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]; best iteration {summary(run.output).get('best_iteration')}; "
            f"validation {curve}; "
            f"{used['questions']:,} questions, {used['processor_seconds']:.0f} s of processor time"
        )
    mean, low, high = gain(after, before, prompts)
    print(f"{len(runs)} seeds: {before.mean():.3f} → {after.mean():.3f}, {mean:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
