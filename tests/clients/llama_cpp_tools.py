"""llama.cpp's own programs and its converter, for tests that compare with them. Of the version that llama-cpp-python bundles.

The source comes from llama-cpp-python's source distribution. The programs are linked with the libraries that its wheel has installed, so
that building them takes seconds, and that they compute with the very code that `elmexport.runtimes.llama_cpp` runs. All is kept in the
cache folder. `LLAMA_CPP_TOOLS=DIR` names a folder of programs built otherwise, inside llama.cpp's source.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.clients.interpreter import Interpreter
from tests.clients.kept import kept

PROGRAMS = {  # by the folder of their sources under tools/
    "quantize": "llama-quantize",
    "perplexity": "llama-perplexity",
    "imatrix": "llama-imatrix",
    "tokenize": "llama-tokenize",
    "gguf-split": "llama-gguf-split",
    "llama-bench": "llama-bench",
}
CONVERTER = "convert_hf_to_gguf.py"
# A thread of its own prints llama.cpp's messages, and the process may end before it has printed the last ones: it is waited for.
_DRAIN = """struct common_log;
extern struct common_log * common_log_main();
extern void common_log_pause(struct common_log * log);
__attribute__((destructor)) static void drain() { common_log_pause(common_log_main()); }
"""
_CONVERT = """
import runpy, sys
_, pre, *sys.argv = sys.argv
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
from conversion.base import TextModel
if not hasattr(TextModel, "by_hash"):
    TextModel.by_hash = TextModel.get_vocab_base_pre
TextModel.get_vocab_base_pre = (lambda self, tokenizer: pre) if pre else TextModel.by_hash
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_LIBRARIES = ("llama-common", "llama", "ggml", "ggml-cpu", "ggml-base")
_PARTS = ("common", "conversion", "ggml/include", "gguf-py", "include", "models", "src", "tools", "vendor", CONVERTER)


@dataclass(frozen=True)
class LlamaCppTools:
    """`programs` holds the executables, `source` the converter."""

    programs: Path
    source: Path

    def run(self, program: str, *arguments: object) -> str:
        """What `llama-quantize` and the like print, stdout before stderr; a failure fails the test."""
        return _run([self.programs / program, *arguments])

    def convert(self, model: Path, out: Path, outtype: str, *arguments: object, pre: str = "") -> Path:
        """Run llama.cpp's converter on the checkpoint folder `model`; `out` is the file, or the folder for the converter to name it in.

        It knows the pre-tokenizer of a byte-level vocabulary by the ids of one text, which only published vocabularies give: `pre` tells it.
        """
        words = [self.source / CONVERTER, model, "--outfile", out, "--outtype", outtype, *arguments]
        _converter().run(_CONVERT, pre, *map(str, words), folder=self.source)
        return out


@cache
def _converter() -> Interpreter:
    """Process in which the converter runs, for what it imports takes seconds."""
    interpreter = Interpreter(Path(tempfile.mkdtemp(prefix="converter-")) / "stderr.txt")
    atexit.register(interpreter.close)
    return interpreter


@cache
def llama_cpp_tools() -> LlamaCppTools:
    """The programs, built on first use. Without llama-cpp-python the test is skipped; what stands in the way otherwise fails it."""
    given = os.environ.get("LLAMA_CPP_TOOLS")
    if given:
        programs = Path(given).resolve()
        source = next((folder for folder in (programs, *programs.parents) if (folder / CONVERTER).is_file()), None)
        if source is None or not (programs / "llama-quantize").is_file():
            pytest.fail(f"LLAMA_CPP_TOOLS={given} must be a folder of llama.cpp's programs inside its source folder")
        return LlamaCppTools(programs, source)
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")
    release = version("llama-cpp-python")
    libraries = Path(sysconfig.get_path("platlib")) / "lib"
    common = sorted(libraries.glob("libllama-common.*"))
    if not common:
        pytest.fail(f"llama-cpp-python {release} has no libllama-common in {libraries}; set LLAMA_CPP_TOOLS to a folder of programs")
    built = hashlib.sha256(f"{common[0]} {common[0].stat().st_size} {_DRAIN}".encode()).hexdigest()[:8]
    source = kept(f"llama-cpp-python-{release}/source", lambda where: _extract(release, where))
    programs = kept(f"llama-cpp-python-{release}/programs-{built}", lambda where: _build(source, libraries, where))
    return LlamaCppTools(programs, source)


def _extract(release: str, folder: Path) -> None:
    """llama.cpp's source, as llama-cpp-python's source distribution has it."""
    with tempfile.TemporaryDirectory() as temporary:
        wanted = f"llama-cpp-python=={release}"
        _run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", temporary, wanted])
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            top = file.next().name.split("/")[0]  # type: ignore[union-attr]
            root = f"{top}/vendor/llama.cpp/"
            for member in file:
                inside = member.name.removeprefix(root)
                if inside != member.name and any(inside == part or inside.startswith(f"{part}/") for part in _PARTS):
                    member.name = inside
                    file.extract(member, folder, filter="data")


def _build(source: Path, libraries: Path, folder: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    include = [f"-I{source / part}" for part in ("include", "ggml/include", "common", "vendor", "src")]
    link = [f"-L{libraries}", *(f"-l{name}" for name in _LIBRARIES), "-lpthread", f"-Wl,-rpath,{libraries}"]
    if sys.platform == "linux":
        link.append("-Wl,--disable-new-dtags")  # the libraries find each other the same way

    drain = folder / "drain.cpp"
    drain.write_text(_DRAIN, encoding="utf-8")

    def build(tool: str) -> None:
        files = sorted((source / "tools" / tool).glob("*.cpp"))
        _run([compiler, "-std=c++17", "-O2", "-DNDEBUG", *include, *files, drain, *link, "-o", folder / PROGRAMS[tool]])

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(build, PROGRAMS))


def _run(command: list[object]) -> str:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError as error:
        pytest.fail(f"{words[0]}: {error.strerror}; install it, or set LLAMA_CPP_TOOLS to a folder of llama.cpp's programs")
    if done.returncode:
        pytest.fail(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr
