"""MLX, through mlx-lm: on a Mac's GPU as stored, on CPUs with scales, biases, norms and floating-point weights widened to fp32.

Codes stay as they are. CPUs multiply fp16 many times slower than fp32, and what is measured there is the stored numbers in exact
arithmetic (several tokens at once through numpy, see `mlx_products`); how much fp16 activations cost on a GPU it does not say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmexport.artifact import MANIFEST, Artifact
from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.models import read_config
from elmexport.runtimes.base import Runtime
from elmexport.runtimes.batching import in_padded_batches
from elmexport.runtimes.mlx_products import multiply_by_numpy

CHUNK = 512  # tokens fed at once


class MlxRuntime(Runtime):
    """A folder that mlx-lm loads, with a cache that holds `context` tokens."""

    name = "mlx"

    def __init__(self, folder: Path, context: int) -> None:
        """
        Raises:
            ElmExportError: mlx-lm cannot load the folder.
            MissingDependencyError: mlx-lm is not installed.
        """
        super().__init__()
        load_model = _mlx_lm()
        import mlx.core as mx
        from mlx.utils import tree_map
        from mlx_lm.models.cache import make_prompt_cache

        self.context = context
        self._folder = folder
        with self._errors("load"):
            self._model, config = load_model(folder, lazy=True)
            if not mx.metal.is_available():
                wide = tree_map(lambda array: array.astype(mx.float32) if _is_float(mx, array) else array, self._model.parameters())
                self._model.update(wide)
                multiply_by_numpy(self._model)
            mx.eval(self._model.parameters())
            self.vocab_size = int(config["vocab_size"])
        self._mx: Any = mx
        self._new_cache: Callable[[], list[Any]] = lambda: make_prompt_cache(self._model)
        self._cache = self._new_cache()

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Turn errors of the engine into ours: it looks at the sizes and kinds of what a `config.json` says only where it uses them."""
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ElmExportError(
                f"mlx-lm cannot {what} {self._folder}: {reason}. The files are damaged or of another kind; export it again"
            ) from None

    @property
    def _layers(self) -> Any:
        """The model without its head, by either of the names that mlx-lm's models give it."""
        return self._model.transformer if "transformer" in self._model else self._model.model

    def _forward(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        with self._errors("run"):
            return self._read_tokens(ids, position, last)

    def _read_tokens(self, ids: NDArray[np.int64], position: int, last: int) -> NDArray[np.float32]:
        mx = self._mx
        self._rewind(position)
        tokens = mx.array(ids.astype(np.int32))[None]
        rows: list[NDArray[np.float32]] = []
        first = len(ids) - last  # whose logits are wanted
        cuts = sorted({*range(0, len(ids), CHUNK), first, len(ids)})
        for start, end in pairwise(cuts):
            if start >= first:
                rows.append(self._read(self._model(tokens[:, start:end], cache=self._cache))[0])
            else:
                self._layers(tokens[:, start:end], cache=self._cache)
                mx.eval([layer.state for layer in self._cache])
        return np.concatenate(rows)

    def _continuations(self, continuations: list[NDArray[np.int64]], position: int) -> list[NDArray[np.float32]]:
        mx = self._mx
        self._rewind(position)

        def read(ids: NDArray[np.int64]) -> NDArray[np.float32]:
            caches = self._new_cache()
            for copy, own in zip(caches, self._cache, strict=True):
                if position:
                    keys, values = own.keys[..., :position, :], own.values[..., :position, :]
                    copy.keys, copy.values, copy.offset = mx.repeat(keys, len(ids), 0), mx.repeat(values, len(ids), 0), position
            return self._read(self._model(mx.array(ids.astype(np.int32)), cache=caches))

        with self._errors("run"):
            return in_padded_batches(continuations, self.context, position, read)

    def _rewind(self, position: int) -> None:
        """Forget what the cache holds from `position` on."""
        for layer in self._cache:
            layer.trim(layer.offset - position)

    def _read(self, logits: Any) -> NDArray[np.float32]:
        return np.array(logits.astype(self._mx.float32))

    def close(self) -> None:
        self._model, self._cache = None, []


def open_runtime(path: Path) -> MlxRuntime:
    """Open an artifact folder, or any other that mlx-lm loads.

    Raises:
        ElmExportError: files that mlx-lm cannot load.
        MissingDependencyError: mlx-lm is not installed.
    """
    if (path / MANIFEST).is_file():
        return MlxRuntime(path, Artifact.open(path).manifest.context)
    return MlxRuntime(path, read_config(path / "config.json").dims.context)


def _is_float(mx: Any, array: Any) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _mlx_lm() -> Any:
    """Import mlx-lm's loader.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        with _file_limit_kept():
            from mlx_lm.utils import load_model
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("mlx", "mlx_lm"):
            raise
        raise MissingDependencyError("running MLX models needs mlx-lm; install it with: pip install 'elmexport[mlx]'") from None
    return load_model


@contextlib.contextmanager
def _file_limit_kept() -> Iterator[None]:
    """Undo that mlx-lm, when it is imported, lowers how many files a process may open."""
    import resource

    soft, _ = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        yield
    finally:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        except ValueError:  # only root may raise the hard limit again
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard), hard))
