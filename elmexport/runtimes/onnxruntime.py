"""onnxruntime on the processor, with a static cache: past and present of a layer are one buffer as long as the context.

Not covered: other execution providers, batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.runtimes.base import Runtime

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

CONTEXT_KEY = "elmexport.context"
_CACHE_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntime(Runtime):
    """A model with one sequence in its cache."""

    name = "onnxruntime"

    def __init__(self, path: Path) -> None:
        """Open the `.onnx` file `path`.

        Raises:
            ElmExportError: a damaged file, or one that elmexport did not write.
            MissingDependencyError: onnxruntime is not installed.
        """
        super().__init__()
        session = _open(path)
        inputs = {entry.name: entry for entry in session.get_inputs()}
        outputs = {entry.name: entry for entry in session.get_outputs()}
        context = session.get_modelmeta().custom_metadata_map.get(CONTEXT_KEY)
        if context is None or "logits" not in outputs:
            raise ElmExportError(
                f"{path} is an ONNX model, but none that elmexport wrote (its metadata has no {CONTEXT_KEY}); export it with elmexport"
            )
        self.context, self.vocab_size = int(context), int(outputs["logits"].shape[2])
        self._session: InferenceSession | None = session
        self._binding: Any = session.io_binding()
        self._caches: list[OrtValue] = []  # the binding keeps pointers only
        for name, entry in inputs.items():
            if name.startswith("past_key_values."):
                _, heads, _, head_dim = entry.shape
                self._bind_cache(name, name.replace("past_key_values", "present"), heads, head_dim, _CACHE_DTYPES[entry.type])

    def _bind_cache(self, past: str, present: str, heads: int, head_dim: int, dtype: type) -> None:
        """One buffer for both: the attention kernel then appends in place, and reads no further than the attention mask reaches."""
        from onnxruntime import OrtValue

        buffer = OrtValue.ortvalue_from_numpy(np.zeros((1, heads, self.context, head_dim), dtype))
        self._caches.append(buffer)
        self._binding.bind_ortvalue_input(past, buffer)
        self._binding.bind_ortvalue_output(present, buffer)

    def _forward(self, ids: NDArray[np.int64], position: int, last_only: bool) -> NDArray[np.float32]:
        if self._session is None:
            raise ElmExportError("this runtime has been closed; open the artifact again")
        self._binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids)[None])
        self._binding.bind_cpu_input("attention_mask", np.ones((1, position + len(ids)), np.int64))
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        logits: NDArray[np.float32] = self._binding.get_outputs()[-1].numpy()[0]
        return logits[-1:] if last_only else logits

    def close(self) -> None:
        self._session = self._binding = None
        self._caches.clear()


def open_runtime(path: Path) -> OnnxRuntime:
    """Open an artifact folder, or a bare `.onnx` file with its external data beside it.

    Raises:
        ElmExportError: no model there, several, or a damaged one.
        MissingDependencyError: onnxruntime is not installed.
    """
    if path.is_dir():
        found = sorted(path.glob("onnx/*.onnx"))
        if len(found) != 1:
            raise ElmExportError(
                f"{path} holds {len(found)} files of the form onnx/*.onnx, one is expected; give the path of the file to open"
            )
        path = found[0]
    return OnnxRuntime(path)


def _open(path: Path) -> InferenceSession:
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError("ONNX artifacts run in onnxruntime, which is not installed; pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: what goes wrong is raised
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        raise ElmExportError(
            f"{path} or its external data cannot be opened ({_first_line(error)}); copy it again or export it again"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
