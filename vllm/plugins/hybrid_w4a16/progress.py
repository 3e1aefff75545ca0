# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""A progress bar on standard error while a command runs; none if that is no terminal.

The commands' own output goes to standard output.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines inside; unlike vLLM's ``suppress_logging`` also after an error
    they are back."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class Progress:
    """A context manager around the work."""

    def __init__(self, title: str) -> None:
        self._bar: Any = tqdm(
            desc=title, disable=None, file=sys.stderr, leave=False, dynamic_ncols=True
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def total(self, steps: int) -> None:
        """How many calls of ``step`` there will be."""
        self._bar.total = steps
        self._bar.refresh()

    def step(self, name: str) -> None:
        """One step of ``name`` begins."""
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """A line that stays; printed whether or not there is a bar."""
        tqdm.write(text, file=sys.stderr)
