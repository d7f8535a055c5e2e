"""Runtime of GGUF artifacts: llama.cpp on the CPU, through the C interface that llama-cpp-python wraps.

Set up to be compared with, not for speed alone: keys and values in float32, plain attention. llama.cpp itself rounds the input of each
matrix product to the precision that goes with the weights' type (fp16 for F16, bf16 for BF16, 8-bit blocks for Q8_0 and Q4_0).

Truncated files and broken headers are errors. Metadata that were altered yet still parse can make llama.cpp end the process, which is why files are
opened in another one first (`elmexport.runtimes.probing`).
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmexport.cores import asked_threads, available_cores
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.runtimes.base import CHECK_TOKENS, Runtime
from elmexport.runtimes.batching import FULL_CACHES, batches
from elmexport.runtimes.sequences import Sequences

BATCH = 512  # tokens in one call of the engine
SEQUENCES = 32  # that one call can hold beside the one of `logits`
_F32 = 0  # ggml's number of the type
_ERROR = 4  # ggml's level of messages that say what went wrong
_LATER_PART = re.compile(r"-(?!00001-)\d{5}-of-\d{5}\.gguf$")  # of a split file; llama.cpp finds these by the first one's name

_messages: list[str] = []  # the errors that llama.cpp has reported since they were last cleared


class LlamaCppRuntime(Runtime):
    """A `.gguf` file in llama.cpp, with a cache of the context that its metadata state."""

    name = "llama.cpp"

    def __init__(self, path: Path, *, check: bool = False) -> None:
        """Load the file; for a `check` in little memory, with a cache of `CHECK_TOKENS` tokens and the weights as the file holds them.

        Raises:
            ElmExportError: llama.cpp cannot load the file.
            MissingDependencyError: llama-cpp-python is not installed.
        """
        super().__init__()
        self._model: Any = None
        self._handle: Any = None
        self._flash = 0
        self._batch: Any = None
        self._lib = engine()
        check_magic(path)
        _messages.clear()
        model_params = self._lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        if check and hasattr(model_params, "use_extra_bufts"):
            model_params.use_extra_bufts = False  # no second copy of the weights, arranged for the processor
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise ElmExportError(
                f"llama.cpp cannot load {path}: {reason()}. The file is damaged or of another kind; copy it again or export it again"
            )
        self.vocab_size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self.context = self._lib.llama_model_n_ctx_train(self._model)
        if check:
            self.context = min(self.context, CHECK_TOKENS)
        self._batch_size = self.context if check else BATCH
        self.batch_tokens = max(FULL_CACHES * self.context, BATCH)
        self._path = path
        self._handle = self._open_context(self._context_params())
        self._batch = self._new_batch()

    def _open_context(self, params: Any) -> Any:
        handle = self._lib.llama_init_from_model(self._model, params)
        if not handle:
            raise ElmExportError(
                f"llama.cpp cannot make a context of {params.n_ctx} tokens for {self._path}: {reason()}. Free memory and try again"
            )
        return handle

    def prepare_generation(self) -> None:
        """Switch to flash attention, which computes each token alike however many there are; plain attention's products do not."""
        self._memory()
        self._lib.llama_free(self._handle)
        self._handle, self.length = None, 0
        self._flash = 1
        self._handle = self._open_context(self._context_params())

    def _context_params(self) -> Any:
        params = self._lib.llama_context_default_params()
        # Sequences share one pool of cells: the cells of a prefix belong to all of its continuations, nothing is copied.
        params.kv_unified, params.n_seq_max = True, SEQUENCES + 1
        params.n_ctx = self.context + self._batch_size  # a full sequence 0 leaves room for a batch of continuations
        params.n_batch = params.n_ubatch = self._batch_size
        params.n_threads = params.n_threads_batch = asked_threads() or available_cores()
        params.type_k = params.type_v = _F32
        params.flash_attn_type = self._flash  # 0: disabled; versions that lack the field have it off by default
        params.offload_kqv = params.op_offload = False
        return params

    def _new_batch(self) -> Any:
        """Room for `BATCH` tokens, each of one sequence."""
        batch = self._lib.llama_batch_init(BATCH, 0, 1)
        for i in range(BATCH):
            batch.n_seq_id[i] = 1
        return batch

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        return self.feed(0, ids, position, last)

    def feed(self, sequence: int, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        """Feed `ids` at `position` of a sequence, which forgets what came after; logits `[last, vocab]` of the last `last` tokens."""
        self.cut(sequence, position)
        result = np.empty((last, self.vocab_size), dtype=np.float32)
        wanted = np.arange(len(ids)) >= len(ids) - last
        done = 0
        for start in range(0, len(ids), BATCH):
            part = slice(start, start + BATCH)
            positions = np.arange(position + start, position + start + len(ids[part]))
            logits = self.decode(ids[part], positions, np.full_like(positions, sequence), wanted[part])
            result[done : done + len(logits)] = logits
            done += len(logits)
        return result

    def _continuations(self, continuations: list[NDArray[np.int64]], position: int) -> list[NDArray[np.float32]]:
        results: dict[int, NDArray[np.float32]] = {}
        for group in batches([len(ids) for ids in continuations], rows=SEQUENCES, tokens=BATCH, padding=BATCH):  # none is padded here
            members = [continuations[index] for index in group]
            if len(members) == 1:
                results[group[0]] = self._forward(members[0], position, len(members[0]))
                continue
            lengths = [len(ids) for ids in members]
            memory = self._memory()
            self._lib.llama_memory_seq_rm(memory, 0, position, -1)
            for sequence in range(1, len(members) + 1):
                self._lib.llama_memory_seq_cp(memory, 0, sequence, 0, position)
            try:
                logits = self.decode(
                    np.concatenate(members),
                    position + np.concatenate([np.arange(length) for length in lengths]),
                    np.repeat(np.arange(1, len(members) + 1), lengths),
                    np.ones(sum(lengths), np.bool_),
                )
            finally:
                for sequence in range(1, len(members) + 1):
                    self._lib.llama_memory_seq_rm(memory, sequence, -1, -1)
            results |= dict(zip(group, np.split(logits.copy(), np.cumsum(lengths)[:-1]), strict=True))
        return [results[index] for index in range(len(continuations))]

    def _memory(self) -> Any:
        if not self._handle:
            raise ElmExportError("this runtime has been closed; open the artifact again")
        return self._lib.llama_get_memory(self._handle)

    def _sequences(self, lengths: Sequence[int]) -> Sequences:
        self._memory()
        params = self._context_params()
        # A pool for each: in a shared one, where a prompt's cells lie changes how attention rounds.
        params.kv_unified, params.n_seq_max = False, len(lengths)
        params.n_ctx = len(lengths) * max(lengths)  # llama.cpp rounds it up
        return _LlamaCppSequences(self, self._open_context(params))

    def cut(self, sequence: int, position: int) -> None:
        """Forget what a sequence holds from `position` on."""
        self._lib.llama_memory_seq_rm(self._memory(), sequence, position, -1)

    @contextmanager
    def using(self, handle: Any) -> Iterator[None]:
        """Compute in another context for a while."""
        own, self._handle = self._handle, handle
        try:
            yield
        finally:
            self._handle = own

    def free(self, handle: Any) -> None:
        """Free another context."""
        self._lib.llama_free(handle)

    def decode(
        self, ids: NDArray[np.int64], positions: NDArray[np.int64], sequences: NDArray[np.int64], wanted: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Feed at most `BATCH` tokens, each at its position of its sequence; logits where `wanted`, which the next call overwrites."""
        batch, count = self._batch, len(ids)
        batch.n_tokens = count
        for field, values in (("token", ids), ("pos", positions), ("logits", wanted)):
            np.ctypeslib.as_array(getattr(batch, field), shape=(count,))[:] = values
        for i, sequence in enumerate(sequences.tolist()):
            batch.seq_id[i][0] = sequence
        _messages.clear()
        code = self._lib.llama_decode(self._handle, batch)
        if code:
            raise ElmExportError(f"llama.cpp failed on {count} tokens at position {positions[0]} (code {code}: {reason()})")
        rows = int(wanted.sum())
        if not rows:
            return np.empty((0, self.vocab_size), np.float32)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._handle), shape=(rows, self.vocab_size))

    def close(self) -> None:
        # In this order: the context refers to the model.
        if self._batch is not None:
            self._lib.llama_batch_free(self._batch)
        if self._handle:
            self._lib.llama_free(self._handle)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._handle = self._batch = None

    def __del__(self) -> None:
        # llama.cpp's memory is not Python's: without this, a runtime that is merely dropped would keep it.
        # When the interpreter ends, the library's functions may be gone already, and the system takes the memory.
        if getattr(self, "_lib", None) is not None and not sys.is_finalizing():
            self.close()


class _LlamaCppSequences(Sequences):
    """Sequences in a context of their own, `handle`."""

    def __init__(self, runtime: LlamaCppRuntime, handle: Any) -> None:
        self._runtime, self._handle = runtime, handle

    def read(self, number: int, ids: Sequence[int], position: int) -> NDArray[np.float32]:
        with self._runtime.using(self._handle):
            return self._runtime.feed(number, self._runtime.check_ids(ids), position, 1)[0]

    def step(self, numbers: Sequence[int], ids: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
        tokens, places, sequences = (np.asarray(values, np.int64) for values in (ids, positions, numbers))
        with self._runtime.using(self._handle):
            for number, position in zip(numbers, positions, strict=True):
                self._runtime.cut(number, position)
            return self._runtime.decode(tokens, places, sequences, np.ones(len(ids), np.bool_)).copy()

    def close(self) -> None:
        self._runtime.free(self._handle)


def open_runtime(path: Path) -> LlamaCppRuntime:
    """Open an artifact folder that holds one `.gguf`, or the file itself.

    Raises:
        ElmExportError: no such file, several, or one that llama.cpp cannot load.
        MissingDependencyError: llama-cpp-python is not installed.
    """
    return LlamaCppRuntime(gguf_file(path))


def open_for_check(path: Path) -> LlamaCppRuntime:
    """As `open_runtime`, in little memory, for at most `CHECK_TOKENS` tokens."""
    return LlamaCppRuntime(gguf_file(path), check=True)


def gguf_file(path: Path) -> Path:
    """The one `.gguf` in the folder `path`, the first of one that is split, or the file itself.

    Raises:
        ElmExportError: none in the folder, or several.
    """
    if not path.is_dir():
        return path
    found = sorted(file for file in path.glob("*.gguf") if not _LATER_PART.search(file.name))
    if len(found) != 1:
        raise ElmExportError(f"{path} holds {len(found)} .gguf files; give the path of one")
    return found[0]


@cache
def engine() -> Any:
    """The llama_cpp module, its messages collected instead of printed.

    Raises:
        MissingDependencyError: it is not installed, or its library does not load.
    """
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        raise MissingDependencyError("running GGUF files needs llama.cpp; install it with: pip install 'elmexport[llama]'") from None
    except (OSError, RuntimeError) as error:  # a library of the system that is not there, or not the one it was built with
        raise MissingDependencyError(
            f"llama.cpp is installed, but does not load ({error}); install the library that is named there, or build llama.cpp anew: "
            "pip install --force-reinstall --no-cache-dir llama-cpp-python"
        ) from None
    llama_cpp.llama_log_set(_collector(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache  # ctypes callbacks must outlive the library's use of them
def _collector(lib: Any) -> Any:
    @lib.llama_log_callback
    def collect(level: int, text: bytes, user_data: Any) -> None:
        if level == _ERROR:
            _messages.append(text.decode("utf-8", "replace").strip())

    return collect


def reason() -> str:
    """llama.cpp's first error since the last call: the specific one, those that follow only say that loading failed."""
    first = _messages[0] if _messages else "it gave no reason"
    _messages.clear()
    # Without the C function's name, "llama_model_load: error loading model: ".
    return re.sub(r"^\w+: (error loading model: )?", "", first).rstrip(".")


def check_magic(path: Path) -> None:
    """Refuse files that are not GGUF.

    Raises:
        ElmExportError: no such file, or one that does not start as GGUF files do.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ElmExportError(f"cannot read {path}: {error.strerror or error}") from None
    if magic != b"GGUF":
        raise ElmExportError(f"{path} is not a GGUF file (it starts with {magic!r}); give the .gguf that an export wrote")
