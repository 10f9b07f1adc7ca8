"""Algorithms: one file per paper, with a function by the file's name: hyper-parameters in, an `Algorithm` out.

A new file is a new algorithm: here and on the command line. Each is imported when it is first used. `base.texts_of`
lends it the texts of arguments that others have too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

from tempflow.algorithms.base import Algorithm
from tempflow.names import nearest
from tempflow.registry import Namesakes, Registry, entry_points

if TYPE_CHECKING:  # for type checkers, which would take a name for its file; nothing that runs needs it
    from tempflow.algorithms.advantage_flow import advantage_flow as advantage_flow
    from tempflow.algorithms.awm import awm as awm
    from tempflow.algorithms.branch_grpo import branch_grpo as branch_grpo
    from tempflow.algorithms.cispo import cispo as cispo
    from tempflow.algorithms.crd import crd as crd
    from tempflow.algorithms.dance_grpo import dance_grpo as dance_grpo
    from tempflow.algorithms.dapo import dapo as dapo
    from tempflow.algorithms.ddpo import ddpo as ddpo
    from tempflow.algorithms.dgpo import dgpo as dgpo
    from tempflow.algorithms.diffusion_dpo import diffusion_dpo as diffusion_dpo
    from tempflow.algorithms.diffusion_nft import diffusion_nft as diffusion_nft
    from tempflow.algorithms.dmd2 import dmd2 as dmd2
    from tempflow.algorithms.dp_dmd import dp_dmd as dp_dmd
    from tempflow.algorithms.dr_grpo import dr_grpo as dr_grpo
    from tempflow.algorithms.draft import draft as draft
    from tempflow.algorithms.drm_grpo import drm_grpo as drm_grpo
    from tempflow.algorithms.dynamic_treerpo import dynamic_treerpo as dynamic_treerpo
    from tempflow.algorithms.e2po import e2po as e2po
    from tempflow.algorithms.elbo_pg import elbo_pg as elbo_pg
    from tempflow.algorithms.flash_grpo import flash_grpo as flash_grpo
    from tempflow.algorithms.flow_cps import flow_cps as flow_cps
    from tempflow.algorithms.flow_dppo import flow_dppo as flow_dppo
    from tempflow.algorithms.flow_grpo import flow_grpo as flow_grpo
    from tempflow.algorithms.flow_grpo_fast import flow_grpo_fast as flow_grpo_fast
    from tempflow.algorithms.gcpo import gcpo as gcpo
    from tempflow.algorithms.gdmd import gdmd as gdmd
    from tempflow.algorithms.grpo_guard import grpo_guard as grpo_guard
    from tempflow.algorithms.gspo import gspo as gspo
    from tempflow.algorithms.mix_grpo import mix_grpo as mix_grpo
    from tempflow.algorithms.mix_grpo_flash import mix_grpo_flash as mix_grpo_flash
    from tempflow.algorithms.online_dpo import online_dpo as online_dpo
    from tempflow.algorithms.opd import opd as opd
    from tempflow.algorithms.otca import otca as otca
    from tempflow.algorithms.perceptual_entropy import perceptual_entropy as perceptual_entropy
    from tempflow.algorithms.pref_grpo import pref_grpo as pref_grpo
    from tempflow.algorithms.rats import rats as rats
    from tempflow.algorithms.refl import refl as refl
    from tempflow.algorithms.reinforce_pp import reinforce_pp as reinforce_pp
    from tempflow.algorithms.rejection_sft import rejection_sft as rejection_sft
    from tempflow.algorithms.rloo import rloo as rloo
    from tempflow.algorithms.rtdmd import rtdmd as rtdmd
    from tempflow.algorithms.sapo import sapo as sapo
    from tempflow.algorithms.segment_matching import segment_matching as segment_matching
    from tempflow.algorithms.sft import sft as sft
    from tempflow.algorithms.slas import slas as slas
    from tempflow.algorithms.sol_rl import sol_rl as sol_rl
    from tempflow.algorithms.srpo import srpo as srpo
    from tempflow.algorithms.tempflow_grpo import tempflow_grpo as tempflow_grpo
    from tempflow.algorithms.udm_grpo import udm_grpo as udm_grpo
    from tempflow.algorithms.v_grpo import v_grpo as v_grpo
    from tempflow.algorithms.vipo import vipo as vipo

ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = Registry(__name__, besides=("base", "lesson", "phase"))
"""Name → function, of all that ship with the package."""

ENTRY_POINTS = "tempflow.algorithms"
"""The entry point group by which other packages add algorithms."""

__all__ = ["ALGORITHMS", "ENTRY_POINTS", "Algorithm", "find", "plugin"]


def plugin(name: str) -> EntryPoint | None:
    """The installed package's entry point for the algorithm of that name; None where it is ours, or unknown."""
    found = entry_points(group=ENTRY_POINTS)
    return found[name] if name not in ALGORITHMS and name in found.names else None


def find(name: str) -> Callable[..., Algorithm]:
    """The algorithm of that name: ours, or an installed package's by the entry point group "tempflow.algorithms".

    It imports the file of that name and no other. Raises ValueError naming the nearest known name.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    entry = plugin(name)
    if entry is not None:
        return entry.load()
    meant = nearest(name, [*ALGORITHMS, *entry_points(group=ENTRY_POINTS).names])
    raise ValueError(f"name: {name[:80]!r} is no known algorithm; nearest valid: {meant}")


def __getattr__(name: str) -> Callable[..., Algorithm]:
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *ALGORITHMS})


sys.modules[__name__].__class__ = Namesakes
