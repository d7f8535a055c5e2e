"""The GGUF file: metadata first, then the tensors, each read, quantized, packed and written before the next one is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quant_shape_to_byte_shape

from elmexport.target import ExportJob
from targets.gguf.lowering import lower
from targets.gguf.metadata import file_type, write_general, write_hyperparameters
from targets.gguf.packing import TYPES, pack
from targets.gguf.tokenizer import write_tokenizer


class _Tensor(np.ndarray[Any, Any]):
    """numpy's own `tofile` ignores an error of its last flush: a disk that fills up there would cut the file short, silently."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        fid.write(np.ascontiguousarray(self).data)


def write_gguf(job: ExportJob, folder: Path) -> Path:
    """Write `<model>-<TYPE>.gguf` into `folder` and return its path.

    Raises:
        ElmExportError: weights or a tokenizer that the file cannot hold.
    """
    path = folder / f"{job.name}-{file_type(job.recipe)}.gguf"
    writer = GGUFWriter(path, "openelm")
    write_general(writer, job.name, job.config.parameter_count)
    write_hyperparameters(writer, job.graph, job.recipe)
    write_tokenizer(writer, job.tokenizer, job.config.vocab_size)
    entries = lower(job.graph)
    for entry in entries:
        stored = GGMLQuantizationType[TYPES[job.weights.scheme(entry.spec)]]
        shape = quant_shape_to_byte_shape(entry.part_shape, stored)
        for name in entry.names:
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            for part in np.split(pack(job.weights.get(entry.spec)), len(entry.names)):
                writer.write_tensor_data(part.view(_Tensor))
            job.advance(entry.spec.size)
    finally:
        writer.close()
    return path
