"""Where the program's own log lines go: standard error, one line each."""

from __future__ import annotations

import logging


def configure(level: str) -> None:
    """Send records of the `minisgl` loggers at `level` and above to standard error."""
    logger = logging.getLogger("minisgl")
    logger.setLevel(level)
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
