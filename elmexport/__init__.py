"""Export of on-device language models to ONNX, Core ML, GGUF and MLX, and the cost of quantization, measured on the artifact."""

__version__ = "0.1.0"
