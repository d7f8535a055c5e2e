"""A device that is not there: tensors that say they lie on it, and refuse to be mixed with those of the CPU, as a GPU's do."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy")  # of the kinds that torch knows by name, the one that needs no driver to be spoken of


class _Elsewhere(Tensor):
    """A tensor of `DEVICE`; `here` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> _Elsewhere:
        found = Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), dtype=here.dtype, device=DEVICE)  # type: ignore[attr-defined]
        found.here = here
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """While it is entered, `DEVICE` computes: on the CPU, with the CPU's bits.

    Inference mode, which tensors of this kind do not go with, is `no_grad` meanwhile.
    """

    def __enter__(self) -> Self:
        self._inference_mode = torch._C._InferenceMode
        torch._C._InferenceMode = lambda enabled: torch.no_grad()  # type: ignore[assignment,misc]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._InferenceMode = self._inference_mode  # type: ignore[misc]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    elsewhere = any(isinstance(tensor, _Elsewhere) for tensor in tensors)
    asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    if asked:  # a copy to a device, or a tensor made there
        elsewhere = asked[0] == DEVICE
    elif elsewhere and func is not torch.ops.aten.copy_.default and any(t.ndim and not isinstance(t, _Elsewhere) for t in tensors):
        raise RuntimeError(f"{func} mixes tensors of two devices")
    out = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if func is torch.ops.aten.copy_.default:
        return args[0]
    given = {id(tensor.here): tensor for tensor in tensors if isinstance(tensor, _Elsewhere)}  # what an op in place returns

    def there(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not elsewhere:
            return leaf
        return given[id(leaf)] if id(leaf) in given else _Elsewhere(leaf)

    return tree_map(there, out)


def _here(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.here if isinstance(leaf, _Elsewhere) else leaf
