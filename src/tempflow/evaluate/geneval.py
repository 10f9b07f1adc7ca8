"""GenEval and GenEval 2 as suites: their prompts' files, and GenEval's score of judged pictures.

GenEval (arXiv 2310.11513) has 553 prompts of six tags, four pictures each. Its score is the mean over the tags of the
mean over a tag's pictures, so that a tag counts alike however many prompts it has; the mean over all pictures is
another number. GenEval 2 (arXiv 2512.16853) has 800 prompts, each with atoms; its score is the mean over prompts of
`rewards.geneval2_rules.soft_tifa`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tempflow.data.prompts import load_prompts
from tempflow.request import Prompt
from tempflow.rewards.geneval2_rules import atoms_of
from tempflow.rewards.geneval_rules import OFFICIAL, TAGS, check_possible, task_of
from tempflow.strict import nearest, shown


@dataclass(frozen=True)
class Tally:
    """Scores of judged pictures by tag.

    total   sum of scores
    all     pictures that have one
    failed  pictures that have none: they are no zeros
    """

    total: Mapping[str, float]
    all: Mapping[str, int]
    failed: Mapping[str, int]

    @property
    def by_tag(self) -> dict[str, float]:
        """Mean over each tag's pictures, in the order of `TAGS`; a tag without a score is not there."""
        return {tag: self.total[tag] / self.all[tag] for tag in TAGS if self.all.get(tag)}

    @property
    def missing(self) -> tuple[str, ...]:
        """Tags without a score."""
        return tuple(tag for tag in TAGS if not self.all.get(tag))

    @property
    def overall(self) -> float:
        """GenEval's score: the mean over the six tags. Raises ValueError, naming them, where some have no score."""
        if self.missing:
            there = f"{len(self.by_tag)} of {len(TAGS)} tags (by_tag)" if self.by_tag else "a score of each tag"
            raise ValueError(f"no score of {', '.join(self.missing)}; nearest valid: {there}")
        return math.fsum(self.by_tag.values()) / len(TAGS)


def tally(pictures: Iterable[tuple[str, float | None]]) -> Tally:
    """Sums (tag, score) of pictures, as `Report.kinds` and `Report.values("geneval")` have them; None or NaN is failed.

    Raises ValueError for a tag that is none of `TAGS`, and an infinite score.
    """
    total, every, failed = dict[str, list[float]](), Counter[str](), Counter[str]()
    for number, (tag, score) in enumerate(pictures, 1):
        if tag not in TAGS:
            raise ValueError(f"picture {number}: tag {shown(tag)} is unknown; nearest valid: {nearest(tag, TAGS)}")
        if score is None or math.isnan(score):
            failed[tag] += 1
            continue
        if math.isinf(score):
            raise ValueError(f"picture {number}: score {score}; nearest valid: 0 to 1, or NaN where it failed")
        every[tag] += 1
        total.setdefault(tag, []).append(score)
    return Tally({tag: math.fsum(scores) for tag, scores in total.items()}, dict(every), dict(failed))


def read_geneval(file: str | Path) -> tuple[Prompt, ...]:
    """Prompts in the form of GenEval's `evaluation_metadata.jsonl`, each checked (`geneval_rules.task_of`).

    Raises ValueError, naming the prompt and the field, for what cannot be read or can never be fulfilled.
    """
    return _read(file, lambda metadata: check_possible(task_of(metadata), OFFICIAL.most))


def read_geneval2(file: str | Path) -> tuple[Prompt, ...]:
    """Prompts in the form of GenEval 2's `geneval2_data.jsonl`, each checked (`geneval2_rules.atoms_of`).

    Raises ValueError, naming the prompt and the field, for what cannot be read, a prompt without atoms included.
    """
    return _read(file, atoms_of)


def _read(file: str | Path, check: Callable[[Mapping[str, object]], object]) -> tuple[Prompt, ...]:
    prompts = load_prompts(str(file))
    for number, prompt in enumerate(prompts, 1):
        try:
            check(prompt.metadata)
        except ValueError as error:
            raise ValueError(f"{file}: prompt {number}, {shown(prompt.text)}: {error}") from None
    return prompts
