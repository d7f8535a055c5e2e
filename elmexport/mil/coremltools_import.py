"""Import of coremltools, without its warnings and without packages that it loads in vain.

Its warnings are about the torch version, and about parts that only exist on a Mac and are not used.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, version
from types import FrameType, ModuleType

from packaging.version import Version

from elmexport.errors import MissingDependencyError

_NEWEST_SKLEARN = "1.5.1"  # that coremltools 9.0 converts from: a newer one it loads, and then refuses with a warning


@contextmanager
def quiet_coremltools() -> Iterator[None]:
    """Silence coremltools while something is imported from it, hide from it what it would load in vain, and hold back Ctrl-C.

    Its modules catch every exception as they are imported. Half of the import's time are transformers, of which it only notes that it is there,
    and a scikit-learn that is too new for it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    logger = logging.getLogger("coremltools")
    logger.addFilter(_drop)
    try:
        with signals_held(), _hidden(_loaded_in_vain()):
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


def _loaded_in_vain() -> Collection[str]:
    """Names of the packages that coremltools would import, and not use."""
    try:
        too_new = Version(version("scikit-learn")) > Version(_NEWEST_SKLEARN)
    except PackageNotFoundError:
        too_new = False
    return ("transformers", "sklearn") if too_new else ("transformers",)


@contextmanager
def _hidden(names: Collection[str]) -> Iterator[None]:
    """Let packages that are not loaded yet seem not to be installed, in this thread and block."""
    finder = _Hiding(names, threading.get_ident())
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Hiding(MetaPathFinder):
    def __init__(self, names: Collection[str], thread: int) -> None:
        self._names, self._thread = names, thread

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname in self._names and threading.get_ident() == self._thread:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def _drop(record: logging.LogRecord) -> bool:
    return False
