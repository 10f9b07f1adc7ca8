"""Two pipeline folders: `tiny` (as SD 3.5, random) and `shapes` (as shipped, or untrained), and adapters for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from worlds import World, plain_pipeline

from tempflow import models
from tempflow.media import Size
from tempflow.models.quiet import quiet
from tempflow.models.sd3 import SD3
from tempflow.shapes import build


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    with quiet():
        tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped weights; before they are there, untrained ones."""
    shipped = models.shapes_folder()
    if (shipped / "model_index.json").is_file():
        return shipped
    folder = tmp_path_factory.mktemp("pipelines") / "shapes"
    with quiet():
        pipe = build.pipeline(seed=0)
        pipe.vae.register_to_config(scaling_factor=0.9, shift_factor=0.1)
        pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_world(tiny_folder: Path) -> World:
    return World(
        folder=tiny_folder,
        adapter=models.load(str(tiny_folder)),
        plain=plain_pipeline(tiny_folder),
        size=Size(64, 64),
        others=(Size(96, 32), Size(16, 80)),
        prompts=("a red cat on the house", "a small bird", "the dog under a tree"),
        tokens=16,
    )


@pytest.fixture(scope="session")
def shapes_world(shapes_folder: Path) -> World:
    return World(
        folder=shapes_folder,
        adapter=models.load(str(shapes_folder)),
        plain=plain_pipeline(shapes_folder),
        size=Size(32, 32),
        others=(Size(16, 40), Size(64, 64)),
        prompts=("a red circle", "two squares", "a circle left of a blue cross"),
        tokens=build.TOKENS,
    )


@pytest.fixture(params=["tiny", pytest.param("shapes", marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest) -> World:
    """Both; the fast tests keep to the tiny one, which has all that SD 3.5 has."""
    return request.getfixturevalue(f"{request.param}_world")


@pytest.fixture
def fresh(world: World) -> SD3:
    """An adapter that the test may change."""
    return models.load(str(world.folder))


@pytest.fixture
def rows_seen() -> Iterator[Callable[[SD3], list[int]]]:
    """Counts the rows of every call of a network, by a hook."""
    handles = []

    def watch(adapter: SD3) -> list[int]:
        seen: list[int] = []
        hook = lambda _, args, kwargs: seen.append(len(kwargs["hidden_states"]))  # noqa: E731
        handles.append(adapter.network.register_forward_pre_hook(hook, with_kwargs=True))
        return seen

    yield watch
    for handle in handles:
        handle.remove()
