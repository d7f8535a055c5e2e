"""Import of coremltools without its warnings about the torch version, and about parts that only exist on a Mac and are not used."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from elmexport.errors import MissingDependencyError


@contextmanager
def quiet_coremltools() -> Iterator[None]:
    """Silence coremltools while something is imported from it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    logger = logging.getLogger("coremltools")
    logger.addFilter(_drop)
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "coremltools":
            raise
        raise MissingDependencyError("Core ML packages need coremltools; install it with: pip install 'coremltools>=9.0'") from None
    finally:
        logger.removeFilter(_drop)


def _drop(record: logging.LogRecord) -> bool:
    return False
