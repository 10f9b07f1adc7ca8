"""Flow-GRPO's graded GenEval reward as published: `geneval_rules.flow_grpo` on the detections of `geneval`."""

from __future__ import annotations

from typing import ClassVar

from tempflow.rewards.geneval import LICENCE, NEEDS, GenEval, Rule
from tempflow.rewards.geneval_rules import flow_grpo

__all__ = ["LICENCE", "NEEDS", "RANGE", "geneval_flowgrpo"]

RANGE = "at most 1, perhaps below 0"


class GenEvalFlowGRPO(GenEval):
    """GenEval's graded reward as Flow-GRPO's code computes it, with its faults; `geneval_graded` is without them.

    Arguments and errors: `GenEval`.
    """

    name: ClassVar[str] = "geneval_flowgrpo"
    rule: ClassVar[Rule] = staticmethod(flow_grpo)


geneval_flowgrpo = GenEvalFlowGRPO
