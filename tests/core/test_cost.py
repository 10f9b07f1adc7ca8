"""Forward-equivalents by hand."""

from __future__ import annotations

import pytest

from tempflow.core.cost import equivalents


@pytest.mark.parametrize(
    "plain,trained,guided,latent,want",
    [
        (10, 0, False, 0, 10),
        (0, 10, False, 0, 30),  # a forward and a backward of two
        (10, 0, True, 0, 20),
        (0, 10, True, 0, 40),  # the empty prompt's row is plain
        (7, 5, True, 3, 14 + 20 + 3),  # a latent reward knows no guidance
    ],
)
def test_equivalents(plain: int, trained: int, guided: bool, latent: int, want: int) -> None:
    assert equivalents(plain, trained, guided=guided, latent=latent) == want
