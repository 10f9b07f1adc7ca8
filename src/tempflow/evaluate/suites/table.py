"""The suites by name: which file they read, who judges, how many pictures a prompt has, which tables come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tempflow.evaluate.geneval import read_geneval, read_geneval2
from tempflow.evaluate.suites import figures, readers
from tempflow.evaluate.suites.figures import Figures
from tempflow.evaluate.suites.scorers import ByReward, Compared, Scorer, checkpoints, diversity, yes_or_no
from tempflow.request import Prompt
from tempflow.rewards import build, checked, maker
from tempflow.rewards.judge_pairs import judge_pairs
from tempflow.strict import nearest, shown


@dataclass(frozen=True)
class Suite:
    """A suite that people report.

    file      what its prompts' file is
    read      reads that file; or, where `asks`, the prompts' folder and the questions' file
    figures   its tables
    scorer    the reward that judges where no other is named; "" where the suite has its own judge
    own       makes that of its options, and `wrap` makes a scorer of it
    preset    options that it has unless others are given
    samples   pictures a prompt
    least     fewest of them that make sense
    pairs     two models' pictures are compared
    asks      its questions lie in a file of their own
    """

    about: str
    file: str
    read: Callable[..., tuple[Prompt, ...]]
    figures: Figures
    scorer: str = ""
    own: Callable[..., Any] | None = None
    wrap: Callable[[Any], Scorer] = lambda made: made
    preset: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    samples: int = 4
    least: int = 1
    pairs: bool = False
    asks: bool = False


SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "geneval": Suite(
            "GenEval (arXiv 2310.11513): objects, counts, colours, places, by a detector",
            "its evaluation_metadata.jsonl",
            read_geneval,
            figures.of_geneval,
            "geneval",
        ),
        "geneval2": Suite(
            "GenEval 2 (arXiv 2512.16853): Soft-TIFA, by a judge's first tokens",
            "its geneval2_data.jsonl",
            read_geneval2,
            figures.by_labels("GenEval 2", "mean over pictures of Soft-TIFA", {"atoms": "atom_count"}),
            "judge",
            preset={"template": "soft_tifa"},
        ),
        "ocr": Suite(
            "text in pictures, read by OCR",
            "any source of prompts",
            readers.read_prompts,
            figures.by_labels("OCR", "mean over pictures", {"kind": "kind"}),
            "ocr",
        ),
        "drawbench": Suite(
            "DrawBench's prompts, by any reward",
            "its CSV: Prompts, Category",
            readers.read_drawbench,
            figures.by_labels("DrawBench", "mean over pictures", {"category": "Category"}),
            "pickscore",
        ),
        "partiprompts": Suite(
            "PartiPrompts, by any reward",
            "its TSV: Prompt, Category, Challenge",
            readers.read_partiprompts,
            figures.by_labels("PartiPrompts", "mean over pictures", {"category": "Category", "challenge": "Challenge"}),
            "pickscore",
            samples=1,
        ),
        "dpg_bench": Suite(
            "DPG-Bench (arXiv 2403.05135): dense prompts, by a judge's yes and no",
            "its folder of texts; --questions, its CSV",
            readers.read_dpg_bench,
            figures.of_dpg_bench,
            own=yes_or_no,
            asks=True,
        ),
        "unigenbench": Suite(
            "UniGenBench (arXiv 2508.20751): checkpoints of ten themes, by a judge",
            "its CSV: index, prompt_en, sub_dims_en",
            readers.read_unigenbench,
            figures.of_unigenbench,
            own=checkpoints,
        ),
        "diversity": Suite(
            "how different pictures of one prompt are, by distances of an embedding",
            "any source of prompts",
            readers.read_prompts,
            figures.by_labels("distance", "mean distance between a prompt's pictures", {"kind": "kind"}),
            own=diversity,
            samples=8,
            least=2,
        ),
        "gsb": Suite(
            "two models' pictures of the same prompts, by a pairwise judge: good, same, bad",
            "any source of prompts",
            readers.read_prompts,
            figures.of_gsb,
            own=judge_pairs,
            wrap=Compared,
            preset={"template": "unified_1_pairs"},
            samples=1,
            pairs=True,
        ),
    }
)
"""Name → suite."""


def suite_of(name: str) -> Suite:
    """Raises ValueError for an unknown one."""
    if name not in SUITES:
        raise ValueError(
            f"name: {shown(name)} is no suite; nearest valid: {nearest(name, SUITES)} of {', '.join(SUITES)}"
        )
    return SUITES[name]


def read(suite: Suite, prompts: str, questions: str = "") -> tuple[Prompt, ...]:
    """The suite's prompts. Raises ValueError where a file is not named, is not needed, or cannot be read; also for two
    prompts of one number."""
    if not prompts:
        raise ValueError(f"prompts: none given; nearest valid: {suite.file}")
    if bool(questions) != suite.asks:
        what = "none given" if suite.asks else f"{shown(questions)} is not read by this suite"
        raise ValueError(f"questions: {what}; nearest valid: {suite.file if suite.asks else 'without'}")
    found = suite.read(prompts, questions) if suite.asks else suite.read(prompts)
    numbers: dict[int, int] = {}
    for place, prompt in enumerate(found):
        other = numbers.setdefault(number := readers.number_of(prompt, place), place)
        if other != place:
            raise ValueError(f"{prompts}: prompts {other + 1} and {place + 1} both have the index {number}")
    return found


def scorer_of(suite: Suite, kind: str, options: Mapping[str, Any]) -> Scorer:
    """Who judges: the suite's own judge, or the reward of that kind.

    Raises ValueError for a reward where the suite has its own judge, and for options that are unknown or wrong.
    """
    if suite.own is not None:
        if kind:
            raise ValueError(f"scorer: {shown(kind)}, and this suite has a judge of its own; nearest valid: without")
        return suite.wrap(suite.own(**checked(suite.own, {**suite.preset, **options})))
    name = kind or suite.scorer
    maker(name)
    return ByReward(build(name, options={**(suite.preset if name == suite.scorer else {}), **options}))
