# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""A line of ``selftest``'s output; importing it imports nothing else."""

from dataclasses import dataclass

RUNS = 20
"""Runs that have to write the same bits."""


@dataclass
class Group:
    """What was found about the kernels of one line of the output."""

    name: str
    cases: int = 0
    rounds: int = 0
    """Shapes that ran ..."""
    planned: int = 0
    """... of so many."""
    error: float = 0.0
    """Worst relative error of an output, in the Frobenius norm."""
    tolerance: float = 0.0
    """What was allowed there."""
    where: str = ""
    repeated: int = 0
    """Cases of which ``RUNS`` runs wrote the same bits."""
    alone: tuple[int, int] = (0, 0)
    """Rows whose bits do not depend on the batch they come in, of rows compared."""
    failure: str | None = None

    def note(self, error: float, tolerance: float, where: str) -> None:
        self.cases += 1
        worst = self.error / self.tolerance if self.tolerance else -1.0
        if error / tolerance > worst:
            self.error, self.tolerance, self.where = error, tolerance, where

    def line(self) -> str:
        text = f"{'ok ' if self.failure is None else 'NO '} {self.name:<24}"
        text += f" {self.cases:>4} cases"
        if self.rounds < self.planned and self.failure is None:
            text += f" ({self.rounds} of {self.planned} shapes, out of time)"
        if self.tolerance:
            text += (
                f", worst error {self.error:.1e} of {self.tolerance:.0e} ({self.where})"
            )
        if self.repeated:
            text += f"; {RUNS} runs alike in {self.repeated} cases"
        same, rows = self.alone
        if rows:
            text += f"; {same}/{rows} rows the same alone as in a batch"
        return text
