"""Faults of the machine: full disks, folders that only may be read, too little memory, failing renames, damaged caches and those of an older version,
no network, a clock set back, two processes at once.

    python -m tests.endurance.faults [--command export|calibrate|eval] [--fault NAME]     (as root, for the small disks)

Every command must end by itself with an exit code of its own and a message, leave nothing that looks finished and is not, and work once the
fault is gone. Prints a JSON line a command and fault: runs, how they ended. Exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.endurance.kill import SUFFIX, WORK, compared, ended, prepared, started

_NEW_NETWORK = 0x40000000  # Linux's flag for a network of one's own, which reaches nobody
_FUTURE = 4_070_908_800  # the year 2099, in seconds


@dataclass(frozen=True)
class Place:
    """Where one command reads and writes."""

    corpus: Path
    root: Path
    name: str  # of the command in `WORK`
    number: int  # which of its variants

    @property
    def out(self) -> Path:
        return self.root / "place" / f"out{SUFFIX[self.name]}"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def command(self) -> Sequence[str]:
        return WORK[self.name].commands(self.corpus, self.out)[self.number]

    def run(self, before: Callable[[], None] = lambda: None) -> int:
        """The exit code, after what the command said and left was looked at."""
        log = self.root / "log"
        code, _ = ended(started(self.command, self.cache, log, before))
        said = log.read_text(errors="replace")
        assert code in (0, 1, 2, 3), f"ends with {code}: {said[-1500:]}"
        assert code == 0 or "error: " in said, f"exit code {code} without a message: {said[-500:]}"
        assert len(said) < 20_000
        if code == 0:
            WORK[self.name].result(self.out)
        else:
            assert not self.out.exists(), f"exit code {code}, and yet there is {self.out.name}"
        return code

    def clear(self) -> None:
        for folder in (self.out.parent, self.cache):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A disk of its own in memory at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(place: Place) -> Iterator[int]:
    """Output, then cache, on disks of 4 KiB to 2 MiB."""
    for folder in (place.out.parent, place.cache):
        for size in ("4k", "16k", "64k", "128k", "256k", "512k", "1m", "2m"):
            place.clear()
            with disk(folder, f"size={size}"):
                yield place.run()


def read_only(place: Place) -> Iterator[int]:
    """Output, then cache, where nothing may be written."""
    for folder in (place.out.parent, place.cache):
        place.clear()
        with disk(folder, "ro"):
            yield place.run()


def memory(place: Place) -> Iterator[int]:
    """Address space that ends 0 to 512 MiB above what the program takes before it begins."""
    for more in (0, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512):
        place.clear()

        def limit(more: int = more) -> None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (more << 20),) * 2)

        yield place.run(limit)


def renames(place: Place) -> Iterator[int]:
    """The first to fourth rename fails, as on a network file system."""
    for number in range(4):
        for code in (errno.EIO, errno.ESTALE, errno.EXDEV, errno.EBUSY):
            place.clear()
            yield place.run(lambda number=number, code=code: _failing_renames(number, code))  # type: ignore[misc]


def _failing_renames(number: int, code: int) -> None:
    count = iter(range(1 << 30))

    def failing(own: Callable[..., Any]) -> Callable[..., Any]:
        def rename(*arguments: Any, **options: Any) -> Any:
            if next(count) == number:
                raise OSError(code, os.strerror(code), str(arguments[0]))
            return own(*arguments, **options)

        return rename

    os.rename, os.replace = failing(os.rename), failing(os.replace)


def no_home(place: Place) -> Iterator[int]:
    """No HOME, no folder for temporary files but the output's."""

    def forget() -> None:
        for name in ("HOME", "XDG_CACHE_HOME", "ELMEXPORT_CACHE"):
            os.environ.pop(name, None)
        os.environ["HOME"] = "/nonexistent"

    place.clear()
    yield place.run(forget)


def damaged_cache(place: Place) -> Iterator[int]:
    """Every file of the cache cut, emptied, overwritten, or from the future."""
    place.clear()
    assert place.run() == 0
    sound = WORK[place.name].result(place.out)
    kept = place.root / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(place.cache, kept)
    for file in sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file()):
        data = (kept / file).read_bytes()
        for content in (b"", data[: len(data) // 2], bytes(len(data)), b"{}", data):
            place.clear()
            shutil.copytree(kept, place.cache, dirs_exist_ok=True)
            (place.cache / file).write_bytes(content)
            os.utime(place.cache / file, (_FUTURE, _FUTURE))
            code = place.run()
            if code == 0:
                compared(sound, WORK[place.name].result(place.out))
            yield code


def no_network(place: Place) -> Iterator[int]:
    """Not even this machine can be reached."""

    def cut() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK):
            raise OSError(ctypes.get_errno(), "cannot leave the network; run this as root")

    place.clear()
    code = place.run(cut)
    assert code == 0, "a model of this machine needs no network"
    yield code


def clock_set_back(place: Place) -> Iterator[int]:
    """A second run, on what the first one left in the cache, whose clock stands before its files were written: by a minute, or in 1971."""

    def set_back(own: Callable[[], float], seconds: float) -> None:
        time.time = lambda: max(own() - seconds, 365 * 86400)  # type: ignore[assignment]
        time.time_ns = lambda: int(time.time() * 1e9)

    for seconds in (60.0, 1e10):
        place.clear()
        assert place.run() == 0
        sound = WORK[place.name].result(place.out)
        _remove(place.out)
        code = place.run(lambda seconds=seconds: set_back(time.time, seconds))  # type: ignore[misc]
        assert code == 0 and compared(sound, WORK[place.name].result(place.out)) == 0
        yield code


def older_cache(place: Place) -> Iterator[int]:
    """A cache that another version of elmexport filled is not taken for this one's, and does no harm."""

    def older() -> None:
        for module in list(sys.modules.values()):
            if module.__name__.split(".")[0] in ("elmexport", "calibration", "targets") and hasattr(module, "__version__"):
                module.__version__ = "0.0.1"

    place.clear()
    assert place.run() == 0
    sound = WORK[place.name].result(place.out)
    place.clear()
    assert place.run(older) == 0
    _remove(place.out)
    code = place.run()
    assert code == 0 and compared(sound, WORK[place.name].result(place.out)) == 0
    yield code


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def two_at_once(place: Place) -> Iterator[int]:
    """Two processes with one output and one cache: one of them at least succeeds, and what is there is whole."""
    for _ in range(3):
        place.clear()
        logs = [place.root / f"log{i}" for i in range(2)]
        codes = [ended(pid)[0] for pid in [started(place.command, place.cache, log) for log in logs]]
        assert 0 in codes and set(codes) <= {0, 2}, f"{codes}: {[log.read_text(errors='replace')[-800:] for log in logs]}"
        WORK[place.name].result(place.out)
        yield from codes


FAULTS: Mapping[str, Callable[[Place], Iterator[int]]] = {
    "full disk": full_disk,
    "read-only": read_only,
    "memory": memory,
    "renames": renames,
    "no home": no_home,
    "damaged cache": damaged_cache,
    "older cache": older_cache,
    "no network": no_network,
    "clock set back": clock_set_back,
    "two at once": two_at_once,
}


def inject(corpus: Path, name: str, fault: str) -> dict[str, Any]:
    """Every variant of the command `name` under `fault`, and once more without it.

    Raises:
        AssertionError: see the module.
    """
    codes = Counter[int]()
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        for number in range(len(WORK[name].commands(corpus, Path(root)))):
            place = Place(corpus, Path(root), name, number)
            codes.update(FAULTS[fault](place))
            for path in place.out.parent.iterdir():
                _remove(path)
            assert place.run() == 0, "fails though the fault is gone"
    return {"command": name, "fault": fault, "runs": codes.total(), "ended with": dict(sorted(codes.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", action="append", choices=list(WORK), help="may be repeated; all without")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="may be repeated; all without")
    parser.add_argument("--corpus", type=Path, help="folder of the corpus of the fuzzing; made without")
    given = parser.parse_args()
    failed = False
    with prepared(given.corpus) as corpus:
        for fault in given.fault or FAULTS:
            for name in given.command or WORK:
                try:
                    print(json.dumps(inject(corpus, name, fault)), flush=True)
                except AssertionError as error:
                    print(json.dumps({"command": name, "fault": fault, "wrong": str(error)}), flush=True)
                    failed = True
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
