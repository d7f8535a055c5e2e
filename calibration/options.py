"""Weight options of an export, checked as a whole when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calibration.method import Method
from calibration.methods import DEFAULT, find_method
from elmexport.contracts.gguf import is_legacy_imatrix
from elmexport.errors import ElmExportError

Calibrate = Literal["auto", "none"] | Path


@dataclass(frozen=True)
class WeightOptions:
    """Weight options: how the codes of an export are found.

    `method` is one of `calibration.methods`. `calibrate` "auto" is the bundled text where the method needs one, and for "mse" the few tokens
    that every export reads; "none" is nothing; a file is statistics (`.safetensors`), llama.cpp's importance matrix (`.gguf`) or a text.
    `tokens` says how much of a text to read (32,768 where None). `weights_from` is a weight set to take the codes from, `save_weights_to` where
    to keep those found. `bits_per_weight` lets each matrix have the scheme that its sensitivity asks for; `max_drop` finds the smallest such mix
    that loses at most so many percentage points of accuracy. `minutes` is the time that "auto" may choose a method for (10 where None).
    """

    method: str = DEFAULT
    calibrate: Calibrate = "auto"
    tokens: int | None = None
    weights_from: Path | None = None
    save_weights_to: Path | None = None
    bits_per_weight: float | None = None
    max_drop: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            ElmExportError: an unknown method, a method that needs what is not given, or options that have no use together.
        """
        method = self.find_method()
        if self.bits_per_weight is not None and self.max_drop is not None:
            raise ElmExportError("--bits-per-weight gives the size, --max-drop finds it; leave one of them out")
        if self.max_drop is not None and not 0 <= self.max_drop < 100:
            raise ElmExportError(f"--max-drop is {self.max_drop:g}; it is in percentage points of accuracy, from 0 up to 100")
        if self.weights_from is not None and (self.method != DEFAULT or self.tokens is not None or self.mixes):
            raise ElmExportError("--weights-from brings the codes; leave --method, --tokens, --bits-per-weight and --max-drop out")
        if self.minutes is not None and (self.method != "auto" or not self.minutes > 0):
            raise ElmExportError(f"--time-budget {self.minutes:g} is in minutes, above 0, and for --method auto, which chooses by it")
        if self.calibrate == "none" and method.needs_text:
            raise ElmExportError(f"--method {self.method} is calibrated; leave --calibrate none out, or choose --method {DEFAULT}")
        if isinstance(self.calibrate, Path) and not method.takes_statistics and not self.reads_text:
            raise ElmExportError(f"--method {self.method} runs the model on a text; give a text file to --calibrate, or leave it out")
        if self.tokens is not None and not self.reads_text:
            raise ElmExportError("--tokens is how much of a calibration text to read, and none is read here; leave it out")
        if self.save_weights_to is not None and not method.makes_weight_set:
            raise ElmExportError(f"--method {self.method} finds codes as it writes them; --save-weights is for --method gptq")

    def find_method(self) -> Method:
        """The method that is asked for."""
        return find_method(self.method)

    @property
    def mixes(self) -> bool:
        """Whether schemes are chosen matrix by matrix."""
        return self.bits_per_weight is not None or self.max_drop is not None

    @property
    def importance_matrix(self) -> Path | None:
        """The importance matrix that `calibrate` names."""
        given = self.calibrate
        return given if isinstance(given, Path) and (given.suffix == ".gguf" or is_legacy_imatrix(given)) else None

    @property
    def reads_text(self) -> bool:
        """Whether a text is read, rather than statistics or nothing."""
        if isinstance(self.calibrate, Path):
            return self.calibrate.suffix != ".safetensors" and self.importance_matrix is None
        return self.find_method().needs_text
