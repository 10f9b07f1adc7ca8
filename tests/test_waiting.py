"""How threads wait for each other: what torch's OpenMP has read, in a process that imports as users do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def run(code: str, **set_by_user: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in NAMES} | set_by_user
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has no OpenMP")
def test_torchs_threads_spin_for_a_moment_then_sleep() -> None:
    """OpenMP itself says so when torch is loaded, by the names in the program a user starts."""
    said = run("import tempflow.cli, torch; torch.ones(1)", OMP_DISPLAY_ENV="VERBOSE").stderr
    policy = [line for line in said.splitlines() if "OMP_WAIT_POLICY" in line]
    assert policy and all("PASSIVE" in line.upper() for line in policy)
    assert all("'10000'" in line for line in said.splitlines() if "GOMP_SPINCOUNT" in line)


@pytest.mark.parametrize(("name", "value"), [(NAMES[0], "ACTIVE"), (NAMES[1], "300000"), (NAMES[2], "200")])
def test_what_the_user_has_set_stands(name: str, value: str) -> None:
    show = f"import tempflow, os; print([os.environ.get(name) for name in {NAMES}])"
    assert run(show, **{name: value}).stdout.strip() == str([value if n == name else None for n in NAMES])
