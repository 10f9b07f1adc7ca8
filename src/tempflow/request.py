"""What a sample is asked for: a leaf that data, models, rewards and training share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("kind", "tag")
"""Where a prompt's metadata say what kind of task it is, the first before the others; GenEval calls it "tag"."""

SOURCES = "sources"
"""Where rewards are told a prompt's sources, beside its metadata."""


@dataclass(frozen=True)
class Source:
    """A picture or a clip that a sample starts from or is held to: its file, and the sha256 of what that held."""

    path: Path
    digest: str

    @classmethod
    def of(cls, path: str | Path) -> Source:
        """Raises OSError where the file cannot be read."""
        with Path(path).open("rb") as file:
            return cls(Path(path), hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class Prompt:
    """What one sample is asked for.

    text      the prompt
    metadata  what else its line said: for rewards
    negative  what guidance leads away from; "" is the empty prompt
    sources   pictures or clips that it starts from or is held to, in order
    """

    text: str
    metadata: Mapping[str, object] = field(default_factory=dict[str, object])
    negative: str = ""
    sources: tuple[Source, ...] = ()

    @property
    def told(self) -> Mapping[str, object]:
        """What rewards are told beside the text: its metadata and, if it has any, its sources, `Source`s under
        `SOURCES`, in the place of what the metadata say there."""
        return {**self.metadata, SOURCES: self.sources} if self.sources else self.metadata

    @property
    def kind(self) -> str:
        """Its kind of task, by "kind" or else "tag"; "" without one. Balances draws, names rows of tables."""
        said = (self.metadata.get(key) for key in KINDS)
        return next((str(s).strip() for s in said if isinstance(s, str | int) and str(s).strip()), "")


def asked(prompts: Iterable[str | Prompt]) -> tuple[Prompt, ...]:
    """Texts as prompts of these texts alone; prompts as they are."""
    return tuple(prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts)
