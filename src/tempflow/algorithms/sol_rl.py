"""Sol-RL: explore a large pool by cheap drafts, train on the ends of it (code NVlabs/Sana, train_scripts/sol_rl).

Claim. Training on the most contrastive samples of a large pool helps, but making the pool costs. Draft it cheaply, rank
the drafts by reward, keep the initial noises of the best and the worst, draw these again in full, and train
DiffusionNFT on the latter. A draft only has to rank; it never becomes a target.

    draft       `pool` noises a prompt, `draft_steps` ODE steps by the lagged policy in `draft_precision`, scored
    select      group // 2 best and the rest worst noises (`choice`)
    redraw      the same noises in `steps` ODE steps by the lagged policy; *these* pictures' rewards count
    advantage   mean over the kept pictures of the prompt, std of all kept ones
    loss, old   DiffusionNFT's                                                            (algorithms.diffusion_nft)
    lag         "type3" here is this code's own: η = lag_hold·min(i/lag_steps, 1) at update i

Cost for a prompt: pool·draft_steps + group·T forwards, pool + group pictures; pairs as DiffusionNFT. At the defaults
576 + 240 forwards, 96 + 24 pictures, 216 pairs.

Defaults: configs/sol_rl/sana.py, train_utils.return_decay (read in source, sure): pool 96, group 24, drafts of 6 steps,
10 in full, best and worst, lag "type1", the rest DiffusionNFT's. "type3" has no numbers there; lag_hold 0.9 is a table
of the paper's (second-hand). The code drafts in NVFP4 (TransformerEngine); here `draft_precision` is "full" unless
told, so that a draft saves by fewer steps alone. A cheap copy of the sampler is made anew each iteration, LoRA merged
(models.precision); float8 and nvfp4 go through torchao, need a GPU that has them, and have not been run by us.
The ranking needs a deterministic sampler, which this is; `draft/kendall` in the metrics says how well drafts rank the
kept noises, which are the ends, so that it is above the pool's own agreement.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from tempflow.algorithms.base import Algorithm, at_least, one_of, texts_of
from tempflow.algorithms.diffusion_nft import Lag, diffusion_nft, lagged
from tempflow.core.draft import Choice, Draft, Precision
from tempflow.core.ema import Ramp


@texts_of(diffusion_nft)
def sol_rl(
    steps: int = 10,
    group: int = 24,
    pool: int = 96,
    draft_steps: int = 6,
    choice: Choice = "best_worst",
    mix_beta: float = 1.0,
    advantage_max: float = 5.0,
    lag: Lag = "type1",
    lag_steps: int | None = None,
    lag_hold: float = 0.9,
    fraction: float = 0.99,
    kl: float = 1e-4,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
    draft_precision: Precision = "full",
) -> Algorithm:
    """Sol-RL: DiffusionNFT on the best and worst of a large pool that was drafted cheaply.

    Args:
        steps: T, sampler steps of what is trained on.
        group: pictures per prompt that are kept, drawn in full and compared with each other.
        pool: noises per prompt that are drafted; equal to group, it only orders them.
        draft_steps: sampler steps of a draft.
        choice: "best_worst", "mean_deviation", "random" or "extremes_random": which noises are kept.
        lag_steps: for "type3": iterations in which its decay rises to lag_hold.
        lag_hold: for "type3": the decay that it stays at, in (0, 1].
        std: "global": standard deviation of all kept scores of the iteration; "group": of the prompt's own.
        draft_precision: what drafts compute in: "full" as the sampler, "bfloat16", "int8", "float8" or "nvfp4".

    Raises ValueError naming the argument, its value and a valid one.
    """
    at_least("pool", pool, group, "as the group is chosen from it")
    base = diffusion_nft(
        steps=steps,
        group=group,
        mix_beta=mix_beta,
        advantage_max=advantage_max,
        fraction=fraction,
        kl=kl,
        std=std,
        eps=eps,
    )
    old = _ramp(lag_steps, lag_hold) if lag == "type3" else lagged(lag)
    one_of("choice", choice, get_args(Choice))
    draft = Draft(pool, draft_steps, choice, draft_precision)
    return replace(base, name="sol_rl", draft=draft, weight_sets={"old": old})


def _ramp(steps: int | None, hold: float) -> Ramp:
    if steps is None:
        raise ValueError("lag_steps: None, and 'type3' rises over a number of iterations; nearest valid: 100")
    at_least("lag_steps", steps, 1)
    if not 0 < hold <= 1:
        raise ValueError(f"lag_hold: {hold} is a decay, in (0, 1]; 0.9 is usual")
    return Ramp(0, hold / steps, hold)
