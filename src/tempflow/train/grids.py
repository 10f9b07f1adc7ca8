"""Which σ grid a run walks, and its model with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tempflow.algorithms.base import Algorithm
from tempflow.config import Config, load_config
from tempflow.grid import OWN, SCHEDULER, Grid, grid_in
from tempflow.models import adapter_of, local_folder
from tempflow.models.family import check_grid
from tempflow.models.pipeline_folder import settings_in
from tempflow.models.protocol import Model, WalksGrids


def grid_of(config: Config) -> Grid:
    """The grid that a run walks: the one that it states, else that of the weights that it starts from, else that of its
    model's folder. Raises ValueError for a folder's that cannot be read, and for starts on several grids."""
    m = config.model
    if m.grid != OWN:
        return Grid(m.grid)
    grids = [_grid_at(Path(place).expanduser()) for place in m.starts]
    for place, grid in zip(m.starts, grids, strict=True):
        if grid != grids[0]:
            raise ValueError(
                f"model.grid: {OWN}, and {m.starts[0]!r} walks {grids[0] or SCHEDULER}, {place!r} {grid or SCHEDULER}; "
                "nearest valid: one that is stated"
            )
    return (grids[0] if grids else None) or grid_in(local_folder(m.path, m.revision)) or Grid()


def _grid_at(start: Path) -> Grid | None:
    """What a run walks, or the weights in a folder carry; None for neither."""
    if (start / "config.yaml").is_file():
        return grid_of(load_config(start / "config.yaml"))
    return grid_in(start)


def with_grid(config: Config, algorithm: Algorithm, model: Model | None = None) -> Config:
    """With the grid that "own" means where the weights carry one, so that the run's records name it and it is resumed
    on it. `model`: one given as an object. Raises ValueError, naming the field, for a grid that the model cannot walk,
    or not in as many steps as are asked for."""
    m, steps = config.model, config.grid_steps(algorithm)
    if model is not None:
        own = model.stated_grid() if isinstance(model, WalksGrids) else Grid()
        grid = own if m.grid == OWN else Grid(m.grid)
        _check_walks(isinstance(model, WalksGrids), grid, model.name)
        for field, count in steps.items():
            grid.check_steps(field, count)
        return config
    grid, folder = grid_of(config), local_folder(m.path, m.revision)
    adapter = adapter_of(m.path, folder)
    _check_walks(issubclass(adapter, WalksGrids), grid, m.path)
    with config.naming("model"):
        check_grid(adapter.family, m.path, partial(settings_in, folder), grid, steps)
    return config if m.grid != OWN or grid.how == SCHEDULER else config.with_model(grid=grid.how)


def on_grid(config: Config, model: Model, loaded: bool = False) -> Model:
    """The model, on the grid that the run states; what is saved carries that. `loaded`: it is the configuration's,
    so that "own" is what the weights carry that the run starts from. Raises ValueError as `with_grid` does."""
    if config.model.grid == OWN and not loaded:
        return model
    grid, steps = grid_of(config), config.evaluation.steps
    _check_walks(isinstance(model, WalksGrids), grid, model.name)
    grid.check_steps("evaluation.steps", steps)
    if isinstance(model, WalksGrids):
        with config.naming("model"):
            model.state_grid(Grid(grid.how, None if grid.how == SCHEDULER else steps))
    return model


def _check_walks(walks: bool, grid: Grid, model: str) -> None:
    if not walks and grid.how != SCHEDULER:
        raise ValueError(f"model.grid: {grid}, and {model[:60]!r} has a grid of its own; nearest valid: {OWN!r}")
