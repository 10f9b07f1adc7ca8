"""Flow-GRPO's strict GenEval measure as published: `geneval_rules.flow_grpo_strict` on the detections of `geneval`."""

from __future__ import annotations

from typing import ClassVar

from tempflow.rewards.geneval import LICENCE, NEEDS, RANGE, GenEval, Rule
from tempflow.rewards.geneval_rules import flow_grpo_strict

__all__ = ["LICENCE", "NEEDS", "RANGE", "geneval_flowgrpo_strict"]


class GenEvalFlowGRPOStrict(GenEval):
    """Whether a picture shows exactly what is asked for, as Flow-GRPO counts: for any tag more objects are wrong.

    Arguments and errors: `GenEval`.
    """

    name: ClassVar[str] = "geneval_flowgrpo_strict"
    rule: ClassVar[Rule] = staticmethod(flow_grpo_strict)


geneval_flowgrpo_strict = GenEvalFlowGRPOStrict
