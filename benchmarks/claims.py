"""Orderings and speeds that papers report, each in a pair of the leaderboard's entries.

Their figures are on other models, rewards and budgets (iterations or GPU-hours, not forwards), mostly known from
notes: they say what to look for on `shapes`, not what must come out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """`better` is said to beat `worse`.

    better, worse  names of entries
    told           how, with figures and where they are from
    """

    better: str
    worse: str
    told: str


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "tempflow_grpo",
        "flow_grpo_group",
        "TempFlow-GRPO: PickScore 24.26 against 23.60 at 1 000 steps; +1.0 % in a later text",
    ),
    Claim("tempflow_grpo", "flow_grpo_global", "TempFlow-GRPO: 24.26 against 22.87; equal in a tenth of the GPU-hours"),
    Claim("flow_grpo_group", "flow_grpo_global", "TempFlow-GRPO's figure: 23.60 against 22.87"),
    Claim("flow_grpo_fast", "flow_grpo_global", "Flow-GRPO's README: two trained steps learn as much an epoch"),
    Claim("grpo_guard", "flow_grpo_group", "GRPO-Guard: GenEval proxy .95 against .94, gold score .89 against .84"),
    Claim("mix_grpo", "dance_grpo", "MixGRPO: ImageReward 1.629 against 1.436, in half the time"),
    Claim("mix_grpo", "mix_grpo_flash", "MixGRPO: ImageReward 1.629 against Flash's 1.528, which takes three quarters"),
    Claim("branch_grpo", "dance_grpo", "BranchGRPO's README: HPS .363 against .360, pruned .369"),
    Claim("branch_grpo", "mix_grpo", "BranchGRPO's README: HPS .363 against .359"),
    Claim("dynamic_treerpo", "mix_grpo", "Dynamic-TreeRPO: HPS +4.9 % over the best before it, half the time"),
    Claim("gcpo", "dance_grpo", "GCPO: HPSv3 15.24 against 15.08"),
    Claim("gcpo", "flow_grpo_group", "GCPO: HPSv3 15.24 against 14.90"),
    Claim("gcpo", "mix_grpo", "GCPO: HPSv3 15.24 against 15.13"),
    Claim("flash_grpo", "flow_grpo_global", "Flash-GRPO: higher VBench scores at equal GPU-hours; 6 ×"),
    Claim("otca", "dance_grpo", "OTCA: consistent gains, with reversals in its own tables"),
    Claim("vipo", "dance_grpo", "ViPO: HPSv2.1 .332 against .320"),
    Claim("pref_grpo", "flow_grpo_group", "Pref-GRPO: UniGenBench 69.5 against 63.6 by scores instead of win rates"),
    Claim("slas", "dance_grpo", "SLAS: consistent gains; figures not seen"),
    Claim("perceptual_entropy", "flow_grpo_group", "Perceptual entropy: quality .842 against .685"),
    Claim("diffusion_nft", "flow_grpo_global", "DiffusionNFT: GenEval .98 in 1k steps, .95 in 5k; up to 25 ×"),
    Claim("awm", "flow_grpo_global", "AWM: as good up to 24 × sooner"),
    Claim("advantage_flow", "flow_grpo_global", "AdvantageFlow: better; figures not seen"),
    Claim("advantage_flow", "diffusion_nft", "AdvantageFlow: better than a negative-aware baseline; figures not seen"),
    Claim("v_grpo", "mix_grpo", "V-GRPO: mean score 1.42 at 150 iterations against 1.41 at 300; 2 ×"),
    Claim("v_grpo", "dance_grpo", "V-GRPO: HPSv2.1 .372 against .334"),
    Claim("v_grpo", "diffusion_nft", "V-GRPO: about its scores in 580 steps against 1 700; 3 ×"),
    Claim("elbo_epg", "flow_grpo_global", "Rethinking the design space: GenEval .95 in 90 GPU-h, 423; 4.7 ×"),
    Claim("elbo_epg", "diffusion_nft", "Rethinking the design space: in 90 GPU-h, 341; 3.8 ×"),
    Claim("sol_rl", "diffusion_nft", "Sol-RL: converges up to 4.64 × sooner in time"),
    Claim("e2po", "diffusion_nft", "E²PO: GenEval reward .932 against .922, more diverse"),
)
