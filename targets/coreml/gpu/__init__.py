"""The form of a Core ML package for GPUs: one function for any number of tokens, as swift-transformers runs it.

Activations are `[1, tokens, channels]`, projections matrix products, attention is fused. Inputs, states and output are those of
swift-transformers' `LanguageModelWithStatefulKVCache`; `elmexport.contracts.coreml_gpu` describes them.
"""
