"""The trajectory family on the toy of tests/train: one small setting of every algorithm, and its variants."""

from __future__ import annotations

from collections.abc import Callable

from tempflow.algorithms import (
    branch_grpo,
    cispo,
    dance_grpo,
    dapo,
    ddpo,
    dr_grpo,
    drm_grpo,
    dynamic_treerpo,
    flash_grpo,
    flow_cps,
    flow_dppo,
    flow_grpo,
    flow_grpo_fast,
    gcpo,
    grpo_guard,
    gspo,
    mix_grpo,
    mix_grpo_flash,
    otca,
    perceptual_entropy,
    pref_grpo,
    reinforce_pp,
    rloo,
    sapo,
    slas,
    tempflow_grpo,
    vipo,
)
from tempflow.algorithms.base import Algorithm

Make = Callable[[int], Algorithm]

FAMILY: dict[str, Make] = {
    "flow_grpo": lambda t: flow_grpo(t, 6, clip=0.02, kl=0.1, std="group"),
    "flow_grpo_fast": lambda t: flow_grpo_fast(t, 6, min(2, t - 1), t - 1, clip=0.02),
    "flow_grpo_fast, one prefix": lambda t: flow_grpo_fast(t, 6, min(2, t - 1), t - 1, True, "sde", 0.7, clip=0.02),
    "flow_cps": lambda t: flow_cps(t, 6, clip=0.02),
    "flow_dppo": lambda t: flow_dppo(t, 6, min(2, t - 1), threshold=1e-3, kl=0.1, std="group"),
    "grpo_guard": lambda t: grpo_guard(t, 6, clip=0.01),
    "grpo_guard, dance": lambda t: grpo_guard(t, 6, "dance", 0.3, "equalised", clip=0.01),
    "tempflow_grpo": lambda t: tempflow_grpo(t, 2, 4, clip=0.02, kl=0.1),
    "tempflow_grpo, drawn steps": lambda t: tempflow_grpo(t, 2, 3, 1, clip=0.02, kl=0.0, std_group="batch"),
    "dance_grpo": lambda t: dance_grpo(t, 6, 0.7 if t > 2 else 1.0, clip=0.02),
    "mix_grpo": lambda t: mix_grpo(t, 6, min(2, t - 1), every=1, clip=0.02),
    "mix_grpo_flash": lambda t: mix_grpo_flash(t, 6, min(2, t - 1), every=1, clip=0.02, shift=2.0),
    # with three children, pictures of few grey levels have no group of equal means
    "branch_grpo": lambda t: branch_grpo(t, 1, (0, 1) if t > 2 else (0,), 3, 2.0, clip=0.05),
    "dynamic_treerpo": lambda t: dynamic_treerpo(t, 1, min(2, t - 1), 3, every=1, clip=0.02),
    "gcpo": lambda t: gcpo(t, 6, (1, t - 2) if t > 2 else (1,), share=1.0, clip=0.02),
    "gcpo, its other knobs": lambda t: gcpo(t, 6, (t - 1,) if t > 2 else (1,), share=1.0, clip=0.02, rollout_kl=0.1),
    "gcpo, adaptive": lambda t: gcpo(t, 6, None, 2, 1.0, clip=0.02),
    "flash_grpo": lambda t: flash_grpo(t, 6, clip=0.02),
    "otca": lambda t: otca(t, 6, clip=0.02),
    "vipo": lambda t: vipo(t, 6, clip=0.3),
    "vipo, region": lambda t: vipo(t, 6, ratio="region", clip=0.02),
    "pref_grpo": lambda t: pref_grpo(t, 6, None, clip=0.02),
    "slas": lambda t: slas(t, 6, None, clip=0.02),
    "perceptual_entropy": lambda t: perceptual_entropy(t, 6, clip=0.02),
    "perceptual_entropy, pcvae": lambda t: perceptual_entropy(t, 6, kind="pcvae", clip=0.02),
    "drm_grpo": lambda t: drm_grpo("judge", t, 2, 3, clip=0.02),
    "drm_grpo, from a candidate": lambda t: drm_grpo("judge", t, 2, 3, "candidate", clip=0.02),
    "ddpo": lambda t: ddpo(t, 6, clip=0.02),
    "ddpo, score function": lambda t: ddpo(t, 6, kind="sf"),
    "rloo": lambda t: rloo(t, 6, clip=0.02),
    "dr_grpo": lambda t: dr_grpo(t, 6, clip=0.02),
    "reinforce_pp": lambda t: reinforce_pp(t, 6, clip=0.02),
    "dapo": lambda t: dapo(t, 6, clip=0.02, clip_high=0.03),
    "gspo": lambda t: gspo(t, 6, clip=0.02),
    "cispo": lambda t: cispo(t, 6, clip=0.02),
    "sapo": lambda t: sapo(t, 6, temperature=50.0, temperature_negative=52.5),
}
"""By name, a function of T. Groups of six, or of three siblings."""
