"""Registry of quantization methods: one row and one module each."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from calibration.method import Method
from elmexport.errors import ElmExportError

METHODS: Mapping[str, str] = {  # in the order in which --help lists them
    "mse": "calibration.methods.mse:MSE",
    "rtn": "calibration.methods.rtn:RTN",
    "gptq": "calibration.methods.gptq:GPTQ",
    "distill": "calibration.methods.distill:Distill",
    "awq": "calibration.methods.awq:AWQ",
    "awq+gptq": "calibration.methods.awq_gptq:AWQGPTQ",
    "auto": "calibration.methods.auto:Auto",
}
DEFAULT = "mse"


def find_method(name: str) -> Method:
    """Find the method called `name`.

    Raises:
        ElmExportError: there is none.
    """
    if name not in METHODS:
        raise ElmExportError(f"--method {name} does not exist; choose {', '.join(METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    kind: type[Method] = getattr(import_module(module), attribute)
    return kind()


def methods_help() -> str:
    """Describe the methods in a few words each, for --help."""
    return "; ".join(f"{name}: {find_method(name).words}" for name in METHODS)
