"""Import of coremltools without its warnings about the torch version, and about parts that only exist on a Mac and are not used."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from elmexport.errors import MissingDependencyError


@contextmanager
def quiet_coremltools() -> Iterator[None]:
    """Silence coremltools while something is imported from it, and hold back Ctrl-C.

    Its modules catch every exception as they are imported.

    Raises:
        MissingDependencyError: it is not installed.
    """
    logger = logging.getLogger("coremltools")
    logger.addFilter(_drop)
    try:
        with signals_held():
            yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "coremltools":
            raise
        raise MissingDependencyError("Core ML packages need coremltools; install it with: pip install 'coremltools>=9.0'") from None
    finally:
        logger.removeFilter(_drop)


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM until the end of the block; they are then handled as ever."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield
        return
    arrived: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    # A handler that Python did not install is None, and cannot be put back.
    own = {number: handler for number in (signal.SIGINT, signal.SIGTERM) if (handler := signal.getsignal(number)) is not None}
    for held in own:
        signal.signal(held, keep)
    try:
        yield
    finally:
        for held, handler in own.items():
            signal.signal(held, handler)
        for number in dict.fromkeys(arrived):
            signal.raise_signal(number)


def _drop(record: logging.LogRecord) -> bool:
    return False
