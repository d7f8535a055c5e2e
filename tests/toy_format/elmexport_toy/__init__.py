"""The toy format: dequantized weights in one NumPy file, `model.toy`. This module holds its row and imports nothing heavy."""

from elmexport.formats import Format

FORMAT = Format(
    name="toy",
    words="a toy: float32 weights in one NumPy file",
    target="elmexport_toy.target:ToyTarget",
    runtime="elmexport_toy.runtime:open_runtime",
    reader="elmexport_toy.reader:list_tensors",
    engine="toy engine",
    suffixes=(".toy",),
)
