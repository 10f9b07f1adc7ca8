"""Credit: from scores of leaves to advantages of edges. One file for each thing that rules do."""

from __future__ import annotations

from tempflow.core.credit.multi_reward import MinNorm, PerReward, WinRate, nearest_to_zero, normalised, win_rates
from tempflow.core.credit.observed import (
    Mapped,
    PathLogProb,
    Progress,
    RelativeChange,
    StepCredit,
    Surprisal,
    surprisal,
)
from tempflow.core.credit.rule import Advantage, Around, CreditRule, Key, group_index
from tempflow.core.credit.selection import DynamicSampling, Extremes
from tempflow.core.credit.streams import PerStream
from tempflow.core.credit.tree import BestPath, FromLeaves, LogProb, LogProbBackup, Standing
from tempflow.core.credit.zscore import AsScored, Center, GroupZScore, Scale

__all__ = [
    "Advantage",
    "Around",
    "AsScored",
    "BestPath",
    "Center",
    "CreditRule",
    "DynamicSampling",
    "Extremes",
    "FromLeaves",
    "GroupZScore",
    "Key",
    "LogProb",
    "LogProbBackup",
    "Mapped",
    "MinNorm",
    "PathLogProb",
    "PerReward",
    "PerStream",
    "Progress",
    "RelativeChange",
    "Scale",
    "Standing",
    "StepCredit",
    "Surprisal",
    "WinRate",
    "group_index",
    "nearest_to_zero",
    "normalised",
    "surprisal",
    "win_rates",
]
