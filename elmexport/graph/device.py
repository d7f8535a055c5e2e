"""Torch device of forward passes and calibration, as the environment variable `ELMEXPORT_TORCH_DEVICE` says."""

from __future__ import annotations

import os

import torch

from elmexport.errors import ElmExportError

VARIABLE = "ELMEXPORT_TORCH_DEVICE"
KINDS = ("auto", "cpu", "cuda", "mps")


def torch_device() -> torch.device:
    """Choose the torch device of calibration, reference passes and the torch runtime: "auto", the default, is a GPU if there is one.

    Raises:
        ElmExportError: no such kind of device, or this machine (or this build of torch) has none of it.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in KINDS:
        raise ElmExportError(f"{VARIABLE} is {asked!r}; choose {', '.join(KINDS)}, or leave it unset")
    there = [kind for kind, found in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())) if found]
    there.append("cpu")
    if asked == "auto":
        return torch.device(there[0])
    if asked not in there:
        raise ElmExportError(
            f"{VARIABLE} is {asked!r}, and torch {torch.__version__} finds no such device here; choose {', '.join(there)}, or leave it unset"
        )
    return torch.device(asked)


def product_dtype(device: torch.device) -> torch.dtype:
    """Dtype of matrix products where 8 bits of mantissa are enough: bfloat16 if the hardware multiplies it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32
