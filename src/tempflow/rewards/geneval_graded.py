"""GenEval's rule with partial credit, for training: `geneval_rules.graded` on the detections of `geneval`."""

from __future__ import annotations

from typing import ClassVar

from tempflow.rewards.geneval import LICENCE, NEEDS, GenEval, Rule
from tempflow.rewards.geneval_rules import graded

__all__ = ["LICENCE", "NEEDS", "RANGE", "geneval_graded"]

RANGE = "0 to 1"


class GenEvalGraded(GenEval):
    """How far a picture shows what its prompt's metadata ask for; 1 where GenEval counts it right.

    Arguments and errors: `GenEval`.
    """

    name: ClassVar[str] = "geneval_graded"
    rule: ClassVar[Rule] = staticmethod(graded)


geneval_graded = GenEvalGraded
