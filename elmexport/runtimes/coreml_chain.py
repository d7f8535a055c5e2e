"""The packages of a model, one or several in a row, found and put in order by what their metadata say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from elmexport.contracts.coreml import CACHE_OUTPUTS, CHAIN_METADATA, HIDDEN, HIDDEN_OUT, METADATA_PREFIX, PackageIndex
from elmexport.errors import ElmExportError
from elmexport.mil.link import link
from elmexport.mil.program import Program, load_program


def load_chain(path: Path) -> list[Program]:
    """Load the programs of an artifact folder in the order in which they run, or the one of a bare package.

    Raises:
        ElmExportError: no package, a damaged one, one of several alone, missing ones, ones that do not belong together or whose names were changed.
    """
    if path.suffix == ".mlpackage":
        program = load_program(path)
        if (place := _index(program)) is not None:
            raise ElmExportError(f"{path} is {place.words} of one model; give the folder that holds all of them")
        return [program]
    programs = {package.name: load_program(package) for package in sorted(path.glob("*.mlpackage"))}
    indices = {name: index for name, program in programs.items() if (index := _index(program)) is not None}
    if not indices:
        if len(programs) != 1:
            raise ElmExportError(f"{path} should hold one .mlpackage, and holds {', '.join(programs) or 'none'}; give the package itself")
        return list(programs.values())
    return _in_order(path, programs, indices)


def join(programs: Sequence[Program], path: Path) -> Program:
    """Link the packages into one program, which the MIL executor runs; `path` stands for it in messages. One package stays as it is.

    Raises:
        ElmExportError: packages that do not fit together.
    """
    return programs[0] if len(programs) == 1 else link(programs, path, {HIDDEN_OUT: HIDDEN}, {*CACHE_OUTPUTS, *CACHE_OUTPUTS.values()})


def _index(program: Program) -> PackageIndex | None:
    try:
        return PackageIndex.from_metadata(program.metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise ElmExportError(
            f"{program.path} is damaged ({CHAIN_METADATA} in its metadata: {error}); copy the package again or export it again"
        ) from None


def _in_order(path: Path, programs: Mapping[str, Program], indices: Mapping[str, PackageIndex]) -> list[Program]:
    files = next(iter(indices.values())).files
    if missing := [name for name in files if name not in programs]:
        raise ElmExportError(
            f"{path} lacks {', '.join(missing)}: the model was cut into {len(files)} packages, and all must be there under their names; "
            "copy the folder again or export it again"
        )
    if others := [name for name in programs if name not in files]:
        raise ElmExportError(
            f"{path} holds {', '.join(others)} besides the {len(files)} packages of its model; move what does not belong to it"
        )
    for index, name in enumerate(files):
        found = indices.get(name)
        if found is None or found.index != index or found.files != files:
            words = "a whole model" if found is None else f"{found.words} ({found.files[found.index]})"
            raise ElmExportError(
                f"{path / name} should be package {index + 1} of {len(files)}, and is {words}: files were renamed or mixed; "
                "copy the folder again or export it again"
            )
    ordered = [programs[name] for name in files]
    first = _facts(ordered[0])
    for program in ordered[1:]:
        facts = _facts(program)
        if differing := [key for key in sorted(first.keys() | facts) if first.get(key) != facts.get(key)]:
            key = differing[0]
            raise ElmExportError(
                f"{program.path} and {ordered[0].path.name} are of different exports: {key} is {facts.get(key)!r} and {first.get(key)!r}; "
                "copy the folder again or export it again"
            )
    return ordered


def _facts(program: Program) -> dict[str, str]:
    """Metadata that is the same in all packages of one export."""
    return {key: value for key, value in program.metadata.items() if key.startswith(METADATA_PREFIX) and key != CHAIN_METADATA}
