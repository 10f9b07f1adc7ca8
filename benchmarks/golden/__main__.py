"""Golden updates: the weights that every algorithm trains to on a tiny model (docs/golden.md).

    python -m benchmarks.golden                     compares this tree with the numbers in tests/algorithms/golden.json
    python -m benchmarks.golden --write             freezes the cases that the file lacks (--only NAME: those anew)
    python -m benchmarks.golden --against REVISION  runs that revision and this tree, in float32 on one thread of this
                                                    CPU, and compares all weights bit for bit; with --pairs 7 it
                                                    compares processor time instead

The exit status is 1 where something differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.golden import against, frozen
from benchmarks.golden.cases import CASES
from benchmarks.golden.drive import drive, rate_for


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="freeze the cases that the file lacks")
    what.add_argument("--against", metavar="REVISION", help="compare with that revision of git, bit for bit")
    what.add_argument("--dump", metavar="FOLDER", type=Path, help="write all weights, as --against does for both trees")
    parser.add_argument("--pairs", metavar="N", type=int, default=0, help="with --against: time N interleaved pairs")
    parser.add_argument("--only", metavar="NAME", nargs="+", default=[], help="these cases alone")
    a = parser.parse_args()
    unknown = [name for name in a.only if name not in CASES]
    if unknown:
        parser.error(f"--only: {unknown[0]!r} is no case; they are the keys of benchmarks/golden/cases.py")
    torch.set_num_threads(1)
    if a.write:
        return _write(a.only)
    if a.dump:
        return against.dump(a.dump, a.only or [*CASES])
    if a.against and a.pairs:
        return against.race(a.against, a.only or [*CASES], a.pairs)
    if a.against:
        return against.compare(a.against, a.only or [*CASES])
    return _compare(a.only or [*CASES])


def _write(only: list[str]) -> int:
    cases = frozen.read() if frozen.FILE.exists() else {}
    for name in only or [name for name in CASES if name not in cases]:
        rate = rate_for(CASES[name])
        cases[name] = frozen.frozen(drive(CASES[name], rate), rate)
        print(f"{name}: frozen at rate {rate:g}")
    frozen.write({name: cases[name] for name in CASES if name in cases})
    return 0


def _compare(names: list[str]) -> int:
    want, bad = frozen.read(), 0
    for name in names:
        rate = want[name]["rate"]
        found = frozen.differences(frozen.frozen(drive(CASES[name], rate), rate), want[name])
        bad += bool(found)
        print(f"{name}: {'; '.join(found) or 'as frozen'}")
    print(f"{len(names) - bad} of {len(names)} cases as frozen")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
