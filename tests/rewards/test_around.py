"""Rewards of clips and of sound: what each is given, and a reward of pictures over a clip's frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards import check_takes, from_function, over_frames, score_all
from tempflow.rewards.protocol import takes_of

CLIPS = (10 * torch.arange(2)[:, None] + torch.arange(5)).to(torch.uint8)[:, :, None, None, None].repeat(1, 1, 2, 2, 3)
SOUND = torch.arange(8.0).view(2, 1, 4) / 8
MEDIA = Media(CLIPS, 8.0, SOUND, 8)
PROMPTS, META = ["a", "b"], [{"n": 0}, {"n": 1}]


class Level:
    """How light a picture is; one of 13 cannot be scored."""

    name, groupwise = "level", False

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        value = media.pictures()[:, 0, 0, :1].float()
        assert prompts == [PROMPTS[int(v) // 10] for v in value[:, 0]] and len(metadata) == len(value)
        return Scores(value, value != 13, (self.name,))


@pytest.mark.parametrize(("count", "want"), [(1, [2.0, 12.0]), (2, [2.0, 12.0]), (5, [2.0, None]), (3, [2.0, 12.0])])
def test_a_clip_has_the_mean_of_its_frames(count: int, want: list[float | None]) -> None:
    reward = over_frames(Level(), count)
    assert (reward.name, reward.groupwise, takes_of(reward)) == ("level", False, "video")
    scores = score_all([reward], MEDIA, PROMPTS, META, [0, 1])
    assert scores.ok[:, 0].tolist() == [w is not None for w in want]
    assert scores.value[scores.ok].tolist() == [w for w in want if w is not None]


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="count: 0 is too small; nearest valid: 1"):
        over_frames(Level(), 0)


@pytest.mark.parametrize("takes", ["video", "sound", "video and sound"])
def test_a_reward_of_something_else_has_no_frames_to_judge(takes: Any) -> None:
    other = from_function(lambda judged, prompts: [0.0] * len(prompts), "ear", takes=takes)
    with pytest.raises(ValueError, match=rf"^reward 'ear' takes {takes}; nearest valid: one that takes picture$"):
        over_frames(other)


def test_a_function_is_given_what_it_takes() -> None:
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda judged, prompts: (seen.__setitem__(name, judged), [0.0] * len(prompts))[1]

    takes = ("picture", "video", "sound", "video and sound")
    rewards = [from_function(keep(kind), kind, takes=kind) for kind in takes]
    score_all(rewards, MEDIA, PROMPTS, META, [0, 1])
    assert [np.asarray(image)[0, 0, 0] for image in seen["picture"]] == [2, 12]
    assert all(np.array_equal(a, b) for a, b in zip(seen["video"], CLIPS.numpy(), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(seen["sound"], SOUND.numpy(), strict=True))
    frames, sound = seen["video and sound"][1]
    assert np.array_equal(frames, CLIPS[1].numpy()) and np.array_equal(sound, SOUND[1].numpy())
    with pytest.raises(ValueError, match=r"takes: 'gif' is not one of picture, video, sound, video and sound"):
        from_function(keep("x"), "x", takes="gif")  # type: ignore[arg-type]


def test_a_reward_of_something_else_is_refused_by_name() -> None:
    silent = from_function(lambda judged, prompts: [0.0] * len(prompts), "ear", takes="sound")
    with pytest.raises(ValueError, match="reward 'ear' takes sound, and the model 'm' makes video; nearest"):
        check_takes([silent], "video", "m")
    with pytest.raises(ValueError, match=r"reward 'level' takes picture, and the model 'm' makes video; .*over_frames"):
        check_takes([Level()], "video", "m")
    check_takes([silent, over_frames(Level())], "video and sound", "m")
    check_takes([Level()], "picture", "m")
