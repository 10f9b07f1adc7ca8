"""Where markers, what joins them, and their labels go."""

from __future__ import annotations

import math
import random

import pytest

from tempflow.report.scatter import FONT, LETTER, Mark, Point, Scatter, scatter


def drawn(points: list[Point], whole: bool = False) -> Scatter:
    figure = scatter("score", points, "steps", whole=whole)
    assert figure is not None
    return figure


def box(mark: Mark) -> tuple[float, float, float, float]:
    wide = LETTER * len(mark.label)
    left = mark.label_x - {"start": 0, "middle": wide / 2, "end": wide}[mark.anchor]
    return left, mark.label_y - FONT, left + wide, mark.label_y


def test_markers_go_where_their_values_say() -> None:
    points = [Point(x, y, "a", 1, f"{x}", low=y - 0.1, high=y + 0.1) for x, y in ((2, 0.2), (4, 0.5), (8, 0.4))]
    figure = drawn(points, whole=True)
    first, second, third = figure.marks
    assert second.x - first.x == pytest.approx(third.x - second.x, abs=0.02)  # doublings are alike
    assert [(t.label, t.at) for t in figure.x_ticks] == [("2", first.x), ("4", second.x), ("8", third.x)]
    assert second.y < third.y < first.y and first.low is not None and first.high is not None
    assert first.low - first.y == pytest.approx(first.y - first.high, abs=0.02)
    (line,) = figure.lines
    assert line.corners == [(mark.x, mark.y) for mark in figure.marks] and not line.hollow
    assert figure.told == "score over steps. 2; 4; 8"
    assert scatter("score", [], "steps") is None


def test_markers_of_one_number_stand_side_by_side_in_order_and_no_others_do() -> None:
    points = [Point(4, y, str(y), 0, "") for y in (0.5, 0.1, 0.3)] + [Point(8, 0.2, "b", 0, "")]
    figure = drawn(points, whole=True)
    high, low, middle, other = figure.marks
    at = {tick.label: tick.at for tick in figure.x_ticks}
    assert low.x < middle.x == at["4"] < high.x < other.x == at["8"] and high.x - middle.x >= 10
    assert [mark.x for mark in drawn(points[:3]).marks] == [drawn(points[:3]).marks[0].x] * 3  # diversity is not moved


def test_labels_stand_apart_inside_and_off_the_markers() -> None:
    dice = random.Random(0)
    crowd = [Point(dice.random(), dice.random() * 0.3, str(i), i, "", f"a method {i}") for i in range(14)]
    figure = drawn(crowd)
    boxes = [box(mark) for mark in figure.marks]
    spots = [(mark.x - 4, mark.y - 4, mark.x + 4, mark.y + 4) for mark in figure.marks]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert figure.left <= left and right <= figure.right and top > 0 and bottom <= figure.bottom
        for other in boxes[:i] + spots:
            assert not (left < other[2] and other[0] < right and top < other[3] and other[1] < bottom)


def test_ticks_do_not_run_into_one_another() -> None:
    figure = drawn([Point(x, 0.0, str(x), 0, "") for x in (1, 2, 48, 49, 50)], whole=True)
    assert [tick.label for tick in figure.x_ticks] == ["1", "2", "48"]


@pytest.mark.parametrize("whole", [False, True])
def test_one_marker_and_equal_values_are_drawn(whole: bool) -> None:
    for count in (1, 3):
        figure = drawn([Point(4, 0.5, "a", 0, "", "alone")] * count, whole)
        assert all(figure.left < mark.x < figure.right and mark.y < figure.bottom for mark in figure.marks)
        assert all(math.isfinite(mark.label_x + mark.label_y) for mark in figure.marks)
