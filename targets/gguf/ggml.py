"""ggml's own quantizer, called in the library that a wheel of llama.cpp's Python bindings brings: nothing is compiled here.

It serves the types whose codes only ggml finds (K- and IQ-types), and the simple ones where the bytes are to be `llama-quantize`'s.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elmexport.errors import ElmExportError, MissingDependencyError
from elmexport.quantization.ggml import GgmlType

if TYPE_CHECKING:
    from torch import Tensor

# Where ggml lies in each package that brings it, the smaller library first.
_LIBRARIES = {
    "llama_cpp": ("lib/libggml-base.so", "lib/libggml-base.dylib", "lib/ggml-base.dll", "bin/ggml-base.dll"),
    "xllamacpp": ("xllamacpp*.so", "xllamacpp*.pyd"),
}
_CHUNK = 1 << 17  # values quantized in one call: the temporaries of a thread stay in its cache


def quantize(weight: Tensor, kind: GgmlType, importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """The bytes `[out, row bytes]` of `weight` `[out, in]`, byte for byte what `llama-quantize` makes of the same float32 numbers.

    `importance` float32 `[in]` weighs the squared error of each input. Rows are independent, so the number of threads changes nothing.

    Raises:
        ElmExportError: weights too large for the type's fp16 scales.
        MissingDependencyError: no package that brings ggml is installed.
    """
    import torch
    from gguf import GGMLQuantizationType

    from elmexport.quantization.threads import in_threads

    library, number = _library(), GGMLQuantizationType[kind.name].value
    rows, columns = weight.shape
    result = np.empty((rows, columns // kind.block * kind.block_bytes), dtype=np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32).ctypes.data
    step = max(1, _CHUNK // columns)

    def work(start: int) -> None:
        source = weight[start : start + step].to(torch.float32).contiguous()
        target = result[start : start + step]
        library.ggml_quantize_chunk(number, source.data_ptr(), target.ctypes.data, 0, len(source), columns, weights)
        if not library.ggml_validate_row_data(number, target.ctypes.data, target.nbytes):
            raise ElmExportError(
                f"weights up to {float(source.abs().max()):.4g} are too large for the fp16 scales of {kind.name}; export in a float format"
            )

    in_threads(work, range(0, rows, step))
    return result


@cache
def _library() -> ctypes.CDLL:
    """ggml's library, with the two functions' types declared.

    Raises:
        MissingDependencyError: none is installed.
    """
    for package, patterns in _LIBRARIES.items():
        for path in _find(package, patterns):
            library = ctypes.CDLL(str(path))
            library.ggml_quantize_chunk.restype = ctypes.c_size_t
            library.ggml_quantize_chunk.argtypes = [
                ctypes.c_int,  # the type
                ctypes.c_void_p,  # float32 rows
                ctypes.c_void_p,  # the result
                ctypes.c_int64,  # first value
                ctypes.c_int64,  # rows
                ctypes.c_int64,  # values in a row
                ctypes.c_void_p,  # importance, or null
            ]
            library.ggml_validate_row_data.restype = ctypes.c_bool
            library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
            return library
    raise MissingDependencyError(
        "this quantization needs ggml's own quantizer; install it with: pip install 'elmexport[ggml]' (a prebuilt wheel; [llama] brings it "
        "too). Without it, --quant takes int4, int8, fp16, bf16 and fp32"
    )


def require() -> None:
    """Refuse, before any work, an environment without ggml.

    Raises:
        MissingDependencyError: no package that brings ggml is installed.
    """
    _library()


def _find(package: str, patterns: tuple[str, ...]) -> list[Path]:
    spec = find_spec(package)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    return [path for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))]
