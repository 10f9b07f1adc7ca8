"""Which prompts an iteration trains on: a pure function, so that a resumed run draws what an unbroken one would."""

from __future__ import annotations

from collections.abc import Sequence

from tempflow.core.rng import Stream
from tempflow.request import Prompt


def strata_of(prompts: Sequence[Prompt]) -> list[str] | None:
    """The task kind (`Prompt.kind`) of each prompt where all have one, else None."""
    kinds = [p.kind for p in prompts]
    return kinds if all(kinds) else None


def prompts_for(
    iteration: int, prompts: Sequence[Prompt], count: int, seed: int, strata: Sequence[str] | None = None
) -> list[int]:
    """`count` indices into `prompts` for an iteration, a function of the arguments alone.

    Iterations walk through shuffled passes (epochs): every prompt comes once a pass, and an iteration holds no prompt
    twice as long as `count` ≤ len(prompts). With strata (default: `strata_of(prompts)`) draws go round them in turn,
    each with passes of its own; then an iteration repeats a prompt only where a stratum has fewer prompts than draws.

    Raises ValueError for no prompts, count < 1, iteration < 0 or a strata list of another length.
    """
    size = len(prompts)
    if size < 1:
        raise ValueError("prompts: none given; at least one is needed")
    if count < 1:
        raise ValueError(f"count: {count} must be at least 1; nearest valid: 1")
    if iteration < 0:
        raise ValueError(f"iteration: {iteration} must be at least 0; nearest valid: 0")
    labels = strata if strata is not None else strata_of(prompts)
    if labels is None:
        labels = [""] * size
    if len(labels) != size:
        raise ValueError(f"strata: {len(labels)} labels for {size} prompts; nearest valid: {size}")
    pools: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        pools.setdefault(label, []).append(index)
    groups = list(pools.values())
    turns = -(-count // len(groups))  # the most that one stratum gives to an iteration
    orders: dict[tuple[int, int], list[int]] = {}
    chosen: list[int] = []
    for position in range(iteration * count, (iteration + 1) * count):
        turn, stratum = divmod(position, len(groups))
        pool = groups[stratum]
        epoch, place = divmod(turn, len(pool))
        if (stratum, epoch) not in orders:
            orders[stratum, epoch] = _order(seed, stratum, epoch, len(pool), min(turns, len(pool)))
        chosen.append(pool[orders[stratum, epoch][place]])
    return chosen


def _order(seed: int, stratum: int, epoch: int, size: int, window: int) -> list[int]:
    """The order of one pass, such that any `window` ≤ size consecutive draws are distinct, across passes too."""
    stream = Stream(seed, "data.prompts")
    if size < 2 * window - 1:
        # A pass is hardly longer than an iteration: one order for all passes, or the ends would have to be fitted
        # to each other all the way back to the first pass.
        return stream.permutation((stratum, 0), size)
    order = stream.permutation((stratum, epoch), size)
    if epoch == 0 or window == 1:
        return order
    # What the previous pass ended with waits until it is `window` draws away. This moves only the first `window`
    # draws of a pass, never the `window` − 1 last ones, so the previous pass's end is that of its plain permutation.
    recent = stream.permutation((stratum, epoch - 1), size)[1 - window :]
    head: list[int] = []
    rest = order
    for place in range(window - 1):
        barred = set(recent[place:])
        picked = next(index for index in rest if index not in barred)
        head.append(picked)
        rest = [index for index in rest if index != picked]
    return head + rest
