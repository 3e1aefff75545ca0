# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the hybrid-w4a16 project
"""A progress bar on standard error while a command runs, if that is a terminal.

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
    """Suppress log lines inside. Unlike with vLLM's ``suppress_logging`` they return
    even after an error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class Progress:
    """A context manager that shows the progress of the work inside."""

    def __init__(self, title: str) -> None:
        self._bar: Any = tqdm(
            desc=title, disable=None, file=sys.stderr, leave=False, dynamic_ncols=True
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def total(self, steps: int) -> None:
        """Set how many calls of ``step`` there will be."""
        self._bar.total = steps
        self._bar.refresh()

    def step(self, name: str) -> None:
        """Begin one step of ``name``."""
        self._bar.set_postfix_str(name, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Print a permanent line, with or without a bar."""
        tqdm.write(text, file=sys.stderr)
