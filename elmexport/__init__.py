"""Export of on-device language models to ONNX, Core ML, GGUF and MLX, and the cost of quantization, measured on the artifact."""

import os as _os
from importlib import import_module as _import_module
from typing import Any as _Any

__version__ = "0.1.0"
__all__ = ["OpenArtifact", "__version__", "evaluate", "export", "open"]

# onnxruntime's packages report their use to its makers. Only this variable, set before the library is loaded, stops that before it begins.
_os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> _Any:
    """The front door, `elmexport.api`, is loaded when it is first used: the package itself costs next to nothing. Types: `__init__.pyi`."""
    if name in ("OpenArtifact", "evaluate", "export", "open"):
        return getattr(_import_module("elmexport.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "OpenArtifact", "evaluate", "export", "open"]
