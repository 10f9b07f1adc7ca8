"""Algorithms: one file per paper, each a function of its hyper-parameters that returns an `Algorithm`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from tempflow.algorithms.advantage_flow import advantage_flow
from tempflow.algorithms.awm import awm
from tempflow.algorithms.base import Algorithm
from tempflow.algorithms.branch_grpo import branch_grpo
from tempflow.algorithms.cispo import cispo
from tempflow.algorithms.crd import crd
from tempflow.algorithms.dance_grpo import dance_grpo
from tempflow.algorithms.dapo import dapo
from tempflow.algorithms.ddpo import ddpo
from tempflow.algorithms.dgpo import dgpo
from tempflow.algorithms.diffusion_dpo import diffusion_dpo
from tempflow.algorithms.diffusion_nft import diffusion_nft
from tempflow.algorithms.dr_grpo import dr_grpo
from tempflow.algorithms.drm_grpo import drm_grpo
from tempflow.algorithms.dynamic_treerpo import dynamic_treerpo
from tempflow.algorithms.e2po import e2po
from tempflow.algorithms.elbo_pg import elbo_pg
from tempflow.algorithms.flash_grpo import flash_grpo
from tempflow.algorithms.flow_cps import flow_cps
from tempflow.algorithms.flow_dppo import flow_dppo
from tempflow.algorithms.flow_grpo import flow_grpo
from tempflow.algorithms.flow_grpo_fast import flow_grpo_fast
from tempflow.algorithms.gcpo import gcpo
from tempflow.algorithms.grpo_guard import grpo_guard
from tempflow.algorithms.gspo import gspo
from tempflow.algorithms.mix_grpo import mix_grpo
from tempflow.algorithms.mix_grpo_flash import mix_grpo_flash
from tempflow.algorithms.online_dpo import online_dpo
from tempflow.algorithms.otca import otca
from tempflow.algorithms.perceptual_entropy import perceptual_entropy
from tempflow.algorithms.pref_grpo import pref_grpo
from tempflow.algorithms.reinforce_pp import reinforce_pp
from tempflow.algorithms.rejection_sft import rejection_sft
from tempflow.algorithms.rloo import rloo
from tempflow.algorithms.sapo import sapo
from tempflow.algorithms.sft import sft
from tempflow.algorithms.slas import slas
from tempflow.algorithms.sol_rl import sol_rl
from tempflow.algorithms.tempflow_grpo import tempflow_grpo
from tempflow.algorithms.v_grpo import v_grpo
from tempflow.algorithms.vipo import vipo
from tempflow.names import nearest

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "advantage_flow": advantage_flow,
    "awm": awm,
    "branch_grpo": branch_grpo,
    "cispo": cispo,
    "crd": crd,
    "dance_grpo": dance_grpo,
    "dapo": dapo,
    "ddpo": ddpo,
    "dgpo": dgpo,
    "diffusion_dpo": diffusion_dpo,
    "diffusion_nft": diffusion_nft,
    "dr_grpo": dr_grpo,
    "drm_grpo": drm_grpo,
    "dynamic_treerpo": dynamic_treerpo,
    "e2po": e2po,
    "elbo_pg": elbo_pg,
    "flash_grpo": flash_grpo,
    "flow_cps": flow_cps,
    "flow_dppo": flow_dppo,
    "flow_grpo": flow_grpo,
    "flow_grpo_fast": flow_grpo_fast,
    "gcpo": gcpo,
    "grpo_guard": grpo_guard,
    "gspo": gspo,
    "mix_grpo": mix_grpo,
    "mix_grpo_flash": mix_grpo_flash,
    "online_dpo": online_dpo,
    "otca": otca,
    "perceptual_entropy": perceptual_entropy,
    "pref_grpo": pref_grpo,
    "reinforce_pp": reinforce_pp,
    "rejection_sft": rejection_sft,
    "rloo": rloo,
    "sapo": sapo,
    "sft": sft,
    "slas": slas,
    "sol_rl": sol_rl,
    "tempflow_grpo": tempflow_grpo,
    "v_grpo": v_grpo,
    "vipo": vipo,
}

ENTRY_POINTS = "tempflow.algorithms"

__all__ = [
    "ALGORITHMS",
    "ENTRY_POINTS",
    "Algorithm",
    "advantage_flow",
    "awm",
    "branch_grpo",
    "cispo",
    "crd",
    "dance_grpo",
    "dapo",
    "ddpo",
    "dgpo",
    "diffusion_dpo",
    "diffusion_nft",
    "dr_grpo",
    "drm_grpo",
    "dynamic_treerpo",
    "e2po",
    "elbo_pg",
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
    "online_dpo",
    "otca",
    "perceptual_entropy",
    "pref_grpo",
    "reinforce_pp",
    "rejection_sft",
    "rloo",
    "sapo",
    "sft",
    "slas",
    "sol_rl",
    "tempflow_grpo",
    "v_grpo",
    "vipo",
]


def plugin(name: str) -> EntryPoint | None:
    """The installed package's entry point for the algorithm of that name; None where it is ours, or unknown."""
    found = entry_points(group=ENTRY_POINTS)
    return found[name] if name not in ALGORITHMS and name in found.names else None


def find(name: str) -> Callable[..., Algorithm]:
    """The algorithm of that name: ours, or an installed package's by the entry point group "tempflow.algorithms".

    Raises ValueError naming the nearest known name.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    entry = plugin(name)
    if entry is not None:
        return entry.load()
    meant = nearest(name, [*ALGORITHMS, *entry_points(group=ENTRY_POINTS).names])
    raise ValueError(f"name: {name[:80]!r} is no known algorithm; nearest valid: {meant}")
