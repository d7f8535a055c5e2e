"""Exports OpenELM language models to ONNX, Core ML and GGUF, and measures what quantization cost."""

__version__ = "0.1.0"
