"""First opening of a model file in a process of its own.

Engines are C++, and a file that makes one abort, overrun or run for ever ends, or keeps, the process that it is read in. What opened once, and is the
same still, is opened directly: its size, place and times are noted in the cache, with those of the engine. So is what elmexport itself has just
written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from elmexport.cache import cached_path
from elmexport.errors import ElmExportError
from elmexport.formats import find_format, load

REFUSED = 10  # exit code of the process: the engine, or its runtime here, said itself what is wrong, and will say it again
_SAID_BY_OTHERS = (0, 1, 2, REFUSED)  # 1 and 2: Python's own, where the process could not even begin
# Processor time that opening a file and one token may take: for imports, and minutes for a GiB of weights.
_LEAST_SECONDS, _SECONDS_A_GIB = 10, 200
_OUT_OF_TIME = getattr(signal, "SIGXCPU", 0)  # Windows has neither the signal nor the limit
_AGAIN = "copy it again or export it again"
_LATER = frozenset({"manifest.json", "README.md", "recipe.toml"})  # what an export adds to the files that it vouches for


def probe(kind: str, path: Path) -> None:
    """Open `path` in the engine of the format `kind` and feed it one token, in a process of its own, where neither was done before.

    What is wrong by the engine's own account is not raised here: whoever opens the file is told.

    Raises:
        ElmExportError: the engine ended the process.
    """
    row = find_format(kind)
    try:
        note = _note(kind, path)
        seconds = _LEAST_SECONDS + _SECONDS_A_GIB * sum(file.stat().st_size for file in _files(path)) // (1 << 30)
    except OSError:  # nothing that could be opened
        return
    if note is None or note.exists():
        return
    code = _open_apart(kind, path, seconds)
    if code == 0:
        _write(note)
    elif code and code == -_OUT_OF_TIME:
        raise ElmExportError(f"{row.engine} did not open {path} in {seconds} s of processor time: the file is damaged; {_AGAIN}")
    elif code not in _SAID_BY_OTHERS:
        ending = f"code {code:#x}" if code > 0 else _name(-code)  # above 0: Windows
        raise ElmExportError(
            f"{row.engine} ended its process with {ending} while it opened {path}: the file is damaged, of another kind, or larger than the memory; "
            f"{_AGAIN}"
        )


def vouch(kind: str, path: Path) -> None:
    """Note that the files in `path` need no probing: elmexport has just written them."""
    with contextlib.suppress(OSError):
        if (note := _note(kind, path)) is not None:
            _write(note)


def _note(kind: str, path: Path) -> Path | None:
    """The file in the cache that says that `path` was opened before; its name changes with whatever may change how that ends.

    None where the engine is Python, or macOS, or is not installed, as whoever opens the file will say.
    """
    package, engine = find_format(kind).engine_package, None
    with contextlib.suppress(ImportError, ValueError):
        engine = None if package is None else find_spec(package)
    if engine is None or engine.origin is None:
        return None
    facts = [(file.name, *_identity(file)) for file in sorted(_files(path))]
    return cached_path("opened", [kind, engine.origin, _identity(Path(engine.origin)), facts], "")


def _files(path: Path) -> Iterator[Path]:
    """What the engine may read of `path`: the files of a folder, or a bare one and those beside it whose names begin like it."""
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.name not in _LATER and file.is_file())
        return
    stem = path.stem.partition("-00001-of-")[0]
    yield from (file for file in path.absolute().parent.iterdir() if file.name.startswith(stem) and file.is_file())


def _identity(file: Path) -> tuple[int, ...]:
    """What changes when a file is written to, or another one takes its place; the last, on most systems, nobody can set."""
    found = file.stat()
    return found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _write(note: Path) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written costs another process next time
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _open_apart(kind: str, path: Path, seconds: int) -> int:
    """Call `open_here` in a process of its own; its exit code, or the signal that ended it, negative."""
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}  # ggml would have a debugger look at the process
    root = Path(__file__).parents[2]  # of the package that runs, whatever lies in the working directory
    code = "import sys; sys.path.append(sys.argv[1]); from elmexport.runtimes.probing import open_here; open_here(*sys.argv[2:])"
    command = [sys.executable, "-P", "-c", code, str(root), kind, str(path), str(seconds)]
    nothing = subprocess.DEVNULL
    return subprocess.run(command, env=environment, stdin=nothing, stdout=nothing, stderr=nothing, check=False).returncode


def open_here(kind: str, path: str, seconds: str) -> None:
    """Open `path`, feed a token, and end the process: code 0, or `REFUSED`; killed after `seconds` of processor time."""
    code = REFUSED
    try:
        with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system
            import resource

            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
        load(find_format(kind).runtime)(Path(path)).greedy([0])
        code = 0
    finally:
        os._exit(code)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
