"""The tensors of a GGUF file, as gguf's own reader finds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from elmexport.errors import ElmExportError
from elmexport.inspection import StoredTensor
from elmexport.weights import Role

# By the last word of llama.cpp's names before ".weight"; every other tensor of the architecture is a norm.
_ROLES = {
    "token_embd": Role.EMBEDDING,
    "attn_qkv": Role.ATTENTION_QKV,
    "attn_output": Role.ATTENTION_OUT,
    "ffn_gate": Role.FFN_GATE_UP,
    "ffn_up": Role.FFN_GATE_UP,
    "ffn_down": Role.FFN_DOWN,
    "output": Role.LM_HEAD,
}


def list_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Every tensor of the folder's `.gguf` files, in file order.

    Raises:
        ElmExportError: a file that the reader cannot make sense of.
    """
    from gguf import GGUFReader

    for path in sorted(folder.glob("*.gguf")):
        try:
            tensors = GGUFReader(path).tensors
        except (ValueError, IndexError, KeyError) as error:
            raise ElmExportError(f"{path} is not a GGUF file, or is damaged ({error}); export it again") from None
        for tensor in tensors:
            word = tensor.name.removesuffix(".weight").rsplit(".", 1)[-1]
            # GGUF stores the innermost axis first.
            shape = tuple(int(axis) for axis in reversed(tensor.shape))
            yield StoredTensor(tensor.name, _ROLES.get(word, Role.NORM), tensor.tensor_type.name, shape, int(tensor.n_bytes))
