from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempflow.data.prompts import load_prompts
from tempflow.data.sampler import prompts_for, strata_of
from tempflow.request import Prompt


def plain(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}") for i in range(n)]


def stream(iterations: int, *args, **kwargs) -> list[list[int]]:
    return [prompts_for(i, *args, **kwargs) for i in range(iterations)]


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 30), count=st.integers(1, 40), seed=st.integers(-3, 3))
def test_every_prompt_once_a_pass_and_no_repeats_in_an_iteration(n, count, seed):
    drawn = stream(-(-4 * n // count), plain(n), count, seed)
    flat = [i for part in drawn for i in part]
    for first in range(0, len(flat) - n + 1, n):
        assert sorted(flat[first : first + n]) == list(range(n))
    assert all(len(part) == count for part in drawn)
    if count <= n:
        assert all(len(set(part)) == count for part in drawn)


@settings(deadline=None, max_examples=30)
@given(
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=25), count=st.integers(1, 12), seed=st.integers(0, 5)
)
def test_strata_take_turns_and_each_has_its_own_passes(labels, count, seed):
    flat = [i for part in stream(20, plain(len(labels)), count, seed, strata=labels) for i in part]
    order = list(dict.fromkeys(labels))
    assert [labels[i] for i in flat] == [order[p % len(order)] for p in range(len(flat))]
    for label in order:
        own = [i for i, has in enumerate(labels) if has == label]
        taken = [i for i in flat if labels[i] == label]
        for first in range(0, len(taken) - len(own) + 1, len(own)):
            assert sorted(taken[first : first + len(own)]) == own


def test_no_repeat_within_an_iteration_and_stratum_while_it_has_enough_prompts():
    labels = ["a"] * 7 + ["b"] * 9
    for part in stream(60, plain(16), 8, 3, strata=labels):
        assert len(set(part)) == 8


def test_a_pure_function_of_iteration_and_seed():
    prompts = plain(17)
    assert prompts_for(5, prompts, 6, 1) == prompts_for(5, prompts, 6, 1)
    assert stream(6, prompts, 6, 1) != stream(6, prompts, 6, 2)
    # which texts they are plays no part
    assert prompts_for(5, prompts, 6, 1) == prompts_for(5, [Prompt("x")] * 17, 6, 1)


def test_passes_are_shuffled_anew():
    flat = [i for part in stream(40, plain(50), 10, 0) for i in part]
    passes = [tuple(flat[i : i + 50]) for i in range(0, 400, 50)]
    assert len(set(passes)) == 8
    first = Counter(p[0] for p in passes)
    assert max(first.values()) <= 3


def test_shapes_prompts_are_balanced_by_kind():
    prompts = load_prompts("shapes:train")
    kinds = strata_of(prompts)
    assert kinds is not None and len(set(kinds)) == 6
    for part in stream(5, prompts, 12, 0):
        assert set(Counter(kinds[i] for i in part).values()) == {2}
    assert strata_of([Prompt("a", {"tag": "x"}), Prompt("b", {"kind": "y", "tag": "z"})]) == [
        "x",
        "y",
    ]  # as GenEval has it
    mixed = [*prompts[:5], Prompt("no kind")]
    assert strata_of(mixed) is None
    assert sorted(prompts_for(0, mixed, 6, 0)) == list(range(6))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((0, [], 1, 0), "prompts: none given"),
        ((0, plain(2), 0, 0), "count: 0 must be at least 1; nearest valid: 1"),
        ((-1, plain(2), 1, 0), "iteration: -1 must be at least 0; nearest valid: 0"),
        ((0, plain(2), 1, 0, ["a"]), "strata: 1 labels for 2 prompts; nearest valid: 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError) as caught:
        prompts_for(*arguments)
    assert message in str(caught.value)
