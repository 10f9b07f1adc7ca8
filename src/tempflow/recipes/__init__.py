"""Recipes: functions that return a `Config`, or `Stages` of several; `tempflow train NAME` runs one."""

from __future__ import annotations

from collections.abc import Callable

from tempflow.algorithms import ALGORITHMS
from tempflow.config import Config, Stages
from tempflow.recipes.guided_students import (
    sd35_medium_gdmd,
    sd35_medium_rtdmd,
    sd35_medium_rtdmd_cold_start,
)
from tempflow.recipes.offline import shapes_diffusion_dpo, shapes_sft
from tempflow.recipes.reward_gradient import (
    sd35_medium_draft,
    sd35_medium_refl,
    sd35_medium_srpo,
    shapes_draft,
    shapes_refl,
    shapes_srpo,
)
from tempflow.recipes.sana import sana_sol_rl
from tempflow.recipes.sd35 import sd35_medium_tempflow
from tempflow.recipes.sd35_students import (
    sd35_medium_dmd2,
    sd35_medium_dp_dmd,
    sd35_medium_opd,
    sd35_medium_rats,
    sd35_medium_segment_matching,
)
from tempflow.recipes.shapes import demo, shapes_flow, shapes_lora, shapes_tempflow, shapes_tokens
from tempflow.recipes.shapes_students import (
    shapes_distilled,
    shapes_dmd2,
    shapes_dp_dmd,
    shapes_gdmd,
    shapes_opd,
    shapes_rats,
    shapes_rtdmd,
    shapes_student,
)
from tempflow.recipes.stable_diffusion import sd15_ddpo, sdxl_ddpo
from tempflow.recipes.text_to_image import (
    flux1_dev_flow_grpo,
    flux2_dev_flow_grpo,
    flux2_klein_flow_grpo,
    qwen_image_flow_grpo,
    z_image_flow_grpo,
)
from tempflow.recipes.unpublished import cogview4_flow_grpo, lumina2_flow_grpo
from tempflow.recipes.zoo import ENTRIES, Entry, recipe


def _named(entry: Entry) -> Callable[[], Config]:
    def build() -> Config:
        return recipe(entry)

    build.__name__ = f"leaderboard_{entry.name}"
    build.__doc__ = ALGORITHMS[entry.algorithm["name"]].__doc__  # its first line says what it is
    return build


RECIPES: dict[str, Callable[[], Config | Stages]] = {
    "demo": demo,
    "shapes_tempflow": shapes_tempflow,
    "shapes_flow": shapes_flow,
    "shapes_lora": shapes_lora,
    "shapes_tokens": shapes_tokens,
    "shapes_distilled": shapes_distilled,
    "shapes_student": shapes_student,
    "shapes_dmd2": shapes_dmd2,
    "shapes_dp_dmd": shapes_dp_dmd,
    "shapes_gdmd": shapes_gdmd,
    "shapes_opd": shapes_opd,
    "shapes_rats": shapes_rats,
    "shapes_rtdmd": shapes_rtdmd,
    "sd35_medium_tempflow": sd35_medium_tempflow,
    "sd35_medium_segment_matching": sd35_medium_segment_matching,
    "sd35_medium_dmd2": sd35_medium_dmd2,
    "sd35_medium_dp_dmd": sd35_medium_dp_dmd,
    "sd35_medium_opd": sd35_medium_opd,
    "sd35_medium_rats": sd35_medium_rats,
    "shapes_refl": shapes_refl,
    "shapes_draft": shapes_draft,
    "shapes_srpo": shapes_srpo,
    "sd35_medium_refl": sd35_medium_refl,
    "sd35_medium_draft": sd35_medium_draft,
    "sd35_medium_srpo": sd35_medium_srpo,
    "flux1_dev_flow_grpo": flux1_dev_flow_grpo,
    "qwen_image_flow_grpo": qwen_image_flow_grpo,
    "z_image_flow_grpo": z_image_flow_grpo,
    "sana_sol_rl": sana_sol_rl,
    "cogview4_flow_grpo": cogview4_flow_grpo,
    "lumina2_flow_grpo": lumina2_flow_grpo,
    "sd15_ddpo": sd15_ddpo,
    "sdxl_ddpo": sdxl_ddpo,
    "flux2_dev_flow_grpo": flux2_dev_flow_grpo,
    "flux2_klein_flow_grpo": flux2_klein_flow_grpo,
    **{f"leaderboard_{entry.name}": _named(entry) for entry in ENTRIES},
    "shapes_diffusion_dpo": shapes_diffusion_dpo,
    "shapes_sft": shapes_sft,
    "sd35_medium_gdmd": sd35_medium_gdmd,
    "sd35_medium_rtdmd_cold_start": sd35_medium_rtdmd_cold_start,
    "sd35_medium_rtdmd": sd35_medium_rtdmd,
}

__all__ = [
    "RECIPES",
    "cogview4_flow_grpo",
    "demo",
    "flux1_dev_flow_grpo",
    "flux2_dev_flow_grpo",
    "flux2_klein_flow_grpo",
    "lumina2_flow_grpo",
    "qwen_image_flow_grpo",
    "sana_sol_rl",
    "sd15_ddpo",
    "sd35_medium_dmd2",
    "sd35_medium_dp_dmd",
    "sd35_medium_draft",
    "sd35_medium_gdmd",
    "sd35_medium_opd",
    "sd35_medium_rats",
    "sd35_medium_refl",
    "sd35_medium_rtdmd",
    "sd35_medium_rtdmd_cold_start",
    "sd35_medium_segment_matching",
    "sd35_medium_srpo",
    "sd35_medium_tempflow",
    "sdxl_ddpo",
    "shapes_diffusion_dpo",
    "shapes_distilled",
    "shapes_dmd2",
    "shapes_dp_dmd",
    "shapes_draft",
    "shapes_flow",
    "shapes_gdmd",
    "shapes_lora",
    "shapes_opd",
    "shapes_rats",
    "shapes_refl",
    "shapes_rtdmd",
    "shapes_sft",
    "shapes_srpo",
    "shapes_student",
    "shapes_tempflow",
    "z_image_flow_grpo",
]
