"""Two gloo ranks do what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tempflow.train import checkpoint
from tempflow.train.dist import World

HERE = Path(__file__).parent


def launch(ranks: int, *words: str) -> None:
    """What torchrun does for one node: a process a rank, the same command, its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), *words],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)


def close(a: torch.Tensor, b: torch.Tensor, relative: float) -> bool:
    return float((a - b).abs().max()) <= relative * float(b.abs().max())


KINDS = ["flow", "flow_global", "tempflow", "tempflow_batch", "nft", "dgpo", "v_grpo", "gcpo", "vipo", "sol_rl", "e2po"]
KINDS += ["diffusion_dpo", "sft"]


@pytest.mark.parametrize("algorithm", KINDS)
def test_two_ranks_equal_one_process(algorithm: str, tmp_path: Path) -> None:
    """Five prompts on two ranks, failed scores and a group without spread: loss, advantages, gradients, a step."""
    launch(1, algorithm, str(tmp_path / "one"), "ddp")
    launch(2, algorithm, str(tmp_path / "two"), "ddp")
    one, two = (load_file(tmp_path / name / "tensors.safetensors") for name in ("one", "two"))
    assert torch.equal(one["advantage"], two["advantage"]) and bool((one["advantage"] != 0).any())
    for name in one:
        assert close(two[name], one[name], 1e-5), name
    assert float(one["gradient/mean.bias"].abs().max()) > 1e-4
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0].keys() == metrics[1].keys()
    for key, value in metrics[0].items():
        assert metrics[1][key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("algorithm", ["flow", "dapo", "gcpo", "vipo"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_rank_whose_groups_teach_nothing_leaves_the_others_gradient_as_it_is(
    algorithm: str, mode: str, tmp_path: Path
) -> None:
    """Its groups are flat or failed, and its latents broken: 0 times these would not be 0."""
    if mode == "fsdp" and algorithm != "flow":
        pytest.skip("one sharded case tells")
    launch(1, f"idle {algorithm}", str(tmp_path / "one"), "ddp")
    launch(2, f"idle {algorithm}", str(tmp_path / "two"), mode)
    one, two = (load_file(tmp_path / name / "tensors.safetensors") for name in ("one", "two"))
    assert float(one["gradient/mean.bias"].abs().max()) > 1e-4
    for name in one:
        assert bool(two[name].isfinite().all()) and close(two[name], one[name], 1e-5), name
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["updates"] == metrics[1]["updates"] == 1
    for key, value in metrics[0].items():
        assert metrics[1][key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


@pytest.mark.parametrize("algorithm", ["flow", "tempflow"])
def test_sharded_equals_replicated(algorithm: str, tmp_path: Path) -> None:
    launch(2, algorithm, str(tmp_path / "ddp"), "ddp")
    launch(2, algorithm, str(tmp_path / "fsdp"), "fsdp")
    ddp, fsdp = (load_file(tmp_path / name / "tensors.safetensors") for name in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    for name in ddp:
        assert close(fsdp[name], ddp[name], 1e-5), name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_run_on_two_ranks_is_a_run_on_one(mode: str, tmp_path: Path) -> None:
    """Files and weights; the checkpoint of a sharded run is read by a single process, which goes on with it."""
    launch(1, "run", str(tmp_path / "one"), mode)
    launch(2, "run", str(tmp_path / "two"), mode)
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        lines = [
            [json.loads(line) for line in (tmp_path / run / name).read_text().splitlines()] for run in ("one", "two")
        ]
        assert len(lines[0]) == len(lines[1]) > 1
        for a, b in zip(*lines, strict=True):
            assert a.keys() == b.keys()
            for key in ("loss", "grad_norm", "reward/brightness", "forwards", "diversity", "kl"):
                if key in a:
                    assert b[key] == pytest.approx(a[key], rel=2e-3, abs=1e-6), (name, key)
    ends = [checkpoint.newest(tmp_path / run) for run in ("one", "two")]
    for which in ("policy", "ema"):
        one, two = (checkpoint.read_weights(end, which) for end in ends)
        assert one.keys() == two.keys() and all(close(two[n], one[n], 1e-3) for n in one)
    assert not list(ends[1].glob("*.parts"))
    saved = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two")]
    assert saved[0].keys() == saved[1].keys() and all(close(saved[1][n], saved[0][n], 1e-3) for n in saved[0])


def test_a_sharded_run_goes_on_on_one_process(tmp_path: Path) -> None:
    launch(2, "run", str(tmp_path / "run"), "fsdp")
    weights = checkpoint.read_weights(checkpoint.newest(tmp_path / "run"), "policy")
    launch(1, "run", str(tmp_path / "run"), "fsdp", "resume")
    again = checkpoint.read_weights(checkpoint.newest(tmp_path / "run"), "policy")
    assert all(torch.equal(weights[n], again[n]) for n in weights)


def test_too_few_prompts_for_the_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"data.prompts_per_iteration: 5 for 6 ranks; nearest valid: 6"):
        launch(6, "run", str(tmp_path / "run"), "ddp")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_blocks_are_even_and_cover_everything(size: int) -> None:
    for count in range(size, 20):
        blocks = [World(rank, size).block(count) for rank in range(size)]
        assert [i for block in blocks for i in block] == list(range(count))
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
