# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""A line of ``selftest``'s output. Importing this module imports nothing else."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RUNS = 20
"""Runs that must all write the same bits."""


@dataclass
class Group:
    """The results of the kernels on one line of the output."""

    name: str
    cases: int = 0
    rounds: int = 0
    """Shapes that ran."""
    planned: int = 0
    """Shapes that were planned."""
    error: float = 0.0
    """Worst relative error of an output, in the Frobenius norm."""
    tolerance: float = 0.0
    """The error that was allowed there."""
    where: str = ""
    repeated: int = 0
    """Cases in which ``RUNS`` runs wrote the same bits."""
    alone: tuple[int, int] = (0, 0)
    """Rows whose bits do not depend on the rest of the batch, and rows compared."""
    alone_difference: float = 0.0
    """Largest difference of an element in a batch from the same row alone, as a
    fraction of the row's largest element."""
    failure: str | None = None

    def note(self, error: float, tolerance: float, where: str) -> None:
        """Count a case with relative error ``error``; keep it if it is the worst."""
        self.cases += 1
        worst = self.error / self.tolerance if self.tolerance else -1.0
        if error / tolerance > worst:
            self.error, self.tolerance, self.where = error, tolerance, where

    def line(self) -> str:
        """The group as a line of text."""
        text = f"{'ok ' if self.failure is None else 'NO '} {self.name:<24}"
        text += f" {self.cases:>4} cases"
        if self.rounds < self.planned and self.failure is None:
            text += f" ({self.rounds} of {self.planned} shapes, out of time)"
        if self.tolerance:
            text += (
                f", worst error {self.error:.1e} of {self.tolerance:.0e} ({self.where})"
            )
        if self.repeated:
            text += f"; {RUNS} identical runs in {self.repeated} cases"
        same, rows = self.alone
        if rows:
            text += f"; {same}/{rows} rows identical alone and in a batch"
            if same < rows:
                text += f" (largest difference {self.alone_difference:.1e} of the row)"
        return text

    def note_alone(self, in_batch: "torch.Tensor", alone: "torch.Tensor") -> None:
        """Compare a row, or a token's rows, from a batch with the same one alone.

        Both: fp16/bf16 [rows, columns]; rows that no kernel wrote are NaN in both.
        """
        same, rows = self.alone
        equal = in_batch.nan_to_num().equal(alone.nan_to_num())
        self.alone = same + equal, rows + 1
        if not equal:
            difference = (in_batch.double() - alone.double()).abs().nan_to_num()
            size = alone.double().abs().nan_to_num().amax(1, keepdim=True)
            worst = float((difference / size.clamp(min=1e-30)).max())
            self.alone_difference = max(self.alone_difference, worst)
