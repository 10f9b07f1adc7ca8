"""Whether a run can learn by its rewards' own gradients, which is asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from tempflow.algorithms.base import Algorithm
from tempflow.config import Config
from tempflow.models import adapter_of, local_folder
from tempflow.models.protocol import Model
from tempflow.rewards import notes
from tempflow.rewards.protocol import Reward, differentiable_of
from tempflow.strict import nearest, shown


def check_gradients(
    config: Config, algorithm: Algorithm, model: Model | None, rewards: Sequence[Reward], own: bool
) -> None:
    """Whether the rewards that teach, their sum and the model's decoder have gradients, where the algorithm goes
    through them. `model`: one given as an object; `own`: the rewards are the configuration's. Raises ValueError, naming
    the field."""
    if not algorithm.through_rewards:
        return
    named, kinds = algorithm.name[:40], {reward.name: reward.name for reward in rewards}
    if own:
        kinds = {reward.name: reward.kind or reward.name for reward in config.rewards if reward.teaches}
    for number, reward in enumerate(rewards):
        if reward.name in kinds and differentiable_of(reward) is None:
            able = [name for name, note in notes().items() if note.differentiable]
            raise ValueError(
                f"{f'rewards.{number}.name:' if own else 'reward:'} {shown(reward.name)} is not differentiable, and "
                f"{named} learns by the rewards' gradients; nearest valid: {nearest(kinds[reward.name], able)} of "
                f"{', '.join(able)}"
            )
    _check_sum(config, named, own)
    decodes: object = model
    if model is None:
        decodes = adapter_of(config.model.path, local_folder(config.model.path, config.model.revision))
    if not hasattr(decodes, "decode_pixels"):
        name = config.model.path if model is None else model.name
        raise ValueError(
            f"model: {shown(name)} decodes without gradients, and {named} learns through the decoder; nearest valid: "
            "an adapter with `decode_pixels`"
        )
    if model is None and config.model.offload:
        raise ValueError(
            f"model.offload: true, and {named} learns through the decoder, which has to stay; nearest valid: false"
        )


def _check_sum(config: Config, named: str, own: bool) -> None:
    """What several rewards become has gradients where it is their sum by weight."""
    why = f"and {named} takes the gradient of a sum by weight; nearest valid"
    if config.composition.how != "sum":
        raise ValueError(f"composition.how: {config.composition.how!r}, {why}: 'sum'")
    if config.composition.drop_above < 1:
        raise ValueError(f"composition.drop_above: {config.composition.drop_above}, {why}: 1.0")
    for number, reward in enumerate(config.rewards if own else ()):
        if reward.at_least is not None:
            raise ValueError(f"rewards.{number}.at_least: {reward.at_least}, {why}: null")
