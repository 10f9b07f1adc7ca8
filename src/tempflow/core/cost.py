"""What a plan costs, counted exactly; and compute in forward-equivalents, the unit in which methods are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a plan costs: rows given to the model, samples decoded and scored, transitions a loss uses.

    `forwards` counts every node that has a child once, guidance not doubled.  Costs add up, and scale with an int.
    `alone` are rows of networks with a guidance of their own, such as a teacher's; the negative prompts' are counted.
    """

    forwards: int
    leaves: int
    trained_edges: int
    alone: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forwards + other.forwards,
            self.leaves + other.leaves,
            self.trained_edges + other.trained_edges,
            self.alone + other.alone,
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(self.forwards * times, self.leaves * times, self.trained_edges * times, self.alone * times)

    __rmul__ = __mul__


def rows_of(guidance: float) -> int:
    """Rows of a network for each that is asked for: with guidance the negative prompt's beside it."""
    return 1 if guidance == 1 else 2


def equivalents(plain: int, trained: int, *, guided: bool, latent: int = 0, alone: int = 0) -> int:
    """Compute in forward-equivalents: a row through any network is 1 without gradient and 3 with it, as a backward is
    twice the work of its forward (Kaplan et al. 2020, section 2.1).

    plain    rows without gradient: rollouts, drafts, log-probs computed again, other weight sets
    trained  rows with gradient
    guided   each of those has the negative prompt's row beside it, which never has a gradient
    latent   rows through a latent reward, which guidance does not double
    alone    rows without gradient that have their negative prompt's among them (`Cost`)
    """
    return (plain + trained) * (2 if guided else 1) + 2 * trained + latent + alone
