"""Recipes: functions that return a `Config`, one file per base model; `tempflow train NAME` runs one."""

from __future__ import annotations

from collections.abc import Callable

from tempflow.config import Config
from tempflow.recipes.sd35 import sd35_medium_tempflow
from tempflow.recipes.shapes import demo, shapes_flow, shapes_lora, shapes_tempflow

RECIPES: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "shapes_tempflow": shapes_tempflow,
    "shapes_flow": shapes_flow,
    "shapes_lora": shapes_lora,
    "sd35_medium_tempflow": sd35_medium_tempflow,
}

__all__ = ["RECIPES", "demo", "sd35_medium_tempflow", "shapes_flow", "shapes_lora", "shapes_tempflow"]
