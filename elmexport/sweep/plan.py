"""Plan of a sweep: a TOML file, read into types; what it names is looked up by `elmexport.sweep.expansion`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, field

from elmexport.documents import decode_toml, to_struct
from elmexport.errors import ElmExportError

FIX = (
    "a plan has models, formats, quants, methods, calibrate, tokens, context, tasks, preset, fewshot, limit, limits, seed, data, texts, text_tokens, "
    "[bench] and [[exclude]], see docs/sweeps.md"
)
BUNDLED = "bundled"  # among `texts`: the text that comes with elmexport
Count = Annotated[int, Meta(ge=1)]
Counts = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]
Names = Annotated[tuple[str, ...], Meta(min_length=1)]


class ModelChoice(Struct, frozen=True, forbid_unknown_fields=True):
    """A model, with the options that exports have for it."""

    model: str
    revision: str | None = None
    tokenizer: str | None = None
    adapter: str | None = None
    random_weights: Annotated[int, Meta(ge=0)] | None = None


class FormatChoice(Struct, frozen=True):
    """A format with settings of its own: options of its command, by name with `_`."""

    format: str
    settings: Mapping[str, str | int | float | bool] = {}

    @property
    def label(self) -> str:
        """Name of the format, and its settings where it has any."""
        return " ".join([self.format, *(f"{name}={value}" for name, value in sorted(self.settings.items()))])


class Benchmark(Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of `elmexport bench`."""

    prompt: Counts | None = None
    depth: Counts | None = None
    generate: Count | None = None
    repeat: Count = 1


class Exclusion(Struct, frozen=True, forbid_unknown_fields=True):
    """Combinations that are left out: those which agree in every key that is given."""

    model: Names | str | None = None
    format: Names | str | None = None
    quant: Names | str | None = None
    method: Names | str | None = None

    def matches(self, model: str, format_name: str, quant: str, method: str) -> bool:
        """Whether a combination is left out; all names as the plan has them, of a format without its settings."""
        pairs = ((self.model, model), (self.format, format_name), (self.quant, quant), (self.method, method))
        return all(wanted is None or name in ((wanted,) if isinstance(wanted, str) else wanted) for wanted, name in pairs)


class Plan(Struct, frozen=True, forbid_unknown_fields=True):
    """A plan as it was written. Paths in it are relative to the plan's folder.

    `limit` holds for every task that `limits` does not name. `calibrate` and `tokens` are exports' own options, for the methods that read a text.
    """

    models: Annotated[tuple[ModelChoice | str, ...], Meta(min_length=1)]
    formats: Annotated[tuple[dict[str, str | int | float | bool] | str, ...], Meta(min_length=1)]
    quants: Names
    methods: Names = ("mse",)
    calibrate: str | None = None
    tokens: Count | None = None
    context: Count | None = None
    tasks: tuple[str, ...] | None = None
    preset: str | None = None
    fewshot: Annotated[int, Meta(ge=0)] | None = None
    limit: Count | None = None
    limits: Mapping[str, Count] = {}
    seed: Annotated[int, Meta(ge=0)] = 0
    data: str | None = None
    texts: tuple[str, ...] = (BUNDLED,)
    text_tokens: Count = 8192
    bench: Benchmark | None = None
    exclude: tuple[Exclusion, ...] = field(default=())

    def model_choices(self) -> list[ModelChoice]:
        """The models, those that are only named in the long form."""
        return [ModelChoice(model) if isinstance(model, str) else model for model in self.models]

    def format_choices(self, where: str) -> list[FormatChoice]:
        """The formats, those that are only named in the long form.

        Raises:
            ElmExportError: a table that names no format; `where` is the plan's file.
        """
        return [FormatChoice(entry) if isinstance(entry, str) else _format(entry, where) for entry in self.formats]


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        ElmExportError: no such file, not TOML, or keys and values that do not belong there.
    """
    try:
        data = decode_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ElmExportError(f"cannot read the plan {path}: {error.strerror or error}; give a TOML file, see docs/sweeps.md") from None
    except UnicodeDecodeError:
        raise ElmExportError(f"{path} is not UTF-8 text; give the plan as a TOML file") from None
    except ValueError as error:
        raise ElmExportError(f"{path}: not valid TOML ({error}); {FIX}") from None
    plan = to_struct(data, Plan, str(path), FIX)
    for key in ("quants", "methods", "tasks", "texts"):
        check_different(getattr(plan, key) or (), key, str(path))
    return plan


def check_different(names: tuple[str, ...], key: str, where: str) -> None:
    """Refuse a list that names something twice.

    Raises:
        ElmExportError: it does.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ElmExportError(f"{where}: {key} names {twice!r} twice; name it once")


def _format(entry: Mapping[str, Any], where: str) -> FormatChoice:
    name = entry.get("format")
    if not isinstance(name, str):
        raise ElmExportError(f'{where}: a table of formats lacks format; write {{ format = "coreml", device = "gpu" }}')
    return FormatChoice(name, {key: value for key, value in entry.items() if key != "format"})
