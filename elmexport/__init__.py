"""Export of on-device language models to ONNX, Core ML, GGUF and MLX, and the cost of quantization, measured on the artifact."""

import os as _os

__version__ = "0.1.0"

# onnxruntime's packages report their use to its makers. Only this variable, set before the library is loaded, stops that before it begins.
_os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
