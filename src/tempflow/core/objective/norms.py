"""How large the policy's velocities are beside the starting model's, overheard while an objective asks for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from tempflow.core.corruption import Prediction
from tempflow.core.objective.edges import Loss, Predict
from tempflow.core.state import StateLayout


class HasLayout(Protocol):
    """A batch of states that says what counts in their means, and what is predicted at them."""

    @property
    def layout(self) -> StateLayout: ...

    @property
    def predicts(self) -> Prediction: ...


Batch = TypeVar("Batch", bound=HasLayout)


def with_velocity_norm(
    objective: Callable[[Mapping[str, Predict], Batch], Loss], models: Mapping[str, Predict], batch: Batch, rows: int
) -> Loss:
    """The objective's loss on the batch, with "velocity_norm" [rows] among its metrics: each row bears the mean, over
    the states at which the policy was asked, of RMS v_policy / RMS v_reference; 1 where the two are one.

    It costs no forward. Held elements count as predictors give them; the loop's give 0 there. NormGuard (arXiv
    2606.27771; its abstract alone was read) holds this ratio down by a hinge, as reinforcement inflates it; here it is
    only measured.

    Of tokens nothing is measured, as logits say the same at any offset: the loss comes as it is.

    Raises ValueError where the objective asks "policy" and "reference" for different states, or one of them for none.
    """
    if batch.predicts != "velocity":
        return objective(models, batch)
    rms = {name: list[Tensor]() for name in ("policy", "reference")}

    def overheard(name: str, predict: Predict) -> Predict:
        def listening(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            velocity = predict(x, sigma, rows)
            rms[name].append(batch.layout.unheld.mean(velocity.detach().square()).sqrt())
            return velocity

        return listening

    loss = objective({name: overheard(name, p) if name in rms else p for name, p in models.items()}, batch)
    policy, reference = ([len(part) for part in rms[name]] for name in rms)
    if policy != reference or not policy:
        raise ValueError(
            f"models: 'policy' was asked for {sum(policy)} states and 'reference' for {sum(reference)}; "
            "nearest valid: an objective that compares the two"
        )
    ratio = torch.cat(rms["policy"]) / torch.cat(rms["reference"])
    return replace(loss, metrics={**loss.metrics, "velocity_norm": ratio.mean().expand(rows)})
