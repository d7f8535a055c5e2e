"""The packages of a model, one or several in a row, found and put in order.

Each package of several says in its metadata (`elmexport.chain`) which one it is: `{"index": 0, "files": ["a-1of2.mlpackage", …], "layers": [0,
9]}`, the files being all of them in the order in which they run, and the layers the first and the last of this one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elmexport.errors import ElmExportError
from elmexport.mil.link import link
from elmexport.mil.program import Program, load_program
from elmexport.runtimes.coreml_contract import HIDDEN, HIDDEN_OUT, NEW

CHAIN = "elmexport.chain"  # the key in a package's metadata


def load_chain(path: Path) -> list[Program]:
    """The programs of an artifact folder in the order in which they run, or the one of a bare package.

    Raises:
        ElmExportError: no package, a damaged one, one of several alone, missing ones, ones that do not belong together or whose names were changed.
    """
    if path.suffix == ".mlpackage":
        program = load_program(path)
        if (chain := _chain(program)) is not None:
            raise ElmExportError(
                f"{path} is package {chain['index'] + 1} of {len(chain['files'])} of one model; give the folder that holds all of them"
            )
        return [program]
    programs = {package.name: load_program(package) for package in sorted(path.glob("*.mlpackage"))}
    chains = {name: chain for name, program in programs.items() if (chain := _chain(program)) is not None}
    if not chains:
        if len(programs) != 1:
            raise ElmExportError(f"{path} should hold one .mlpackage, and holds {', '.join(programs) or 'none'}; give the package itself")
        return list(programs.values())
    return _in_order(path, programs, chains)


def join(programs: Sequence[Program], path: Path) -> Program:
    """The packages as one program, which the MIL executor runs; `path` stands for it in messages. One package stays as it is.

    Raises:
        ElmExportError: packages that do not fit together.
    """
    return programs[0] if len(programs) == 1 else link(programs, path, {HIDDEN_OUT: HIDDEN}, {*NEW, *NEW.values()})


def _chain(program: Program) -> dict[str, Any] | None:
    try:
        chain = json.loads(program.metadata.get(CHAIN, "null"))
        if chain is not None and not (isinstance(chain["index"], int) and 0 <= chain["index"] < len(chain["files"])):
            raise ValueError("its index is none of its files'")
    except (ValueError, KeyError, TypeError) as error:
        raise ElmExportError(
            f"{program.path} is damaged ({CHAIN} in its metadata: {error}); copy the package again or export it again"
        ) from None
    return None if chain is None else dict(chain)


def _in_order(path: Path, programs: Mapping[str, Program], chains: Mapping[str, Mapping[str, Any]]) -> list[Program]:
    files: list[str] = next(iter(chains.values()))["files"]
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
        chain = chains.get(name)
        if chain is None or chain["index"] != index or chain["files"] != files:
            found = (
                "a whole model"
                if chain is None
                else f"package {chain['index'] + 1} of {len(chain['files'])} ({chain['files'][chain['index']]})"
            )
            raise ElmExportError(
                f"{path / name} should be package {index + 1} of {len(files)}, and is {found}: files were renamed or mixed; "
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
    """What all packages of one export say alike."""
    return {key: value for key, value in program.metadata.items() if key.startswith("elmexport.") and key != CHAIN}
