"""Runtime of ONNX artifacts: onnxruntime on the CPU. Its cache is static: past and present of a layer are one buffer as long as a context.

Not covered: other execution providers.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from elmexport.contracts.onnx import ATTENTION_MASK, CONTEXT_METADATA, EVERY_TOKEN, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, is_past, present_of
from elmexport.cores import asked_threads
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.runtimes.base import CHECK_TOKENS, Runtime
from elmexport.runtimes.batching import batches, copies, padded

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

# Tokens of a prompt that are read at a time where their logits are not wanted. 512 tokens of 270M int4 took 4 % longer at once than in two
# parts; the products round their input to 8 bits more than twice as slowly for twice as many rows.
CHUNK = 256
_CACHE_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntime(Runtime):
    """A model with one sequence in its cache."""

    name = "onnxruntime"
    # A product with one row has a kernel of its own, which sums in another order: two rows take a tenth longer, and round as any number does.
    step_tokens = 2

    def __init__(self, path: Path, *, check: bool = False) -> None:
        """Open the `.onnx` file `path`; for a `check` in little memory, with room for `CHECK_TOKENS` tokens where the cache's length is free.

        Raises:
            ElmExportError: a damaged file, or one that elmexport did not write.
            MissingDependencyError: onnxruntime is not installed.
        """
        super().__init__()
        session = _open(path, arena=not check)
        try:
            inputs = {entry.name: entry for entry in session.get_inputs()}
            outputs = {entry.name: entry for entry in session.get_outputs()}
            context = session.get_modelmeta().custom_metadata_map.get(CONTEXT_METADATA)
            if context is None or LOGITS not in outputs:
                raise ElmExportError(
                    f"{path} is an ONNX model, but none that elmexport wrote (its metadata has no {CONTEXT_METADATA}); export it with elmexport"
                )
            self._session: InferenceSession | None = session
            self._inputs = [entry for name, entry in inputs.items() if is_past(name)]
            self.context, self.vocab_size = int(context), int(outputs[LOGITS].shape[2])
            if check and not any(isinstance(past.shape[2], int) for past in self._inputs):
                self.context = min(self.context, CHECK_TOKENS)
            self._sequence: _Sequences | None = _Sequences(session, self._inputs, 1, self.context)
        except (ValueError, LookupError, TypeError, OverflowError) as error:  # of names that are no UTF-8, too
            raise ElmExportError(
                f"{path} has inputs or outputs that are not those of an export ({error}); copy it again or export it again"
            ) from None

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        sequence = self._open_sequence()
        size = ceil(len(ids) / ceil(len(ids) / CHUNK))  # equal parts: a short one at the end would read all weights for few tokens
        done = 0
        while len(ids) - done > max(size, last):
            part = ids[None, done : min(done + size, len(ids) - last)]
            done += part.shape[1]
            sequence.run(part, [position + done], keep=1)  # the fewest logits that the model gives
        return sequence.run(ids[None, done:], [position + len(ids)], keep=last)[0]

    def _continuations(self, continuations: list[NDArray[np.int64]], position: int) -> list[NDArray[np.float32]]:
        """The attention kernel takes several sequences with a past only token by token: worth it for many short continuations."""
        results: dict[int, NDArray[np.float32]] = {}
        for group in batches([len(ids) for ids in continuations], rows=copies(self.context, position)):
            members = [continuations[index] for index in group]
            if len(members) > 1 and (len(members[0]) < len(members) or not position):
                rows = self._batch(members, position)
            else:
                rows = [self._forward(ids, position, len(ids)) for ids in members]
            results |= dict(zip(group, rows, strict=True))
        return [results[index] for index in range(len(continuations))]

    def _batch(self, members: list[NDArray[np.int64]], position: int) -> list[NDArray[np.float32]]:
        """`members`, longest first, in a cache of their own."""
        prefix = self._open_sequence()
        ids, lengths = padded(members), np.array([len(member) for member in members])
        sequences = _Sequences(self._session, self._inputs, len(members), position + ids.shape[1])
        if not position:
            logits = sequences.run(ids, lengths)
        else:
            sequences.copy_prefix(prefix, position)
            # A row that has ended is fed padding, behind its own tokens.
            steps = range(ids.shape[1])
            logits = np.concatenate([sequences.run(ids[:, step : step + 1], [position + step + 1] * len(members)) for step in steps], 1)
        return [row[:length] for row, length in zip(logits, lengths, strict=True)]

    def _open_sequence(self) -> _Sequences:
        if self._sequence is None:
            raise ElmExportError("this runtime has been closed; open the artifact again")
        return self._sequence

    def close(self) -> None:
        self._session = self._sequence = None


class _Sequences:
    """Static caches of `batch` sequences, `length` tokens each (the context, where the model's caches have a fixed length).

    Past and present of a layer are one buffer: the attention kernel then appends in place, and reads no further than the attention mask
    reaches.
    """

    def __init__(self, session: InferenceSession, pasts: Sequence[Any], batch: int, length: int) -> None:
        from onnxruntime import OrtValue

        self._session, self._binding = session, session.io_binding()
        self._caches: list[OrtValue] = []  # the binding keeps pointers only
        for past in pasts:
            _, heads, fixed, head_dim = past.shape
            shape = (batch, heads, fixed if isinstance(fixed, int) else length, head_dim)
            buffer = OrtValue.ortvalue_from_numpy(np.zeros(shape, _CACHE_DTYPES[past.type]))
            self._caches.append(buffer)
            self._binding.bind_ortvalue_input(past.name, buffer)
            self._binding.bind_ortvalue_output(present_of(past.name), buffer)

    def copy_prefix(self, source: _Sequences, tokens: int) -> None:
        """Take over the first `tokens` tokens of `source`, which is one sequence, in every sequence."""
        for own, other in zip(self._caches, source._caches, strict=True):
            own.numpy()[:, :, :tokens] = other.numpy()[:, :, :tokens]

    def run(self, ids: NDArray[np.int64], ends: Sequence[int] | NDArray[np.int64], keep: int = EVERY_TOKEN) -> NDArray[np.float32]:
        """Logits `[batch, tokens, vocab]` of `ids` `[batch, tokens]`; with them, row i has `ends[i]` tokens and then padding.

        With `keep`, logits `[batch, keep, vocab]` of each row's last tokens.
        """
        from onnxruntime import OrtValue

        self._binding.bind_cpu_input(INPUT_IDS, np.ascontiguousarray(ids))
        self._binding.bind_cpu_input(ATTENTION_MASK, (np.arange(max(ends)) < np.asarray(ends)[:, None]).astype(np.int64))
        # An initializer that may be overridden: `bind_cpu_input` knows only the inputs proper.
        kept = OrtValue.ortvalue_from_numpy(np.array(keep, np.int64))
        self._binding.bind_ortvalue_input(LOGITS_TO_KEEP, kept)
        self._binding.bind_output(LOGITS)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise ElmExportError(
                f"onnxruntime cannot run the model ({_first_line(error)}): free memory, or, where the file is damaged, export it again"
            ) from None
        logits: NDArray[np.float32] = self._binding.get_outputs()[-1].numpy()
        return logits


def open_runtime(path: Path) -> OnnxRuntime:
    """Open an artifact folder, or a bare `.onnx` file with its external data beside it.

    Raises:
        ElmExportError: no model there, several, or a damaged one.
        MissingDependencyError: onnxruntime is not installed.
    """
    return OnnxRuntime(_model_file(path))


def open_for_check(path: Path) -> OnnxRuntime:
    """As `open_runtime`, in little memory, for at most `CHECK_TOKENS` tokens where the cache's length is free."""
    return OnnxRuntime(_model_file(path), check=True)


def _model_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("onnx/*.onnx"))
    if len(found) != 1:
        raise ElmExportError(f"{path} holds {len(found)} files of the form onnx/*.onnx, one is expected; give the path of the file to open")
    return found[0]


def _open(path: Path, *, arena: bool) -> InferenceSession:
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError("ONNX artifacts run in onnxruntime, which is not installed; pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: what goes wrong is raised
    options.enable_cpu_mem_arena = arena  # which keeps what it once held
    options.intra_op_num_threads = asked_threads() or 0  # 0: a thread for each physical core
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise ElmExportError(
            f"{path} or its external data cannot be opened ({_first_line(error)}); copy it again or export it again"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
