"""A soak of the reward server on loopback: many scores, several clients, none lost, none twice, memory flat.

    python -m benchmarks.reward_soak [--scores 20000] [--clients 8] [--rows 8] [--requests 6]

Every picture holds a number of its own, which is its score; the scorer fails a picture that it sees a second time. The
server takes fewer requests at a time than the clients make, so that some are told to come again. Prints how many scores
were right, and the memory of both processes over time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch

from benchmarks.served import served
from tempflow.media import Media
from tempflow.rewards.remote import remote


def pictures(numbers: list[int], side: int) -> Media:
    """Each holds its number in its first pixel; noise elsewhere."""
    made = torch.randint(0, 256, (len(numbers), side, side, 3), dtype=torch.uint8)
    which = torch.tensor(numbers)
    made[:, 0, 0] = torch.stack([which % 256, which // 256 % 256, which // 65536], 1).to(torch.uint8)
    return Media.of(made)


def memory(pid: int) -> float:
    """MB that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def client(url: str, token: str, numbers: list[int], rows: int, side: int) -> int:
    """Has all of them scored, call by call; how many scores were right."""
    reward = remote(url=url, token_file=token, batch=rows, concurrency=2, codec="png")
    right, call = 0, 4 * rows
    for at in range(0, len(numbers), call):
        part = numbers[at : at + call]
        scores = reward.score(pictures(part, side), [f"picture {n}" for n in part], [{"n": n} for n in part])
        right += int((scores.ok[:, 0] & (scores.value[:, 0] == torch.tensor(part).float())).sum())
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--requests", type=int, default=6, help="that the server takes at a time")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with served("number", "--requests", str(a.requests)) as (url, token, pid):
        seen: list[tuple[float, float]] = []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.5):
                seen.append((memory(pid), memory(os.getpid())))

        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.monotonic()
        shares = [[*range(n, a.scores, a.clients)] for n in range(a.clients)]
        with ThreadPoolExecutor(a.clients) as pool:
            right = sum(pool.map(lambda share: client(url, token, share, a.rows, a.side), shares))
        took = time.monotonic() - began
        over.set()
        watcher.join()
        headers = {"Authorization": f"Bearer {Path(token).read_text().strip()}"}
        told = httpx.get(f"{url}/metrics", headers=headers).text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in told if not line.startswith("#"))
    print(f"{right} of {a.scores} scores right, {a.clients} clients, {a.rows} a request, {took:.0f} s")
    for name in ('rows_total{result="scored"}', 'rows_total{result="failed"}', "scorer_calls_total"):
        print(f"server: {name} {figures[f'tempflow_reward_{name}']}")
    for status in (200, 429):
        name = f'tempflow_reward_requests_total{{status="{status}"}}'
        print(f"server: answers {status}: {figures.get(name, '0')}")
    print("| memory, MB | first quarter | second | third | last | most |\n|---|---|---|---|---|---|")
    quarter = max(1, len(seen) // 4)
    for name, place in (("server", 0), ("clients", 1)):
        values = [one[place] for one in seen]
        parts = [statistics.median(values[n * quarter : (n + 1) * quarter] or values[-1:]) for n in range(4)]
        print(f"| {name} | " + " | ".join(f"{v:.0f}" for v in [*parts, max(values)]) + " |")


if __name__ == "__main__":
    main()
