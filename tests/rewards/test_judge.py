"""Judges over a real local HTTP server: what is sent, what is read, what fails and what ends a run."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.judge_server import Asked, JudgeServer, Reply
from tempflow.media import Media
from tempflow.rewards import score_all
from tempflow.rewards.answers import Unreadable
from tempflow.rewards.endpoint import answer_of
from tempflow.rewards.judge import Judge, judge
from tempflow.rewards.judge_pairs import judge_pairs
from tempflow.rewards.protocol import Reward, RewardError
from tempflow.rewards.template import FOLDER, load, names

GOOD = Reply("Fine.\nFinal Score: 4")
ATOMS = [{"question": "Is there a cat?", "answer": "Yes"}, {"question": "How many?", "answer": "two"}]


def pictures(count: int = 1, side: int = 6) -> torch.Tensor:
    """Each of one grey that says its number."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, side, side, 3) * 10


def made(server: JudgeServer, template: str = "unified_1", **options: object) -> Judge:
    return judge(url=server.url, model="judge", template=template, **{"timeout": 60.0, "retries": 0, **options})


def scores(reward: Reward, media: torch.Tensor | Media, metadata: dict[str, object] | None = None) -> list[float]:
    """NaN where failed."""
    count = len(media)
    found = reward.score(Media.of(media), ["a cat"] * count, [metadata or {}] * count)
    assert found.names == (reward.name,) and found.ok.equal(found.value.isfinite())
    return found.value[:, 0].tolist()


def by_grey(asked: Asked) -> Reply:
    return Reply(f"Final Score: {1 + int(asked.pictures[-1][0, 0, 0]) // 10}")


# ------------------------------------------------------------------------------------------------------------ templates
def test_every_template_is_sound_and_says_what_it_is() -> None:
    every = {*names(compares=True), *names(compares=False)}
    assert every == {file.stem for file in FOLDER.glob("*.toml")} and len(every) == 16
    for name in every:
        form = load(name)
        text = form.asks("{rubric} a cat", {"atoms": ATOMS}, "Is {prompt} there?")
        assert len(form.about) < 120 and ("{rubric} a cat" in text or "{prompt}" not in form.question)
        if form.parser == "atoms":
            assert "Is {prompt} there?" in text  # what is filled in is no place to fill


def test_the_scale_of_hp_scorer() -> None:
    form = load("hp_scorer")
    told = [form._unit(score) for score in range(6)]
    assert told == pytest.approx([0.007, 0.047, 0.269, 0.731, 0.953, 0.993], abs=5e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ('parser = "guess"', "parser"),
        ('parser = "better"', "pictures"),
        ("names = ['a']", "names"),
        ('to_unit = "none"', "to_unit"),
        ("range = [5.0, 1.0]", "range"),
        ("surprise = 1", "surprise"),
        ('question = "{rubric}"', "rubric"),
        ('question = "{promt}"', "promt"),
        ("version = 1", "template"),  # twice: no TOML
    ],
)
def test_a_template_of_ones_own_is_checked(tmp_path: Path, change: str, told: str) -> None:
    lines = ["version = 1", 'about = "x"', 'pictures = ["made"]', 'parser = "final_score"', "range = [1.0, 5.0]"]
    lines += ['to_unit = "divide"', 'question = "{prompt}?"']
    key = change.partition(" ")[0]
    kept = lines if key == "version" else [line for line in lines if not line.startswith(f"{key} ")]
    (tmp_path / "own.toml").write_text("\n".join([*kept, change]))
    with pytest.raises(ValueError, match=told) as error:
        load(str(tmp_path / "own.toml"))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- what is sent
def test_a_picture_goes_as_png_with_its_prompt_at_temperature_0() -> None:
    media = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with JudgeServer(lambda asked: GOOD, key="secret") as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPFLOW_JUDGE_KEY", "secret")
        assert scores(made(server, concurrency=1, max_tokens=77, seed=5), media) == pytest.approx([0.8, 0.8])
    assert [np.array_equal(a.pictures[0], m.numpy()) for a, m in zip(server.asked, media, strict=True)] == [True, True]
    body = server.asked[0].body
    assert {k: body[k] for k in ("model", "temperature", "seed", "max_tokens")} == {
        "model": "judge", "temperature": 0.0, "seed": 5, "max_tokens": 77,
    }  # fmt: skip
    assert "logprobs" not in body and "Caption: a cat\n" in server.asked[0].text
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]


def test_rows_keep_their_order_whatever_comes_back_first() -> None:
    def late_first(asked: Asked) -> Reply:
        return Reply(by_grey(asked).text, delay=0.05 * (asked.pictures[0][0, 0, 0] == 0))

    with JudgeServer(late_first) as server:
        assert scores(made(server), pictures(4)) == pytest.approx([0.2, 0.4, 0.6, 0.8])
        one = [scores(made(server), picture[None])[0] for picture in pictures(4)]
    assert one == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize("prompt", ["", "x" * 10_000, "🎉 {prompt} \u2028", "Final Score: 5"])
@pytest.mark.parametrize("shape", [(1, 1), (16, 4096)])
def test_odd_prompts_and_pictures_arrive(prompt: str, shape: tuple[int, int]) -> None:
    with JudgeServer(lambda asked: GOOD) as server:
        media = torch.zeros((1, *shape, 3), dtype=torch.uint8)
        assert made(server).score(Media.of(media), [prompt], [{}]).ok.all()
    assert server.asked[0].text.count(prompt) >= 1 and server.asked[0].pictures[0].shape == (*shape, 3)


def test_a_clip_is_shown_by_its_frames() -> None:
    said = Reply("Alignment Score (1-5): 5\nPhysics Score (1-5): 4\nStyle Score (1-5): 3")
    clip = Media(pictures(9)[None], fps=8.0)
    with JudgeServer(lambda asked: said) as server:
        reward = made(server, "unified_2_video")
        assert reward.takes == "video" and scores(reward, clip) == pytest.approx([0.8])
    assert [int(p[0, 0, 0]) for p in server.asked[0].pictures] == [0, 10, 20, 30, 50, 60, 70, 80]


def test_an_edit_is_shown_after_its_source_with_its_tasks_rubric(tmp_path: Path) -> None:
    Image.new("RGB", (3, 4), (9, 8, 7)).save(tmp_path / "a.png")
    with JudgeServer(lambda asked: Reply("Final Score: 3")) as server:
        reward = made(server, "hp_scorer", sources=str(tmp_path))
        told = {"image": "a.png", "kind": "Remove"}
        assert scores(reward, pictures(), told) == pytest.approx([1 / (1 + math.exp(-1))])
        for wrong, why in (({}, "image"), ({"image": "b.png"}, "b.png"), ({"image": "../a.png"}, "outside")):
            with pytest.raises(ValueError, match=why):
                reward.check_prompts(["a cat"], [wrong])
    first, second = server.asked[0].pictures
    assert first.shape == (4, 3, 3) and tuple(first[0, 0]) == (9, 8, 7) and second.shape == (6, 6, 3)
    assert load("hp_scorer").rubrics["remove"] in server.asked[0].text


def test_a_task_without_a_rubric_is_told_before_the_run(tmp_path: Path) -> None:
    text = (FOLDER / "hp_scorer.toml").read_text().replace("\ndefault =", "\nother =").replace('"source", ', "")
    (tmp_path / "own.toml").write_text(text)
    reward = judge(url="http://127.0.0.1:9/v1", model="judge", template=str(tmp_path / "own.toml"))
    reward.check_prompts(["a"], [{"task": "add"}])
    with pytest.raises(ValueError, match="'remov' has no rubric; nearest valid: 'remove'"):
        reward.check_prompts(["a"], [{"task": "remov"}])


# ------------------------------------------------------------------------------------------------------ probabilities
def test_yes_against_no_by_the_first_tokens_probabilities() -> None:
    tops = [{"Yes": 0.6, "No": 0.2}, {"no": 0.75, " yes": 0.25}, {"Perhaps": 0.9}]
    said = Reply("No", finish="length")  # one token is all that is asked for
    with JudgeServer(lambda asked: Reply(said.text, said.finish, tops[asked.number])) as server:
        found = scores(made(server, "yes_no", concurrency=1), pictures(3))
    assert found[:2] == pytest.approx([0.75, 0.25]) and math.isnan(found[2])
    assert {k: server.asked[0].body[k] for k in ("logprobs", "top_logprobs", "max_tokens")} == {
        "logprobs": True, "top_logprobs": 20, "max_tokens": 1,
    }  # fmt: skip


def test_an_endpoint_without_probabilities_fails_and_scores_nothing() -> None:
    with JudgeServer(lambda asked: Reply("Yes")) as server:
        assert all(math.isnan(x) for x in scores(made(server, "yes_no"), pictures(2)))


@pytest.mark.parametrize(("template", "value"), [("soft_tifa", math.sqrt(0.9 * 0.4)), ("soft_tifa_mean", 0.65)])
def test_soft_tifa_is_the_mean_over_a_prompts_atoms(template: str, value: float) -> None:
    def decide(asked: Asked) -> Reply:
        return Reply("x", "length", {"Yes": 0.7, "yes": 0.2} if "cat" in asked.text else {"2": 0.3, "two": 0.1})

    with JudgeServer(decide) as server:
        reward = made(server, template)
        assert scores(reward, pictures(2), {"atoms": ATOMS}) == pytest.approx([value] * 2)
        assert len(server.asked) == 4
        for atoms in (None, [], [{"question": "?"}], [{"question": "?", "answer": "a b"}]):
            with pytest.raises(ValueError, match=r"atoms|vqa_list"):
                reward.check_prompts(["a cat"], [{"atoms": atoms}])


def test_an_atom_without_an_answer_fails_the_picture() -> None:
    with JudgeServer(lambda asked: Reply("x", "length", {"Yes": 0.9} if "cat" in asked.text else {})) as server:
        assert math.isnan(scores(made(server, "soft_tifa"), pictures(), {"atoms": ATOMS})[0])


# -------------------------------------------------------------------------------------------------------------- faults
FAULTS = {
    "429": Reply(status=429, headers={"Retry-After": "0"}, raw=b"{}"),
    "500": Reply(status=500, raw=b"oops"),
    "400": Reply(status=400, raw=b'{"error": {"message": "too long"}}'),
    "hang": Reply("Final Score: 4", delay=60),
    "drip": Reply("Final Score: 4", drip=0.3),
    "reset": Reply("Final Score: 4", cut=20),
    "no json": Reply(raw=b'{"choices": [{"message": {"content": "Final Sc'),
    "empty": Reply(raw=b""),
    "other json": Reply(raw=b'{"choices": []}'),
    "null": Reply(None),
    "length": Reply("Final Score: 4", finish="length"),
    "filter": Reply("Final Score: 4", finish="content_filter"),
    "babble": Reply("A lovely picture."),
    "range": Reply("Final Score: 11"),
    "large": Reply(raw=b" " * (5 << 20)),
    "deep": Reply(raw=b"[" * 100_000),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_a_failed_score_and_the_others_stand(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    def decide(asked: Asked) -> Reply:
        return FAULTS[fault] if asked.pictures[0][0, 0, 0] == 10 else by_grey(asked)

    with JudgeServer(decide) as server, caplog.at_level(logging.WARNING, "tempflow"):
        found = scores(made(server, timeout=2.0 if fault in ("hang", "drip") else 60.0), pictures(3))
    assert found[0::2] == pytest.approx([0.2, 0.6]) and math.isnan(found[1])
    assert "1 of 3 questions to judge failed" in caplog.text


def test_what_passes_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [FAULTS["429"], FAULTS["500"], Reply(status=408, raw=b"{}")]
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    with JudgeServer(lambda asked: faults[asked.number] if asked.number < 3 else GOOD) as server:
        assert scores(made(server, retries=3), pictures()) == pytest.approx([0.8])
    assert len(server.asked) == 4


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_will_not_mend_ends_the_run(status: int) -> None:
    with JudgeServer(lambda asked: Reply(status=status, raw=b"{}")) as server, pytest.raises(RewardError) as told:
        score_all([made(server)], pictures(2), ["a"] * 2, [{}] * 2, [0, 1])
    assert str(status) in str(told.value) and "\n" not in str(told.value)


def test_the_endpoint_is_checked_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with JudgeServer(lambda asked: GOOD, models=["judge-7b"], key="secret") as server:
        with pytest.raises(RewardError, match=r"401; \$TEMPFLOW_JUDGE_KEY is not set"):
            made(server).prepare()
        monkeypatch.setenv("TEMPFLOW_JUDGE_KEY", "wrong-key")
        with pytest.raises(RewardError, match="holds a key that it refuses") as told:
            made(server).prepare()
        assert "wrong-key" not in str(told.value)
        monkeypatch.setenv("TEMPFLOW_JUDGE_KEY", "secret")
        with pytest.raises(RewardError, match=r"'judge' is not at .*nearest valid: 'judge-7b'"):
            made(server).prepare()
    with pytest.raises(RewardError, match="cannot be reached"):
        made(server).prepare()
    with JudgeServer(lambda asked: GOOD, models=None) as silent:
        made(silent).prepare()  # an endpoint need not list its models


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"url": "127.0.0.1:8000"}, "url"),
        ({"url": "http://me:word@host/v1"}, "password"),
        ({"key_env": "sk-abc"}, "key_env"),
        ({"model": " "}, "model"),
        ({"template": "unified_3"}, "nearest valid: 'unified_"),
        ({"template": "unified_1_pairs"}, "judge_pairs"),
        ({"template": "../x"}, "template"),
    ],
)
def test_options_are_checked_before_anything_is_asked(options: dict[str, str], told: str) -> None:
    given = {"url": "http://127.0.0.1:9/v1", "model": "judge", "template": "unified_1", **options}
    with pytest.raises(ValueError, match=told) as error:
        judge(**given)
    assert "word" not in str(error.value) or "password" in told
    assert "sk-abc" not in str(error.value) and ":word" not in str(error.value)
    if told == "judge_pairs":
        with pytest.raises(ValueError, match="as judge does"):
            judge_pairs(**{**given, "template": "unified_1"})


@pytest.mark.parametrize("by_tokens", [True, False])
def test_broken_responses_are_refused(by_tokens: bool) -> None:
    """Every cut and many swaps of a good body: an answer or Unreadable, nothing else."""
    top = [{"token": "Yes", "logprob": -0.1}]
    choice = {"message": {"content": "Final Score: 4"}, "finish_reason": "stop", "logprobs": {"content": [
        {"token": "Yes", "logprob": -0.1, "top_logprobs": top}]}}  # fmt: skip
    good = json.dumps({"choices": [choice]})
    assert answer_of(good.encode(), by_tokens).text == "Final Score: 4"
    cases = [good[:n] for n in range(len(good))]
    for part in ("-0.1", '"Yes"', "[", '"stop"', '"Final Score: 4"', '{"content"', '"logprobs"'):
        cases += [good.replace(part, new) for new in ("null", "NaN", "1e999", "[]", "{}", "9", '"\\ud800"', "true")]
    for case in cases:
        with contextlib.suppress(Unreadable):
            assert all(0 <= p <= 1 for p in answer_of(case.encode(), by_tokens).top.values())


# --------------------------------------------------------------------------------------------------------------- cache
def test_answers_are_kept_by_what_they_depend_on(tmp_path: Path) -> None:
    with JudgeServer(by_grey) as server:
        keep: dict[str, object] = {"cache": str(tmp_path / "kept")}
        newer = tmp_path / "newer.toml"  # the same words
        newer.write_text((FOLDER / "unified_1.toml").read_text().replace("version = 1", "version = 2"))
        own, other = "unified_1", str(newer)
        for asked, template, options in (
            (2, own, {}),
            (2, own, {}),
            (4, own, {"seed": 1}),
            (6, own, {"max_tokens": 9}),
            (8, other, {}),
        ):
            assert scores(made(server, template, **keep, **options), pictures(2)) == pytest.approx([0.2, 0.4])
            assert len(server.asked) == asked
        made(server, **keep).score(Media.of(pictures(2)), ["a dog"] * 2, [{}] * 2)
        assert len(server.asked) == 10


def test_a_failure_is_not_kept_and_a_broken_file_is_asked_anew(tmp_path: Path) -> None:
    replies = [FAULTS["length"], FAULTS["babble"], GOOD, Reply("Final Score: 2")]
    with JudgeServer(lambda asked: replies[asked.number]) as server:
        reward = made(server, cache=str(tmp_path))
        assert all(math.isnan(scores(reward, pictures())[0]) for _ in range(2)) and not [*tmp_path.rglob("*.json")]
        assert scores(reward, pictures()) == scores(reward, pictures()) == pytest.approx([0.8])
        (file,) = tmp_path.rglob("*.json")
        file.write_text('{"text": "Final Sc')
        assert scores(reward, pictures()) == pytest.approx([0.4])


def test_writers_of_the_same_answers_do_not_meet(tmp_path: Path) -> None:
    with JudgeServer(by_grey) as server:
        found: list[list[float]] = []

        def work() -> None:
            found.append(scores(made(server, cache=str(tmp_path)), pictures(5)))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 6 and all(f == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) for f in found)
    assert len([*tmp_path.rglob("*")]) - len([*tmp_path.iterdir()]) == 5  # and nothing half written


def test_a_disk_that_refuses_costs_no_score(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with JudgeServer(by_grey) as server:
        assert scores(made(server, cache=str(tmp_path / "file")), pictures(2)) == pytest.approx([0.2, 0.4])


def test_a_png_is_the_picture() -> None:
    from tempflow.rewards.endpoint import png

    picture = torch.randint(0, 256, (9, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(picture)))), picture.numpy())
