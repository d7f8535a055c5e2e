"""The form of a Core ML package that the Neural Engine runs best: two functions of fixed shape, prefill and decode.

Activations are `[1, channels, 1, tokens]`, projections 1x1 convolutions, attention goes head by head. Inputs, states and outputs are in
`elmexport.contracts.coreml`.
"""
