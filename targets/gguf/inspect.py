"""The tensors of a GGUF file, as gguf's own reader finds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from elmexport.artifact import StoredTensor
from elmexport.errors import ElmExportError
from elmexport.models.base import ModelConfig
from targets.gguf.families import architecture
from targets.gguf.reading import open_reader


def list_tensors(folder: Path, config: ModelConfig) -> Iterator[StoredTensor]:
    """Every tensor of the folder's `.gguf` files, in file order.

    Raises:
        ElmExportError: a file that the reader cannot make sense of.
    """
    roles = {name: role for role, names in architecture(config).tensors.items() for name in names}
    for path in sorted(folder.glob("*.gguf")):
        try:
            tensors = open_reader(path).tensors
        except ValueError as error:
            raise ElmExportError(f"{path} is not a GGUF file, or is damaged ({error}); export it again") from None
        for tensor in tensors:
            word = tensor.name.removesuffix(".weight").rsplit(".", 1)[-1]
            # GGUF stores the innermost axis first.
            shape = tuple(int(axis) for axis in reversed(tensor.shape))
            yield StoredTensor(tensor.name, roles.get(word), tensor.tensor_type.name, shape, int(tensor.n_bytes))
