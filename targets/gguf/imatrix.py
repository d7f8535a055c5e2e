"""llama.cpp's importance matrix: for each matrix, the mean square of each of its inputs, by which quantization errors are weighed.

The file is what `llama-imatrix` writes. Ours has one entry more, `token_embd.weight`, which serves as the head where it is tied: llama.cpp's
own tool leaves it out, but `llama-quantize` looks it up under this name and uses it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmexport.contracts.gguf import is_legacy_imatrix
from elmexport.errors import ElmExportError, listed
from elmexport.files import complete_file
from targets.gguf.reading import open_reader

_SUMS, _COUNTS = ".in_sum2", ".counts"
_OPTIONAL = ("token_embd.weight", "output.weight")
# What is read of the metadata, and as what.
_FACTS: Mapping[str, type] = {"imatrix.datasets": list, "imatrix.chunk_count": int, "imatrix.chunk_size": int}
_FIX = "use one that was made for this model: elmexport calibrate --model MODEL --imatrix FILE.gguf"


@dataclass(frozen=True)
class ImportanceMatrix:
    """`entries`: float32 `[in]` by the name of llama.cpp's tensor, `[experts * in]` of stacked ones. `datasets` and `chunks` say what it was measured on."""

    path: Path
    entries: Mapping[str, NDArray[np.float32]]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int  # tokens of a chunk
    uncounted: tuple[str, ...] = ()  # entries that no token went into: ones
    # Tokens of each expert, by the name of a stacked tensor, of a matrix that is to be written.
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def of(self, name: str, expert: int | None, columns: int) -> NDArray[np.float32] | None:
        """The values for a tensor, or for one expert's slice, whose rows have `columns`; None where there are none."""
        entry = self.entries.get(name)
        return entry if entry is None or expert is None else entry[expert * columns : (expert + 1) * columns]

    def check(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Compare with the matrices (name, `[out, in]` or `[experts, out, in]`) that are to be quantized.

        The token embedding and the head alone may be missing: llama.cpp's own tool leaves them out.

        Raises:
            ElmExportError: entries are missing or of another size, so that the file belongs to another model; or nothing was counted for some.
        """
        wanted = {name: math.prod(outer[:-1]) * columns for name, (*outer, columns) in shapes}
        missing = [name for name in wanted if name not in self.entries and name not in _OPTIONAL]
        if missing:
            raise ElmExportError(f"{self.path} has no entry for {listed(missing)}; {_FIX}")
        for name, values in wanted.items():
            if name in self.entries and self.entries[name].size != values:
                raise ElmExportError(f"{self.path} has {self.entries[name].size} values for {name}, whose rows have {values}; {_FIX}")
        uncounted = [name for name in self.uncounted if name in wanted]
        if uncounted:
            raise ElmExportError(f"{self.path} counted no token for {listed(uncounted)}; {_FIX}")


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read llama.cpp's GGUF form of an importance matrix.

    Raises:
        ElmExportError: no such file, a damaged one, or a file of another kind.
    """
    if is_legacy_imatrix(path):
        new = path.with_name(f"{path.stem}{'-1' if path.suffix == '.gguf' else ''}.gguf").name
        raise ElmExportError(
            f"{path} is an importance matrix in llama.cpp's former binary form; convert it: llama-imatrix --in-file {path} -o {new}"
        )
    try:
        reader = open_reader(path)
        facts = {name: reader.fields[name].contents() for name in ("general.type", *_FACTS) if name in reader.fields}
    except OSError as error:
        raise ElmExportError(
            f"cannot read {path}: {error.strerror or error}; --imatrix takes a file that elmexport calibrate --imatrix or llama-imatrix wrote"
        ) from None
    except ValueError as error:
        raise ElmExportError(
            f"{path} is not a GGUF file, or is damaged ({error}); make the importance matrix again, in GGUF form (llama-imatrix writes it)"
        ) from None
    if facts.get("general.type") != "imatrix":
        raise ElmExportError(f"{path} is a GGUF file of type {facts.get('general.type')!r}, not 'imatrix'; give an importance matrix")
    for name, kind in _FACTS.items():
        if not isinstance(facts.get(name, kind()), kind):
            raise ElmExportError(f"{path}: {name} is {facts[name]!r}, not of the kind that it must be; the file is damaged, make it again")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    entries, uncounted = {}, []
    for name, sums in tensors.items():
        if name.endswith(_SUMS):
            matrix = name.removesuffix(_SUMS)
            counts = tensors.get(matrix + _COUNTS)
            entries[matrix] = _mean(path, matrix, sums, counts)
            uncounted += [matrix] if counts is not None and not counts.any() else []
    if not entries:
        raise ElmExportError(f"{path} holds no importance values; make it again")
    return ImportanceMatrix(
        path,
        entries,
        tuple(map(str, facts.get("imatrix.datasets", ()))),
        facts.get("imatrix.chunk_count", 0),
        facts.get("imatrix.chunk_size", 0),
        tuple(uncounted),
    )


def write_imatrix(imatrix: ImportanceMatrix, *, tokens: int) -> None:
    """Write `imatrix`, whose means are over `tokens` tokens, those of experts over `counts`, to its path in llama.cpp's GGUF form.

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
            if name in imatrix.counts:
                counts = np.array(imatrix.counts[name], np.float32)[:, None]
                writer.add_tensor(name + _SUMS, (mean.reshape(len(counts), -1).astype(np.float64) * counts).astype(np.float32))
            else:
                counts = np.full(1, tokens, dtype=np.float32)
                writer.add_tensor(name + _SUMS, (mean.astype(np.float64) * tokens).astype(np.float32))
            writer.add_tensor(name + _COUNTS, counts)
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
    """Sums of squares over their count, as `llama-quantize` divides them: in float32, ones where nothing was counted. Every expert has a count."""
    if counts is None or not counts.size or sums.size % counts.size or sums.dtype != np.float32 or counts.dtype != np.float32:
        raise ElmExportError(f"{path} has no usable count for {name}; the file is damaged, make it again")
    count = counts.reshape(-1, 1)
    result = np.where(count > 0, sums.reshape(len(count), -1) / np.maximum(count, 1), np.float32(1)).reshape(-1)
    if not np.isfinite(result).all() or (result < 0).any():
        raise ElmExportError(f"{path} has values for {name} that are not finite or negative; the file is damaged, make it again")
    return result
