"""Strings of helix, strand and coil, and a masked diffusion model that writes them.

The shape of the paper's protein experiments: the statistic says whether a protein has
at most so much helix and at most so much strand, for a grid of such limits. Here the
strings are only the secondary structure, and both the laboratory that the model learns
from and the nature that it is calibrated to are Markov chains. How many residues of a
kind a Markov chain has is known exactly, so that every target is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

Array = NDArray[np.float64]

LETTERS = "HEC"
HELIX, STRAND, COIL, MASK = range(4)


# -- Markov chains ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Chain:
    """A stationary Markov chain over helix, strand and coil.

    Attributes:
        transitions: float64 [3, 3]; row s holds the probabilities of what follows s.
    """

    transitions: Array

    @property
    def start(self) -> Array:
        """The stationary distribution, float64 [3]: how a string begins."""
        balance = np.vstack([self.transitions.T - np.eye(3), np.ones(3)])
        solution: Array = np.linalg.lstsq(balance, np.array([0, 0, 0, 1.0]))[0]
        return solution

    def sample(self, n: int, length: int, generator: torch.Generator) -> Tensor:
        """Draw strings, integer [n, length]."""
        transitions = torch.from_numpy(self.transitions)
        start = torch.from_numpy(self.start).expand(n, 3)
        letters = [torch.multinomial(start, 1, generator=generator)]
        for _ in range(length - 1):
            following = transitions[letters[-1].squeeze(1)]
            letters.append(torch.multinomial(following, 1, generator=generator))
        return torch.cat(letters, 1)

    def log_prob(self, strings: Tensor) -> Tensor:
        """Log-probability, float64 [n], of strings [n, length]."""
        strings = strings.cpu()
        start = torch.from_numpy(self.start).log()[strings[:, 0]]
        step = torch.from_numpy(self.transitions).log()[strings[:, :-1], strings[:, 1:]]
        return start + step.sum(1)

    def count_probabilities(self, length: int) -> Array:
        """P(n_H helix and n_E strand residues), float64 [length + 1, length + 1].

        Dynamic programming over the string: after each residue the table holds the
        probability of (n_H, n_E, last residue).
        """
        table = np.zeros((length + 1, length + 1, 3))
        table[1, 0, HELIX], table[0, 1, STRAND], table[0, 0, COIL] = self.start
        for _ in range(length - 1):
            moved = table @ self.transitions
            table = np.zeros_like(table)
            table[1:, :, HELIX] = moved[:-1, :, HELIX]
            table[:, 1:, STRAND] = moved[:, :-1, STRAND]
            table[:, :, COIL] = moved[:, :, COIL]
        total: Array = table.sum(-1)
        return total

    def log_prob_given_counts(self, strings: Tensor) -> Tensor:
        """Log-probability [n] of strings among those with as much helix and strand."""
        counts = residue_counts(strings).cpu()
        table = torch.from_numpy(self.count_probabilities(strings.shape[1]))
        return self.log_prob(strings) - table[counts[:, 0], counts[:, 1]].log()


# Made up: half of the laboratory's residues are helix, in runs of 9; nature has less
# helix and twice the strand. Rows and columns: helix, strand, coil.
LABORATORY = Chain(
    np.array([[0.89, 0.01, 0.10], [0.03, 0.75, 0.22], [0.14, 0.06, 0.80]])
)
NATURE = Chain(np.array([[0.88, 0.01, 0.11], [0.02, 0.80, 0.18], [0.10, 0.10, 0.80]]))


def residue_counts(strings: Tensor) -> Tensor:
    """Number of helix and of strand residues, integer [n, 2], of strings [n, L]."""
    return torch.stack([(strings == s).sum(1) for s in (HELIX, STRAND)], 1)


def segments(strings: Tensor) -> Tensor:
    """Number of runs of equal residues, integer [n], of strings [n, L]."""
    return 1 + (strings[:, 1:] != strings[:, :-1]).sum(1)


def decode(string: Tensor) -> str:
    """The letters of one string [L]."""
    return "".join(LETTERS[i] for i in string.tolist())


# -- constraints -----------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Limits on helix and strand: h_ab(x) = 1[n_H(x) ≤ a and n_E(x) ≤ b].

    Each list of limits is completed by "any number"; the pair of both, which every
    string meets, is left out. The limits cut the counts into as many *cells* as there
    are pairs, and h depends on the cell alone.

    Attributes:
        helix: limits a, increasing.
        strand: limits b, increasing.
    """

    helix: tuple[int, ...]
    strand: tuple[int, ...]

    @property
    def constraints(self) -> int:
        """Number of constraints d."""
        return (len(self.helix) + 1) * (len(self.strand) + 1) - 1

    def cell(self, counts: Tensor) -> Tensor:
        """The cell, integer [n] from 0 to d, of residue counts [n, 2]."""
        helix, strand = (
            torch.bucketize(
                counts[:, i].contiguous(), torch.tensor(limits, device=counts.device)
            )
            for i, limits in enumerate((self.helix, self.strand))
        )
        return helix * (len(self.strand) + 1) + strand

    @property
    def indicators(self) -> Tensor:
        """The statistic h of every cell, float [d + 1, d]."""
        within = [
            torch.ones(len(limits) + 1, len(limits) + 1).triu()
            for limits in (self.helix, self.strand)
        ]
        return torch.kron(*within)[:, :-1]

    def __call__(self, paths: Paths) -> Tensor:
        """The statistic h, float [n, d]."""
        cell = self.cell(residue_counts(paths.strings))
        return self.indicators.to(cell.device)[cell]

    def cell_probabilities(self, counts: Array) -> Array:
        """Sum a table over (n_H, n_E), [L + 1, L + 1], within each cell: [d + 1]."""
        every = torch.from_numpy(np.argwhere(np.ones_like(counts)))
        cells = self.cell(every).numpy()
        sums = np.bincount(cells, counts.ravel(), minlength=self.constraints + 1)
        return sums.astype(np.float64)

    def coarser(self, helix: int, strand: int) -> Grid:
        """Keep so many parts a side: limits of this grid, about evenly spaced."""
        return Grid(_spread(self.helix, helix), _spread(self.strand, strand))


def _spread(limits: Sequence[int], parts: int) -> tuple[int, ...]:
    most = len(limits) + 1
    return tuple(limits[round(i * most / parts) - 1] for i in range(1, parts))


# -- the model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """Strings, and how masked diffusion wrote them.

    Attributes:
        strings: residues, integer [n, L].
        steps: the step, from 0, at which each position was unmasked, integer [n, L].
    """

    strings: Tensor
    steps: Tensor

    def __len__(self) -> int:
        return len(self.strings)

    def __getitem__(self, rows: slice | Tensor) -> Paths:
        return Paths(self.strings[rows], self.steps[rows])


class MaskedDiffusion(nn.Module):
    """Writes a string in a few steps, each filling in some masked positions at random.

    All residues of a step are drawn at once, each from what the network makes of the
    positions that are filled in already. Few positions are filled in at first and many
    at last (the cosine schedule of the paper's ESM3 experiment). Which, does not depend
    on the model, so that its probability cancels in every log-ratio and is left out.

    Args:
        length: positions of a string.
        steps: unmasking steps.
        width: of the two hidden layers of the network.

    Raises:
        ValueError: a step would fill in no position.
    """

    step_of_rank: Tensor
    one_hot: Tensor

    def __init__(self, length: int, steps: int, width: int) -> None:
        super().__init__()
        self.steps = steps
        self.network = nn.Sequential(
            *(nn.Linear(3 * length, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU()),
            nn.Linear(width, 3 * length),
        )
        masked = [
            round(length * math.cos(math.pi / 2 * k / steps)) for k in range(steps + 1)
        ]
        sizes = torch.tensor(masked[:-1]) - torch.tensor(masked[1:])
        if int(sizes.min()) < 1:
            raise ValueError(
                f"{steps} steps on a cosine schedule leave one of them without any of "
                f"the {length} positions: take fewer"
            )
        schedule = torch.arange(steps).repeat_interleave(sizes)
        self.register_buffer("step_of_rank", schedule, persistent=False)
        # A masked position is all zeros.
        self.register_buffer("one_hot", torch.eye(4)[:, :3], persistent=False)

    def random_steps(self, n: int) -> Tensor:
        """Deal the steps out to the positions at random, integer [n, L]."""
        order = torch.rand(n, len(self.step_of_rank), device=self.step_of_rank.device)
        return self.step_of_rank[order.argsort(1)]

    def sample(self, n: int) -> Paths:
        """Draw strings, each in an order of its own."""
        return self.unmask(self.random_steps(n))

    @torch.no_grad()
    def unmask(self, steps: Tensor) -> Paths:
        """Draw strings in given orders, integer [n, L]."""
        strings = torch.zeros_like(steps)
        # Adding Gumbel noise and taking the largest is drawing from the softmax; each
        # position is drawn once, and so are its three numbers.
        gumbel = -torch.empty(*steps.shape, 3, device=steps.device).exponential_().log()
        for step in range(self.steps):
            drawn = (self._logits(strings, steps < step) + gumbel).argmax(-1)
            strings = torch.where(steps == step, drawn, strings)
        return Paths(strings, steps)

    def log_prob(self, paths: Paths) -> Tensor:
        """Log-probability [n] of the strings given their orders, all steps at once."""
        step = torch.arange(self.steps, device=paths.steps.device)[:, None]
        known = paths.steps[:, None] < step
        logits = self._logits(paths.strings[:, None].expand_as(known), known)
        own = paths.steps[:, None, :, None].expand(-1, 1, -1, 3)
        chosen = logits.gather(1, own).squeeze(1).log_softmax(-1)
        return chosen.gather(-1, paths.strings[..., None]).sum((1, 2))

    def _logits(self, strings: Tensor, known: Tensor) -> Tensor:
        """Logits [..., L, 3] of every position, given those that are known."""
        seen = F.embedding(torch.where(known, strings, MASK), self.one_hot)
        logits: Tensor = self.network(seen.flatten(-2))
        return logits.unflatten(-1, (-1, 3))
