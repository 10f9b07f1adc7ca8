"""The cases: every algorithm, every option of its choices, every form of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

COMMON: dict[str, Any] = {"steps": 4, "group": 4}
"""Fields of a case whose algorithm has them, unless it says otherwise."""


@dataclass(frozen=True)
class Case:
    """One run.

    algorithm  its registered name
    fields     arguments of its function
    reward     "worth"; "patchy", where some scores fail and one prompt has no spread; "both" of two rewards;
               "light", with gradients
    guidance   of rollout and training
    offline    whether the prompts name pictures
    tokens     whether states are tokens
    optimizer  the configuration's `optimizer`, where it is to be a user's own AdamW
    objective  fields of the loss that the algorithm has no argument for; "regularizers.0.space" is one of a part's
    """

    algorithm: str
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    reward: Literal["worth", "patchy", "both", "light"] = "worth"
    guidance: float = 1.0
    offline: bool = False
    tokens: bool = False
    optimizer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    objective: Mapping[str, Any] = field(default_factory=dict[str, Any])


ADAMW = {"learning_rate": 0.02, "weight_decay": 0.01, "max_grad_norm": 0.1, "ema_decay": 0.5, "warmup_iterations": 1}
KL_FORMS = ("exact", "velocity", "k1", "k2", "k3")


def _case(algorithm: str, **fields: Any) -> Case:
    return Case(algorithm, fields)


CASES: dict[str, Case] = {
    # ---------------------------------------------------------------------------------------- trajectories: Flow-GRPO
    "flow_grpo": _case("flow_grpo", clip=0.002, kl=0.1),
    "flow_grpo, plain AdamW": Case("flow_grpo", {"clip": 0.002, "kl": 0.1}, optimizer=ADAMW),
    "flow_grpo, guidance": Case("flow_grpo", {"clip": 0.002, "kl": 0.1}, guidance=1.5),
    "flow_grpo, failed scores": Case("flow_grpo", {"clip": 0.002, "kl": 0.1}, reward="patchy"),
    "flow_grpo, two rewards": Case("flow_grpo", {"clip": 0.002, "kl": 0.1}, reward="both"),
    "flow_grpo, its other knobs": _case(
        "flow_grpo", train_steps=2, clip=0.001, clip_high=0.003, std="group", advantage_clip=None
    ),
    **{f"flow_grpo, {form}": _case("flow_grpo", clip=0.002, kl=0.3, kl_form=form) for form in KL_FORMS},
    "flow_grpo_fast": _case("flow_grpo_fast", window=2, window_end=3, clip=0.002),
    "flow_grpo_fast, one prefix": _case(
        "flow_grpo_fast", window=2, shared_prefix=True, kind="sde", noise_level=0.7, clip=0.002, std="group", kl=0.1
    ),
    "flow_grpo_fast, density": _case("flow_grpo_fast", window=2, log_prob="density", clip=0.002),
    "flow_cps": _case("flow_cps", clip=0.002),
    "flow_cps, density": _case("flow_cps", log_prob="density", std="group", kl=0.1),
    "flow_dppo": _case("flow_dppo", noisy_steps=2, threshold=1e-3, kl=0.1),
    "flow_dppo, unscaled": _case("flow_dppo", noisy_steps=2, first_steps=3, threshold=1e-3, scaled=False, std="group"),
    "grpo_guard": _case("grpo_guard", clip=0.001),
    "grpo_guard, dance": _case(
        "grpo_guard",
        kind="dance",
        noise_level=0.3,
        weight="equalised",
        clip=0.001,
        std="global",
        clip_high=0.002,
        kl=0.1,
    ),
    "tempflow_grpo": _case("tempflow_grpo", seeds=2, branches=3, clip=0.002, kl=0.1),
    "tempflow_grpo, drawn steps": _case(
        "tempflow_grpo",
        seeds=2,
        branches=3,
        branch_steps=1,
        clip=0.002,
        clip_high=0.003,
        std_group="batch",
        weight="uniform",
    ),
    "tempflow_grpo, rectified": _case(
        "tempflow_grpo", seeds=2, branches=3, clip=0.002, kl=0.0, std_group="prompt", weight="rectified"
    ),
    # ------------------------------------------------------------------------------------------ trajectories: the rest
    "dance_grpo": _case("dance_grpo", clip=0.002),
    "dance_grpo, its other knobs": _case(
        "dance_grpo", fraction=1.0, keep=2, shared_noise=False, clip=0.002, kl=0.1, advantage_clip=None
    ),
    "mix_grpo": _case("mix_grpo", window=2, every=1, clip=0.002),
    "mix_grpo, random": Case(
        "mix_grpo",
        {
            "window": 2,
            "every": 1,
            "order": "random",
            "shared_noise": False,
            "clip": 0.002,
            "rewards": "gdpo",
            "kl": 0.1,
        },
        reward="both",
    ),
    "mix_grpo, decay": _case("mix_grpo", window=1, window_end=3, order="decay", every=1, roll_back=False, clip=0.002),
    "mix_grpo, exp decay": Case(
        "mix_grpo", {"window": 1, "order": "exp_decay", "every": 1, "clip": 0.002, "rewards": "scores"}, reward="both"
    ),
    "mix_grpo, two rewards": Case("mix_grpo", {"window": 2, "every": 1, "clip": 0.002}, reward="both"),
    "mix_grpo_flash": _case("mix_grpo_flash", window=2, every=1, clip=0.002),
    "mix_grpo_flash, first order": _case(
        "mix_grpo_flash", window=1, every=1, second_order=False, shift=2.0, compress=0.6, shared_noise=False, clip=0.002
    ),
    "branch_grpo": _case("branch_grpo", splits=(0, 1), branches=2, clip=0.005),
    "branch_grpo, softmax": _case(
        "branch_grpo",
        splits=(0, 1),
        branches=2,
        value="softmax",
        prune_steps=(1,),
        prune_every=1,
        prune_stop=0,
        width="branch",
        clip=0.005,
    ),
    "branch_grpo, leaves": _case(
        "branch_grpo", trees=2, splits=(1,), noisy_window=2, value="leaves", width="extremes", clip=0.005, kl=0.1
    ),
    "dynamic_treerpo": _case("dynamic_treerpo", depth=2, branches=2, every=1, clip=0.002, imitation=0.1),
    "dynamic_treerpo, random": _case(
        "dynamic_treerpo",
        trees=2,
        depth=1,
        order="random",
        every=1,
        roll_back=False,
        clip=0.002,
        sensitivity=0.0,
        kl=0.1,
    ),
    "gcpo": _case("gcpo", sizes=(1, 2), share=1.0, clip=0.002),
    "gcpo, its other knobs": _case(
        "gcpo",
        sizes=(2, 1),
        weighted=True,
        shared_noise=False,
        clip=0.002,
        clip_high=0.003,
        reweight=True,
        rollout_kl=0.2,
    ),
    "gcpo, adaptive": _case("gcpo", sizes=None, largest=2, share=1.0, clip=0.002, kl=0.1),
    "flash_grpo": _case("flash_grpo", clip=0.002),
    "flash_grpo, its other knobs": _case("flash_grpo", first_steps=2, clip=0.002, kl=0.1, std="group"),
    "otca": Case("otca", {"clip": 0.002}, reward="both"),
    "otca, flow": Case("otca", {"kind": "flow", "tcd": False, "moca": False, "clip": 0.002, "kl": 0.1}, reward="both"),
    "vipo": _case("vipo", clip=0.3),
    "vipo, region": _case(
        "vipo",
        kind="flow",
        ratio="region",
        orient="reverse",
        normalise="mean_one",
        train_fraction=1.0,
        clip=0.002,
        kl=0.1,
    ),
    "vipo, unoriented": _case("vipo", orient="none", clip=0.3),
    "pref_grpo": _case("pref_grpo", train_steps=None, clip=0.002),
    "pref_grpo, its other knobs": _case(
        "pref_grpo", train_steps=2, win_rate=False, rounding=None, ratio="step", shared_noise=False, clip=0.002, kl=0.1
    ),
    "slas": _case("slas", train_steps=None, clip=0.002),
    "slas, flow": _case("slas", train_steps=2, dynamics="flow", shared_noise=False, clip=0.002, kl=0.1),
    "perceptual_entropy": _case("perceptual_entropy", clip=0.002),
    "perceptual_entropy, pcvae": _case("perceptual_entropy", kind="pcvae", clip=0.002, std="group", kl=0.1),
    "drm_grpo": _case("drm_grpo", chains=2, candidates=3, clip=0.002),
    "drm_grpo, from a candidate": _case(
        "drm_grpo", chains=2, candidates=3, carry="candidate", dynamics="cps", clip=0.002, kl=0.1
    ),
    "ddpo": _case("ddpo", clip=0.002),
    "ddpo, score function": _case("ddpo", kind="sf", statistics="batch", skip_last=2, kl=0.1),
    "rloo": _case("rloo", clip=0.002),
    "rloo, score function": _case("rloo", clip=None, kl=0.0),
    "dr_grpo": _case("dr_grpo", clip=0.002),
    "dr_grpo, its other knobs": _case("dr_grpo", clip=0.002, clip_high=0.003, kl=0.1, advantage_clip=0.005),
    "reinforce_pp": _case("reinforce_pp", clip=0.002),
    "reinforce_pp, group": _case("reinforce_pp", clip=0.002, baseline="group", kl=0.0),
    "dapo": Case("dapo", {"clip": 0.002, "clip_high": 0.003}, reward="patchy"),
    "dapo, keep": Case("dapo", {"clip": 0.002, "clip_high": 0.003, "keep": 1, "kl": 0.1}, reward="patchy"),
    "gspo": _case("gspo", clip=0.002),
    "gspo, its other knobs": _case("gspo", train_steps=2, clip=0.002, clip_high=0.003, kl=0.1),
    "cispo": _case("cispo", clip=0.002),
    "cispo, its other knobs": _case("cispo", train_steps=2, clip=0.002, clip_low=0.001, kl=0.1),
    "sapo": _case("sapo", temperature=50.0, temperature_negative=52.5),
    "sapo, its other knobs": _case("sapo", train_steps=2, temperature=20.0, temperature_negative=60.0, kl=0.1),
    # ------------------------------------------------------------------------------------------------ forward process
    "diffusion_nft": _case("diffusion_nft", kl=0.1),
    **{
        f"diffusion_nft, {mode}": _case("diffusion_nft", mode=mode, lag=lag, mix_beta=0.1, std="group", solver=solver)
        for mode, lag, solver in (
            ("positive_only", "type0", "euler"),
            ("negative_only", "type2", "unipc2"),
            ("one_only", "type3", "dpm2"),
            ("binary", "type1", "dpm2"),
        )
    },
    "diffusion_nft, failed scores": Case("diffusion_nft", reward="patchy"),
    "diffusion_nft, not adaptive": Case("diffusion_nft", objective={"adaptive": False}),
    **{
        f"diffusion_nft, penalty in {space}": Case(
            "diffusion_nft", {"kl": 0.5}, objective={"regularizers.0.space": space}
        )
        for space in ("x0", "path")
    },
    "awm": _case("awm", steps=6, pairs=3),
    "awm, off policy": _case("awm", steps=6, pairs=3, off_policy=True, clip=1e-2, std="group"),
    **{
        f"awm, {times}": _case("awm", steps=6, pairs=3, times=times, likelihood=likelihood, off_policy=True)
        for times, likelihood in (
            ("discrete", "adaptive"),
            ("discrete_with_init", "t"),
            ("uniform", "huber"),
            ("logit_normal", "exact"),
        )
    },
    "awm, without penalties": _case("awm", steps=6, pairs=3, kl=0.0, ema_kl=0.0, solver="dpm2"),
    "advantage_flow": _case("advantage_flow", pairs=2),
    "advantage_flow, balanced": _case(
        "advantage_flow", gamma=1.0, anchor="balanced", concave=True, adaptive=True, t_min=0.02, lag="type2"
    ),
    "advantage_flow, sum": Case("advantage_flow", objective={"form": "sum"}),
    "v_grpo": _case("v_grpo", pairs=2),
    "v_grpo, clip": _case(
        "v_grpo", pairs=2, clip=1e-2, soft_clip=None, kl=0.1, share_pairs=False, std="global", advantage_clip=2.0
    ),
    "elbo_pg": _case("elbo_pg"),
    "elbo_pg, score function": _case("elbo_pg", ratio=False, likelihood="t2", scale="group", solver="euler"),
    "elbo_pg, pepg": _case("elbo_pg", kind="pepg", kl=0.1, kl_form="k1", likelihood="uniform"),
    "elbo_pg, par": _case("elbo_pg", kind="par", rollout="sde", kl=0.1, kl_form="k2", likelihood="ghuber"),
    "elbo_pg, grpo": _case("elbo_pg", kind="grpo", scale="global", kl=0.1, kl_form="k3"),
    "elbo_pg, k3 reversed": _case("elbo_pg", kl=0.1, kl_form="k3_reversed"),
    "dgpo": _case("dgpo"),
    "dgpo, old": _case(
        "dgpo", beta=20.0, clip=None, compare_to="old", kl=0.1, share_noise=False, std="global", advantage_clip=None
    ),
    "crd": _case("crd"),
    "crd, hard": _case("crd", temperature=0.0, form="bce", lagged_sampler=False, std="group", adaptive_kl=False),
    "online_dpo": _case("online_dpo", pairs=2, beta=10.0, kl=0.1),
    "online_dpo, steep": _case("online_dpo", pairs=2),
    "rejection_sft": _case("rejection_sft", best=2, pairs=2),
    "rejection_sft, kl": _case("rejection_sft", best=2, pairs=2, kl=0.1),
    "e2po": _case("e2po", noises=2, conditions=2),
    "e2po, its other knobs": _case("e2po", noises=2, conditions=3, embed_steps=0, lag="type2", std="group", kl=0.1),
    "sol_rl": _case("sol_rl", pool=6, draft_steps=2),
    **{
        f"sol_rl, {choice}": _case("sol_rl", pool=6, draft_steps=2, choice=choice, lag_steps=2, std=std)
        for choice, std in (("mean_deviation", "group"), ("random", "global"), ("extremes_random", "global"))
    },
    "sol_rl, bfloat16": _case("sol_rl", pool=6, draft_steps=2, draft_precision="bfloat16"),
    # --------------------------------------------------------------------------------------------- few-step students
    "gdmd": _case("gdmd", turns=2),
    "gdmd, signed": _case("gdmd", turns=2, head="signed", normaliser="none", spread=0.01),
    "gdmd, failed scores": Case("gdmd", {"turns": 2, "mix": 0.5, "normaliser": "noisy"}, reward="patchy"),
    "gdmd, to the end": Case(
        "gdmd", {"turns": 1}, objective={"strength": None, "samples.stop": "end", "samples.checkpointed": True}
    ),
    "rtdmd": _case("rtdmd", clip=0.002, fake_updates=2, matching_weight=0.5),
    "rtdmd, its other knobs": _case(
        "rtdmd",
        log_prob="density",
        train_steps=None,
        fake_updates=2,
        noise_level=0.5,
        std="group",
        advantage_clip=None,
        matching_weight=1.0,
    ),
    "rtdmd, cold start": _case("rtdmd", stage="cold_start", fake_updates=2, teacher_guidance=1.5, turns=2),
    "segment_matching": _case("segment_matching", parts=3, teacher_guidance=1.5),
    "segment_matching, the run's guidance": Case("segment_matching", objective={"strength": None}, guidance=1.5),
    "dmd2": _case("dmd2", teacher_guidance=1.5, fake_updates=2, turns=2),
    "dmd2, its other forms": Case(
        "dmd2",
        {"fake_updates": 2, "fake_rate": 2.0, "stop": "end", "through": None},
        objective={"anchor": "none", "strength": None, "samples.checkpointed": True},
        guidance=1.5,
    ),
    "dp_dmd": _case("dp_dmd", teacher_guidance=1.5, fake_updates=2, weight=0.5),
    "rats": _case("rats", noises=3, parts=2, teacher_guidance=1.5),
    "rats, failed scores": Case("rats", {"noises": 4, "parts": 2, "mix": 0.5, "turns": 2}, reward="patchy"),
    "rats, shaping alone": Case(
        "rats", {"noises": 3, "parts": 2, "reward_term": "none"}, objective={"strength": None}, guidance=1.5
    ),
    "opd": _case("opd", teacher_guidance=1.5, turns=2),
    "opd, its other knobs": _case("opd", teacher_guidance=0.0, power=2.0),
    # -------------------------------------------------------------------------------------------------------- tokens
    "udm_grpo": Case("udm_grpo", {"window": 2, "starts": 2}, tokens=True),
    "udm_grpo, k3 of every token": Case("udm_grpo", {"window": 2, "kl": 0.5, "kl_of": "token"}, tokens=True),
    "udm_grpo, jumps": Case("udm_grpo", {"actions": "jumps", "window": 2, "kl": 0.1}, tokens=True),
    "udm_grpo, branches": Case("udm_grpo", {"actions": "branches", "window": 2, "kl": 0.1}, tokens=True),
    # ---------------------------------------------------------------------------------------- the reward's own gradient
    "refl": Case("refl", {"late": 3, "noises": 2}, reward="light"),
    "refl, margin": Case("refl", {"late": 3, "noises": 2, "margin": 0.45, "turns": 2}, reward="light", guidance=1.5),
    "draft": Case("draft", {"noises": 2}, reward="light"),
    "draft, all steps": Case("draft", {"noises": 2, "last": 4, "checkpointed": True, "turns": 2}, reward="light"),
    "draft, margin": Case("draft", {"noises": 2, "last": 2, "margin": 0.45}, reward="light"),
    "srpo": Case("srpo", {"noises": 2, "pairs": 2}, reward="light"),
    "srpo, margin": Case("srpo", {"noises": 1, "pairs": 3, "margin": 0.45, "turns": 2}, reward="light"),
    # ------------------------------------------------------------------------------------------------------- offline
    "diffusion_dpo": Case("diffusion_dpo", {"pairs": 2, "beta": 10.0}, offline=True),
    "diffusion_dpo, kl": Case("diffusion_dpo", {"pairs": 2, "beta": 10.0, "kl": 0.1}, offline=True),
    "sft": Case("sft", {"pairs": 2}, offline=True),
    "sft, kl": Case("sft", {"pairs": 2, "kl": 0.1}, offline=True),
}
