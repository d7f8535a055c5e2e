"""llama.cpp's importance matrix: for each matrix, the mean square of each of its inputs, by which quantization errors are weighed.

The file is what `llama-imatrix` writes. Ours has one entry more, `token_embd.weight`, which serves as the head where it is tied: llama.cpp's
own tool leaves it out, but `llama-quantize` looks it up under this name and uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmexport.errors import ElmExportError
from elmexport.files import complete_file

_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImportanceMatrix:
    """`entries`: float32 `[in]` by the name of llama.cpp's tensor. `datasets` and `chunks` say what it was measured on."""

    path: Path
    entries: Mapping[str, NDArray[np.float32]]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int  # tokens of a chunk

    def check(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Compare with the matrices (name, `[out, in]`) that are to be quantized.

        The token embedding alone may be missing: llama.cpp's own tool leaves it out.

        Raises:
            ElmExportError: an entry is missing or of another size: the file belongs to another model.
        """
        fix = "use one that was made for this model"
        for name, (_, columns) in shapes:
            entry = self.entries.get(name)
            if entry is None:
                if name != "token_embd.weight":
                    raise ElmExportError(f"{self.path} has no entry for {name}; {fix}")
            elif entry.size != columns:
                raise ElmExportError(f"{self.path} has {entry.size} values for {name}, whose rows have {columns}; {fix}")


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read llama.cpp's GGUF form of an importance matrix.

    Raises:
        ElmExportError: no such file, a damaged one, or a file of another kind.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except OSError as error:
        raise ElmExportError(
            f"cannot read {path}: {error.strerror or error}; --imatrix takes a file that elmexport calibrate --imatrix or llama-imatrix wrote"
        ) from None
    except (ValueError, IndexError, KeyError) as error:
        raise ElmExportError(
            f"{path} is not a GGUF file, or is damaged ({error}); make the importance matrix again, in GGUF form (llama-imatrix writes it)"
        ) from None
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts.get("general.type") != "imatrix":
        raise ElmExportError(f"{path} is a GGUF file of type {facts.get('general.type')!r}, not 'imatrix'; give an importance matrix")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    entries = {}
    for name, sums in tensors.items():
        if name.endswith(_SUMS):
            matrix = name.removesuffix(_SUMS)
            entries[matrix] = _mean(path, matrix, sums, tensors.get(matrix + _COUNTS))
    if not entries:
        raise ElmExportError(f"{path} holds no importance values; make it again")
    return ImportanceMatrix(
        path,
        entries,
        tuple(facts.get("imatrix.datasets") or ()),
        int(facts.get("imatrix.chunk_count") or 0),
        int(facts.get("imatrix.chunk_size") or 0),
    )


def write_imatrix(imatrix: ImportanceMatrix, *, tokens: int) -> None:
    """Write `imatrix`, whose means are over `tokens` tokens, to its path in llama.cpp's GGUF form.

    Raises:
        ElmExportError: the path cannot be written.
    """
    from gguf import GGUFWriter

    class Writer(GGUFWriter):  # type: ignore[misc]
        def add_architecture(self) -> None:
            """An importance matrix has none."""

    def write(partial: Path) -> None:
        writer = Writer(partial, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", list(imatrix.datasets))
        writer.add_uint32("imatrix.chunk_count", imatrix.chunks)
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
        for name, mean in sorted(imatrix.entries.items()):
            writer.add_tensor(name + _SUMS, (mean.astype(np.float64) * tokens).astype(np.float32))
            writer.add_tensor(name + _COUNTS, np.full(1, tokens, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    path = imatrix.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_file(path) as partial:
            write(partial)
    except OSError as error:
        raise ElmExportError(f"cannot write {path}: {error.strerror or error}; free space or choose another place") from error


def _mean(path: Path, name: str, sums: NDArray[np.float32], counts: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Sums of squares over their count, as `llama-quantize` divides them: in float32, ones where nothing was counted."""
    if counts is None or counts.size != 1 or sums.dtype != np.float32 or counts.dtype != np.float32:
        raise ElmExportError(f"{path} has no usable count for {name}; the file is damaged, make it again")
    count = counts.reshape(-1)[0]
    result = sums.reshape(-1) / count if count > 0 else np.ones(sums.size, dtype=np.float32)
    if not np.isfinite(result).all() or (result < 0).any():
        raise ElmExportError(f"{path} has values for {name} that are not finite or negative; the file is damaged, make it again")
    return result
