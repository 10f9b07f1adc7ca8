"""Pref-GRPO end to end: models trained by the win rates of a judge behind a local endpoint, which errs."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake import PROMPTS, Fake
from fake import config as fake_config

from benchmarks.judge_server import Asked, JudgeServer, Reply, erring_judge, verifier_judge
from benchmarks.pref_judge import config
from tempflow.config import Config
from tempflow.media import Media, Size
from tempflow.request import Prompt
from tempflow.rewards.judge_pairs import JudgePairs, judge_pairs
from tempflow.shapes.prompts import specs
from tempflow.shapes.render import scene
from tempflow.train.guards import GuardError
from tempflow.train.trainer import train


def made(server: JudgeServer) -> JudgePairs:
    return judge_pairs(
        url=server.url, model="judge", template="unified_1_pairs", orders="counter", concurrency=2, retries=0
    )


ALGORITHM = {"name": "pref_grpo", "steps": 4, "group": 5, "train_steps": None, "clip": 0.02, "win_rate": False}


def bright(caption: str, picture: np.ndarray) -> float:
    return float(picture.mean())


def drawn(model: Fake) -> float:
    """Mean of what the model draws, over its prompts."""
    condition = model.encode([Prompt(text) for text in PROMPTS], Size(2, 2)).tensors["embeds"][:, 0]
    return float(model.network.mean(condition).mean().detach())


def test_a_model_learns_what_an_erring_judge_prefers(tmp_path: Path) -> None:
    """The whole loop on the analytic generator; a tenth of the questions fail, and the first place is favoured."""
    model = Fake()
    before = drawn(model)
    with JudgeServer(erring_judge(bright)) as server:
        settings = fake_config(tmp_path / "run", algorithm=ALGORITHM)
        run = train(settings, model=model, reward=made(server), prompts=PROMPTS, quiet=True)
    # 8 iterations of 3 prompts with 10 pairs; evaluations draw one picture a prompt and ask nothing
    assert 200 < len(server.asked) <= 8 * 3 * 10
    found = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0.4 < line["reward/judge_pairs"] < 0.6 for line in found)
    assert drawn(model) > before + 0.1


def test_a_run_ends_where_the_judge_answers_nothing(tmp_path: Path) -> None:
    """Failed, all of them; nothing is trained on zeros."""
    settings = fake_config(tmp_path / "run", algorithm=ALGORITHM)
    with JudgeServer(erring_judge(bright, failures=1.0)) as server:
        with pytest.raises(GuardError, match="all 15 rewards failed"):
            train(settings, model=Fake(), reward=made(server), prompts=PROMPTS, quiet=True)
        assert server.count <= 30


@pytest.mark.slow
def test_a_run_on_shapes_is_judged_by_the_verifier_that_it_was_not_taught_by(tmp_path: Path) -> None:
    given = Namespace(iterations=1, rate=1e-3, prompts=2, group=4, loss="pref_grpo", train_steps=None)
    full = config(str(tmp_path / "run"), 0, given)
    evaluation = full.evaluation.model_dump() | {"validation_prompts": 6, "test_prompts": 6, "steps": 2}
    small = Config.model_validate(full.model_dump() | {"evaluation": evaluation})
    with JudgeServer(verifier_judge()) as server:
        run = train(small, reward=made(server), quiet=True)
    assert len(server.asked) == 2 * 6
    assert run.last_line.startswith("held-out strict score: ")
    tested = json.loads((run.folder / "evaluation.jsonl").read_text().splitlines()[-1])
    assert tested["mean"]["judge_pairs"] is None and tested["mean"]["shapes_strict"] is not None


def test_right_pictures_win_by_an_erring_judge_whatever_their_place() -> None:
    """Of groups of four right pictures and four that show something else, in any order."""
    right, wrong, said = [], [], list[str | None]()
    judge = verifier_judge(failures=0.1, bias=0.3)

    def decide(asked: Asked) -> Reply:
        said.append(judge(asked).text)
        return judge(asked)

    with JudgeServer(decide) as server:
        for number, spec in enumerate(specs("validation")[:6]):
            other = specs("validation")[-1 - number]
            shown = torch.stack(
                [torch.from_numpy(scene(s, np.random.default_rng(n))) for n in range(4) for s in (spec, other)]
            )
            order = torch.randperm(8, generator=torch.Generator().manual_seed(number))
            found = made(server).score(Media.of(shown[order]), [spec.prompt] * 8, [{}] * 8)
            assert found.ok.all()
            rates = found.value[:, 0][order.argsort()]
            right += rates[0::2].tolist()
            wrong += rates[1::2].tolist()
    assert sum(right) / len(right) > 0.6 > 0.4 > sum(wrong) / len(wrong)
    assert said.count("Image 1 is better.") > 1.1 * said.count("Image 2 is better.")  # the bias is there
