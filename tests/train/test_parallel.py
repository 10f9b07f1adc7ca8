"""Two gloo ranks do what one process does."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import FROM_NOISES, Layer, main
from safetensors.torch import load_file

from tempflow.train import checkpoint
from tempflow.train.parallel import World, buckets

HERE = Path(__file__).parent


def launch(ranks: int, how: str, target: Path, *cases: str) -> None:
    """What torchrun does for one node: a process a rank, the same command, its environment. One rank needs none."""
    if ranks == 1:
        main(how, str(target), *cases)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join(sys.path)  # pytest's, where the golden cases are
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), how, str(target), *cases],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        limit = 600 + 60 * len(cases)  # all algorithms in turn take half an hour of a machine with other work
        said = [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:  # those that wait for one that does not come
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)


def close(a: torch.Tensor, b: torch.Tensor, relative: float) -> bool:
    return float((a - b).abs().max()) <= relative * float(b.abs().max())


KINDS = ["flow", "flow_global", "tempflow", "tempflow_batch", "nft", "dgpo", "v_grpo", "gcpo", "vipo", "sol_rl", "e2po"]
KINDS += ["diffusion_dpo", "sft"]
STUDENTS = [*(f"twice {name}" for name in FROM_NOISES), "two_roles", "few dmd2", "few late"]
"""Each has seen scores when its second iteration begins, and takes their spread."""
IDLE = ["flow", "dapo", "gcpo", "vipo"]
ROUTED = ["flow", "nft", "dapo"]
DEEP = ["deep flow", "deep apart nft", "deep lora apart nft", "deep lora updates tempflow"]
HALF = "deep half apart nft"
SHARDED = ["apart nft", "idle flow", "idle dapo", "twice updates flow", "dgpo", "v_grpo", "gcpo", "e2po", "sft"]
SHARDED += ["twice rats_failed_scores", "twice opd", "twice refl", "twice draft_all_steps", "twice srpo"]
"""Trajectories, forward process and offline, with a reference, moving sets, several updates, groups and drafts; noises
that one role walks, of `refl` in as many forwards as the batch's rows need."""


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on two ranks, one after the other in the same processes, as starting these is what takes time."""
    folder = tmp_path_factory.mktemp("ddp")
    cases = [*(f"idle {name}" for name in IDLE), *(f"routed {name}" for name in ROUTED), "deep flow", HALF]
    launch(2, "ddp", folder, *KINDS, *STUDENTS, *cases)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    launch(2, "fsdp", folder, *SHARDED, *DEEP, HALF)
    return folder


def compare(case: str, two: Path, folder: Path) -> dict[str, float]:
    """Two ranks' metrics and tensors beside those of this process alone; the latter's metrics."""
    launch(1, "ddp", folder, case)
    places = [root / case.replace(" ", "_") for root in (folder, two)]
    one, other = (load_file(place / "tensors.safetensors") for place in places)
    assert one.keys() == other.keys() and any(float(one[n].abs().max()) > 1e-4 for n in one if "gradient" in n)
    if "advantage" in one:
        assert torch.equal(one["advantage"], other["advantage"]) and bool((one["advantage"] != 0).any())
    for name in one:  # a single number may be what is left of larger ones
        assert bool(other[name].isfinite().all()) and close(
            other[name], one[name], 1e-5 if one[name].dim() else 1e-4
        ), name
    metrics = [json.loads((place / "metrics.json").read_text()) for place in places]
    assert metrics[0].keys() == metrics[1].keys() and metrics[0]["updates"] >= 1
    for key, value in metrics[0].items():
        assert metrics[1][key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    return metrics[0]


@pytest.mark.parametrize("algorithm", KINDS)
def test_two_ranks_equal_one_process(algorithm: str, replicated: Path, tmp_path: Path) -> None:
    """Five prompts on two ranks, failed scores and a group without spread: loss, advantages, gradients, a step."""
    compare(algorithm, replicated, tmp_path)


@pytest.mark.parametrize("case", STUDENTS)
def test_two_ranks_that_learn_from_noises_equal_one_process(case: str, replicated: Path, tmp_path: Path) -> None:
    """All roles' weights and sets, the metrics, what was scored and its spread: with failed scores, in minibatches of
    another composition, and where a rank has no noise in an update."""
    compare(case, replicated, tmp_path)


@pytest.mark.parametrize("algorithm", IDLE)
def test_a_rank_whose_groups_teach_nothing_leaves_the_others_gradient_as_it_is(
    algorithm: str, replicated: Path, tmp_path: Path
) -> None:
    """Its groups are flat or failed, and its latents broken: 0 times these would not be 0."""
    assert compare(f"idle {algorithm}", replicated, tmp_path)["updates"] == 1


@pytest.mark.parametrize("algorithm", ROUTED)
def test_ranks_that_use_different_parameters_equal_one_process(
    algorithm: str, replicated: Path, tmp_path: Path
) -> None:
    """Experts of one shape, one used on each rank and one nowhere, which no optimizer may touch."""
    compare(f"routed {algorithm}", replicated, tmp_path)
    tensors = load_file(replicated / f"routed_{algorithm}" / "tensors.safetensors")
    used = {f"gradient/experts.{number}.weight": number < 2 for number in range(3)}
    assert {name: name in tensors for name in used} == used
    assert all(float(tensors[name].abs().max()) > 1e-5 for name in used if used[name])
    assert torch.equal(tensors["after/experts.2.weight"], torch.full((8, 2), 2.1))


def test_buckets_keep_the_order_and_their_size() -> None:
    assert buckets([3, 4, 5, 20, 1, 1], 8) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    assert buckets([], 8) == [] and buckets([9], 8) == [range(1)] and buckets([4, 4], 8) == [range(2)]
    sizes = torch.randint(0, 12, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    made = buckets(sizes, 16)
    assert [i for bucket in made for i in bucket] == list(range(50))
    assert all(sum(sizes[i] for i in bucket) <= 16 for bucket in made)


@pytest.mark.parametrize("case", SHARDED + DEEP)
def test_sharded_equals_one_process(case: str, sharded: Path, tmp_path: Path) -> None:
    """Loss, gradients, a step and every weight set, where ranks have different numbers of forwards and minibatches."""
    compare(case, sharded, tmp_path)


def test_a_rank_of_a_sharded_network_holds_its_part_and_gathers_a_block_at_a_time(
    replicated: Path, sharded: Path
) -> None:
    def read(folder: Path, case: str) -> dict[str, int]:
        return json.loads((folder / case.replace(" ", "_") / "bytes.json").read_text())

    for case in ("deep flow", HALF):
        whole, parts = read(replicated, case), read(sharded, case)
        for name in ("network", "gradients", "moments", "weight sets", *(["masters"] if case == HALF else [])):
            assert 0 < parts[name] < 0.55 * whole[name], name  # rows that are odd are the first rank's
        assert whole["gathered"] == whole["network"]
        # the layer that computes, the next one on its way, and what lies outside of the six
        layer = Layer().to(torch.bfloat16 if case == HALF else torch.float32)
        size = sum(p.nbytes for p in layer.parameters())
        assert size < parts["gathered"] <= whole["network"] - 4 * size


def test_a_sharded_network_in_bfloat16_has_float32_masters(replicated: Path, sharded: Path) -> None:
    """The number that is held whole in float32 among them. Ranks round other sums than one process does."""
    one, two = (load_file(folder / HALF.replace(" ", "_") / "tensors.safetensors") for folder in (replicated, sharded))
    assert one.keys() == two.keys() and all(two[name].dtype == torch.float32 for name in two)
    for name in one:
        assert close(two[name], one[name], 1e-2), name


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "two"
    launch(2, "fsdp", folder, "run")
    return folder


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_run_on_two_ranks_is_a_run_on_one(mode: str, sharded_run: Path, tmp_path: Path) -> None:
    """Files and weights."""
    launch(1, mode, tmp_path / "one", "run")
    if mode == "ddp":
        launch(2, mode, tmp_path / "two", "run")
    else:
        shutil.copytree(sharded_run, tmp_path / "two")
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


def test_a_sharded_run_goes_on_on_one_process(sharded_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(sharded_run, tmp_path / "run")
    weights = checkpoint.read_weights(checkpoint.newest(run), "policy")
    launch(1, "fsdp", run, "resume")
    again = checkpoint.read_weights(checkpoint.newest(run), "policy")
    assert all(torch.equal(weights[n], again[n]) for n in weights)


@pytest.mark.slow
@pytest.mark.parametrize("training", ["lora", "full"])
def test_the_embedded_model_in_parts_equals_one_process(training: str, tmp_path: Path) -> None:
    """Transformer blocks of diffusers with its activation checkpointing and peft's layers, saved as one model."""
    for ranks, name in ((1, "one"), (2, "two")):
        launch(ranks, "fsdp", tmp_path / name, training)
    ends = [checkpoint.newest(tmp_path / name) for name in ("one", "two")]
    for which in ("policy", "ema"):
        one, two = (checkpoint.read_weights(end, which) for end in ends)
        assert one.keys() == two.keys() and ("lora" in next(iter(one))) == (training == "lora")
        assert all(close(two[n], one[n], 1e-5) for n in one if one[n].abs().max() > 1e-4)
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n / "model").rglob("*")) for n in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) > 1


def test_too_few_prompts_for_the_ranks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"data.prompts_per_iteration: 1 for 2 ranks; nearest valid: 2"):
        launch(2, "ddp", tmp_path / "run", "few")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_blocks_are_even_and_cover_everything(size: int) -> None:
    for count in range(size, 20):
        blocks = [World(rank, size).block(count) for rank in range(size)]
        assert [i for block in blocks for i in block] == list(range(count))
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
