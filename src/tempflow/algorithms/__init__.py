"""Algorithms: one file per paper, each a function of its hyper-parameters that returns an `Algorithm`."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.metadata import entry_points

from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.branch_grpo import branch_grpo
from tempflow.algorithms.cispo import cispo
from tempflow.algorithms.dance_grpo import dance_grpo
from tempflow.algorithms.dapo import dapo
from tempflow.algorithms.ddpo import ddpo
from tempflow.algorithms.dr_grpo import dr_grpo
from tempflow.algorithms.drm_grpo import drm_grpo
from tempflow.algorithms.dynamic_treerpo import dynamic_treerpo
from tempflow.algorithms.flash_grpo import flash_grpo
from tempflow.algorithms.flow_cps import flow_cps
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.flow_grpo_fast import flow_grpo_fast
from tempflow.algorithms.gcpo import gcpo
from tempflow.algorithms.grpo_guard import grpo_guard
from tempflow.algorithms.gspo import gspo
from tempflow.algorithms.mix_grpo import mix_grpo
from tempflow.algorithms.mix_grpo_flash import mix_grpo_flash
from tempflow.algorithms.otca import otca
from tempflow.algorithms.perceptual_entropy import perceptual_entropy
from tempflow.algorithms.pref_grpo import pref_grpo
from tempflow.algorithms.reinforce_pp import reinforce_pp
from tempflow.algorithms.rloo import rloo
from tempflow.algorithms.sapo import sapo
from tempflow.algorithms.slas import slas
from tempflow.algorithms.tempflow_grpo import tempflow_grpo
from tempflow.algorithms.vipo import vipo

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "branch_grpo": branch_grpo,
    "cispo": cispo,
    "dance_grpo": dance_grpo,
    "dapo": dapo,
    "ddpo": ddpo,
    "dr_grpo": dr_grpo,
    "drm_grpo": drm_grpo,
    "dynamic_treerpo": dynamic_treerpo,
    "flash_grpo": flash_grpo,
    "flow_cps": flow_cps,
    "flow_grpo": flow_grpo,
    "flow_grpo_fast": flow_grpo_fast,
    "gcpo": gcpo,
    "grpo_guard": grpo_guard,
    "gspo": gspo,
    "mix_grpo": mix_grpo,
    "mix_grpo_flash": mix_grpo_flash,
    "otca": otca,
    "perceptual_entropy": perceptual_entropy,
    "pref_grpo": pref_grpo,
    "reinforce_pp": reinforce_pp,
    "rloo": rloo,
    "sapo": sapo,
    "slas": slas,
    "tempflow_grpo": tempflow_grpo,
    "vipo": vipo,
}

ENTRY_POINTS = "tempflow.algorithms"

__all__ = [
    "ALGORITHMS",
    "ENTRY_POINTS",
    "Algorithm",
    "branch_grpo",
    "cispo",
    "dance_grpo",
    "dapo",
    "ddpo",
    "dr_grpo",
    "drm_grpo",
    "dynamic_treerpo",
    "find",
    "flash_grpo",
    "flow_cps",
    "flow_grpo",
    "flow_grpo_fast",
    "gcpo",
    "grpo_guard",
    "gspo",
    "mix_grpo",
    "mix_grpo_flash",
    "otca",
    "perceptual_entropy",
    "pref_grpo",
    "reinforce_pp",
    "rloo",
    "sapo",
    "slas",
    "tempflow_grpo",
    "vipo",
]


def find(name: str) -> Callable[..., Algorithm]:
    """The algorithm of that name: ours, or an installed package's by the entry point group "tempflow.algorithms".

    Raises ValueError naming the nearest known name.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    others = entry_points(group=ENTRY_POINTS)
    if name in others.names:
        return others[name].load()
    nearest = get_close_matches(name, [*ALGORITHMS, *others.names], n=1, cutoff=0.0)[0]
    raise ValueError(f"name: {name!r} is no known algorithm; nearest valid: {nearest!r}")
