"""Time a picture takes: a few-step student on its own grid beside its teacher, drawn in turns from the same noises.

    python -m benchmarks.few_steps runs/student                               # teacher: shapes, 10 and 20 steps, guided
    python -m benchmarks.few_steps exported --teacher shapes --steps 10 --guidance 1 2 --rounds 7

Every round draws the same prompts by each of them, one after another, in another order each time, so that what else the
machine does meets all alike. Printed are the medians over rounds: wall and processor milliseconds a picture, and how
many times the student's wall time it is, round by round.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from tempflow.data.prompts import load_prompts
from tempflow.evaluate.source import find, guidance_for, load_source, settings
from tempflow.evaluate.suite import draw, fixed_prompts, walk_of
from tempflow.models.guidance import guided


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="anything that `tempflow eval` takes")
    parser.add_argument("--base", default="", help="what a LoRA is laid on")
    parser.add_argument("--teacher", default="shapes")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20], help="of the teacher, on its own grid")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0], help="of the teacher")
    parser.add_argument("--count", type=int, default=24, help="pictures a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    source, other = find(a.student, a.base), find(a.teacher)
    how, theirs = settings(source), settings(other)
    student = load_source(source, dtype=how.dtype, device=a.device)
    teacher = load_source(other, dtype=how.dtype, device=a.device)
    rows = [("student", student, how.steps, guided(guidance_for(student, how), student.guidance))]
    for steps in a.steps:
        for guidance in a.guidance:
            rows.append((f"teacher, guidance {guidance:g}", teacher, steps, guided(guidance, teacher.guidance)))
    prompts = fixed_prompts(load_prompts(theirs.prompts), a.count)
    wall, cpu = [list[float]() for _ in rows], [list[float]() for _ in rows]
    for turn in range(a.rounds + 1):  # the first warms caches and encodes the prompts
        for place in range(len(rows)):
            n = (place + turn) % len(rows)
            _, model, steps, guidance = rows[n]
            began, used = time.perf_counter(), time.process_time()
            draw(model, prompts, steps=steps, guidance=guidance, seed=1, size=how.size, rows=how.rows)
            if turn:
                wall[n].append((time.perf_counter() - began) / a.count * 1000)
                cpu[n].append((time.process_time() - used) / a.count * 1000)
    print("model                  grid       steps  useful  forwards  wall ms  cpu ms  × student (wall)")
    for (name, model, steps, guidance), walls, cpus in zip(rows, wall, cpu, strict=True):
        walk = walk_of(model, steps, guidance, how.size)
        times = median(one / own for one, own in zip(walls, wall[0], strict=True))
        told = f"{name:22s} {walk.grid[:10]:10s} {steps:5d}  {walk.useful:6d}  {walk.forwards:8d}"
        print(f"{told}  {median(walls):7.2f}  {median(cpus):6.2f}  {times:.2f}")


if __name__ == "__main__":
    main()
