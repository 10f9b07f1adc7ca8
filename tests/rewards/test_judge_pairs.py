"""Comparisons of a prompt's pictures over a real local HTTP server, and the win rates that they make."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.judge_server import Asked, JudgeServer, Reply
from tempflow.core.credit.multi_reward import win_rates
from tempflow.media import Media
from tempflow.rewards import score_all
from tempflow.rewards.judge_pairs import JudgePairs, judge_pairs, round_robin, seated
from tempflow.rewards.protocol import RewardError

FIRST, SECOND, BOTH = "Image 1 is better.", "Image 2 is better.", "Both images are equally good."
AXES = ("Alignment", "Coherence", "Style")
FAILED = Reply("I cannot say.")


def greys(*levels: int) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 4, 4, 3)


def made(server: JudgeServer, template: str = "unified_1_pairs", **options: object) -> JudgePairs:
    return judge_pairs(url=server.url, model="judge", template=template, **{"timeout": 60.0, "retries": 0, **options})


def rates(reward: JudgePairs, media: torch.Tensor, metadata: dict[str, object] | None = None) -> list[float]:
    found = reward.score(Media.of(media), ["a cat"] * len(media), [metadata or {}] * len(media))
    assert found.names == ("judge_pairs",)
    return found.value[:, 0].tolist()


def levels(asked: Asked) -> tuple[int, int]:
    return int(asked.pictures[-2][0, 0, 0]), int(asked.pictures[-1][0, 0, 0])


def brighter(asked: Asked) -> Reply:
    a, b = levels(asked)
    return Reply(FIRST if a // 10 > b // 10 else SECOND if a // 10 < b // 10 else BOTH)


@pytest.mark.parametrize("orders", ["both", "counter"])
def test_win_rates_are_those_of_the_judges_order(orders: str) -> None:
    """Equal to the win rates of the scores that the judge goes by; 3 and 7 tie for it."""
    media = greys(50, 3, 200, 7, 90)
    with JudgeServer(brighter) as server:
        found = rates(made(server, orders=orders), media)
    value = (media[:, 0, 0, 0] // 10).double()[:, None]
    assert found == pytest.approx(win_rates(value, torch.ones_like(value, dtype=torch.bool))[:, 0].tolist())
    assert len(server.asked) == (20 if orders == "both" else 10)
    assert sum(found) == pytest.approx(2.5)


def test_both_orders_cancel_a_judge_that_looks_at_places_alone() -> None:
    with JudgeServer(lambda asked: Reply(FIRST)) as server:
        assert rates(made(server), greys(*range(6))) == pytest.approx([0.5] * 6)


@pytest.mark.parametrize("count", range(2, 14))
def test_by_the_counter_nobody_stands_first_more_often(count: int) -> None:
    for turn in (0, 1):
        played = list(seated(round_robin(count), count, turn))
        assert sorted(tuple(sorted(match)) for match in played) == [*itertools.combinations(range(count), 2)]
        lead = Counter(a for a, _ in played)
        lead.subtract(b for _, b in played)
        assert max(map(abs, lead.values())) <= 2
    flipped = [tuple(reversed(match)) for match in seated(round_robin(2), 2, 0)]
    assert flipped == [*seated(round_robin(2), 2, 1)]


def test_the_counters_order_is_the_same_every_time() -> None:
    with JudgeServer(brighter) as server:
        for _ in range(2):
            rates(made(server, orders="counter", concurrency=1), greys(1, 2, 3, 4))
        asked = [levels(a) for a in server.asked]
    assert asked[:6] == asked[6:]


@pytest.mark.parametrize(("count", "pairs"), [(8, 4), (8, 9), (7, 7), (5, 3), (9, 36)])
def test_fewer_pairs_are_spread_evenly(count: int, pairs: int) -> None:
    chosen = round_robin(count)[:pairs]
    assert len({tuple(sorted(match)) for match in chosen}) == pairs
    played = Counter(n for match in chosen for n in match)
    assert len(played) == count and max(played.values()) - min(played.values()) <= 1 + count % 2
    with JudgeServer(brighter) as server:
        assert not any(math.isnan(x) for x in rates(made(server, pairs=pairs), greys(*range(0, 10 * count, 10))))
        assert len(server.asked) == 2 * pairs


def test_too_few_pairs_end_the_run() -> None:
    with JudgeServer(brighter) as server, pytest.raises(RewardError, match="nearest valid: 4"):
        rates(made(server, pairs=3), greys(*range(8)))


def test_failed_comparisons_do_not_count_and_nobody_gets_half_a_win_for_them() -> None:
    """Whatever has the 30 in it fails: its picture has no score, the others those of the rest."""
    with JudgeServer(lambda asked: FAILED if 30 in levels(asked) else brighter(asked)) as server:
        found = rates(made(server), greys(10, 30, 20, 40))
    assert found[0::2] == pytest.approx([0.0, 0.5]) and math.isnan(found[1]) and found[3] == 1.0
    with JudgeServer(lambda asked: FAILED if levels(asked) == (40, 10) else brighter(asked)) as server:
        assert rates(made(server), greys(10, 20, 40)) == pytest.approx([0.0, 0.5, 1.0])


def test_a_lone_picture_is_failed_and_equal_ones_tie_unasked() -> None:
    with JudgeServer(brighter) as server:
        assert math.isnan(rates(made(server), greys(9))[0])
        assert rates(made(server), greys(9, 9)) == [0.5, 0.5]
        assert server.asked == []
        assert rates(made(server), greys(0, 90, 90)) == pytest.approx([0.0, 0.75, 0.75])
        assert len(made(server).score(Media.of(greys()), [], [])) == 0


def test_groups_are_compared_by_themselves() -> None:
    """As a run calls it: rows of two prompts that are mixed, one of equal text."""
    with JudgeServer(brighter) as server:
        media, slots = greys(10, 60, 50, 20), [0, 1, 0, 1]
        found = score_all([made(server)], media, ["a", "a", "a", "a"], [{}] * 4, slots)
        assert found.value[:, 0].tolist() == [0.0, 1.0, 1.0, 0.0] and len(server.asked) == 4
        with pytest.raises(RewardError, match="2 different"):
            made(server).score(Media.of(media[:2]), ["a", "b"], [{}] * 2)


def test_a_faulty_endpoint_scores_nobody() -> None:
    with JudgeServer(lambda asked: Reply(status=500, raw=b"x")) as server:
        assert all(math.isnan(x) for x in rates(made(server), greys(1, 2, 3)))


@pytest.mark.parametrize(
    ("template", "first"),
    [
        ("think_pairs", "<think>Image 2 is better in red.</think><answer>Image 1 is better</answer>"),
        ("flex_pairs", '{"categories": [{"score_1": 7, "score_2": 3}], "winner": "Image 1"}'),
        ("unified_2_pairs", "".join(f"{n}:\nImage 1: 0.8\nImage 2: 0.2\n" for n in AXES)),
    ],
)
def test_every_form_of_comparison_goes_over_the_wire(template: str, first: str) -> None:
    swapped = first.replace("Image 1 is", "Image X is").replace("Image 2 is", "Image 1 is").replace("X is", "2 is")
    swapped = swapped.replace('"winner": "Image 1"', '"winner": "Image 2"')
    for a, b in (("7", "3"), ("0.8", "0.2")):
        swapped = swapped.replace(a, "#").replace(b, a).replace("#", b)
    with JudgeServer(lambda asked: Reply(first if levels(asked)[0] > levels(asked)[1] else swapped)) as server:
        assert rates(made(server, template), greys(1, 9, 5)) == pytest.approx([0.0, 1.0, 0.5])


def test_edits_are_compared_before_their_source(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (77, 77, 77)).save(tmp_path / "a.png")
    with JudgeServer(brighter) as server:
        reward = made(server, "edit_pairs", sources=str(tmp_path))
        assert rates(reward, greys(10, 90), {"image": ["a.png"]}) == [0.0, 1.0]
        assert all(a.pictures[0][0, 0, 0] == 77 and len(a.pictures) == 3 for a in server.asked)
        with pytest.raises(ValueError, match="source picture"):
            reward.check_prompts(["x"], [{}])


def test_two_models_pictures_are_compared_in_both_orders() -> None:
    """Pairs: better, worse, equal, a judge that looks at places, and one order without an answer."""

    def decide(asked: Asked) -> Reply:
        a, b = levels(asked)
        if 200 in (a, b):
            return Reply(FIRST)
        return FAILED if (a, b) == (7, 100) else brighter(asked)

    with JudgeServer(decide) as server:
        judge = made(server)
        first, second = Media.of(greys(50, 3, 9, 200, 100)), Media.of(greys(3, 50, 9, 90, 7))
        told = judge.compare(first, second, ["a cat"] * 5, [{}] * 5)
        assert told == [1.0, 0.0, 0.5, 0.5, None] and len(server.asked) == 8
        back = judge.compare(second, first, ["a cat"] * 5, [{}] * 5)
        assert back == [0.0, 1.0, 0.5, 0.5, None]
        with pytest.raises(ValueError, match="prompts has 1 entries"):
            judge.compare(first, second, ["a cat"], [{}])
