"""A reward server in a process of its own, in an environment that has the core dependencies alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import tempflow

SCORER = """
import time

import numpy as np


def score(images, prompts):
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        word, _, rest = prompt.partition(" ")
        if word == "raise":
            raise RuntimeError("cannot score " + rest)
        if word == "exit":
            raise SystemExit(3)
        if word == "open":
            open(rest).close()
        if word == "sleep":
            time.sleep(float(rest))
        score = float("nan") if word == "nan" else float(np.asarray(image).mean()) + 1
        found.append(None if word == "blank" else score)
    return found


def compare(images, prompts):
    return [float(n) + 1 for n, _ in enumerate(images)]
"""

LAUNCH = """
import os, sys

class Missing:
    "What a scorer's own environment lacks."
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ImportError("not installed here: " + name, name=name.partition(".")[0])

def seen(event, details):
    if event == "open" and "MARKED" in str(details[0]):
        os.write(2, b"OPENED " + str(details[0]).encode() + b"\\n")

sys.meta_path.insert(0, Missing())
sys.addaudithook(seen)
from tempflow.cli import main
import tempflow.serve.run as run
run.IDLE = {idle}
sys.exit(main(sys.argv[1:]))
"""

MISSING = ("transformers", "diffusers", "peft", "accelerate", "tokenizers", "cv2", "matplotlib", "av", "httpx")


class Served:
    """A running server; `url`, `token`, and what it says on its error stream in `log`."""

    def __init__(self, folder: Path, *options: str, idle: float = 30.0, missing: tuple[str, ...] = MISSING) -> None:
        self.folder, self.log = folder, folder / "stderr.txt"
        self.options, self.launch = options, LAUNCH.format(missing=repr(missing), idle=idle)
        (folder / "scorer.py").write_text(SCORER)
        self.url = self.start("0")
        self.token = (folder / "token").read_text().strip()

    def start(self, port: str) -> str:
        words = ["serve-reward", "--function", str(self.folder / "scorer.py:score"), "--port", port]
        words += ["--token-file", str(self.folder / "token"), *self.options]
        if "--function" in self.options or (self.options and not self.options[0].startswith("-")):
            words = ["serve-reward", *self.options, "--port", port, "--token-file", str(self.folder / "token")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.launch, *words],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tempflow.__file__).parents[1])},
                cwd=self.folder,
            )
        assert self.process.stdout is not None
        url = self.process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), self.log.read_text()
        return url

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def rss(self) -> int:
        """Bytes of memory that it holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()
