"""The verifier of the embedded world as a reward: graded (partial credit) or strict (right or wrong)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import torch

from tempflow.core.scores import Scores
from tempflow.media import Media
from tempflow.rewards.protocol import check_media
from tempflow.shapes.prompts import by_prompt, check_known

if TYPE_CHECKING:
    from tempflow.shapes.prompts import Spec
    from tempflow.shapes.verify import Verdict

LICENCE, NEEDS, RANGE = "Apache-2.0", "tempflow[shapes]", "0 to 1"


def shapes() -> ShapesReward:
    """The shapes verifier with partial credit, 0 to 1."""
    return ShapesReward()


class ShapesReward:
    """Judges 32×32 pictures against prompts of the `shapes` world by looking at the pixels alone.

    graded  True: "shapes", in [0, 1], partial credit; 1 exactly when the picture is right
            False: "shapes_strict", 0 or 1

    Raises ImportError without OpenCV.
    """

    groupwise = False

    def __init__(self, graded: bool = True) -> None:
        try:
            from tempflow.shapes.render import SIZE
            from tempflow.shapes.verify import judge
        except ImportError as error:
            if (error.name or "").split(".")[0] != "cv2":
                raise
            raise ImportError("the shapes reward needs OpenCV: pip install 'tempflow[shapes]'", name="cv2") from error
        self.graded = graded
        self.name = "shapes" if graded else "shapes_strict"
        self._judge, self._size = judge, SIZE

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Raises ValueError for a prompt that is not of this world."""
        check_known(prompts)

    def score(self, media: Media, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> Scores:
        """One column; never fails. Raises ValueError for another size or for a prompt that is not of this world."""
        pictures = check_media(media, prompts, metadata).pictures()
        if len(pictures) and pictures.shape[1:3] != (self._size, self._size):
            height, width = pictures.shape[1:3]
            raise ValueError(
                f"media is {height}×{width}; the shapes reward judges {self._size}×{self._size}. "
                f"Nearest valid: height={self._size}, width={self._size}"
            )
        self.check_prompts(prompts, metadata)
        verdicts: list[Verdict] = []
        for picture, prompt in zip(pictures.numpy(), prompts, strict=True):
            with _JUDGING:  # the graded and the strict reward, each in its thread: the second finds the first's verdict
                verdicts.append(_verdict(self._judge, self._size, picture.tobytes(), prompt))
        value = torch.tensor([v.graded if self.graded else float(v.strict) for v in verdicts]).float()[:, None]
        return Scores(value, torch.ones_like(value, dtype=torch.bool), (self.name,))


_JUDGING = Lock()


@lru_cache(maxsize=1 << 12)
def _verdict(judge: Callable[[np.ndarray, Spec], Verdict], size: int, picture: bytes, prompt: str) -> Verdict:
    """The graded and the strict reward score the same pictures, one after the other: each picture is judged once."""
    return judge(np.frombuffer(picture, dtype=np.uint8).reshape(size, size, 3), by_prompt()[prompt])
