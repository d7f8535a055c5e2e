"""The known models, against the published facts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elmexport.checkpoint import is_local, open_checkpoint
from elmexport.models import find_model, known_models, read_config
from elmexport.models.olmoe.catalog import TINY_FOLDER as TINY_MOE_FOLDER
from elmexport.models.openelm.catalog import TINY_FOLDER

PARAMETERS = {"270M": 271_527_168, "450M": 457_179_136, "1.1B": 1_079_891_456, "3B": 3_036_647_424}


def test_every_published_model_is_known() -> None:
    models = known_models()
    assert [model.alias for model in models] == [
        "tiny", "tiny-moe", "270M", "270M-Instruct", "450M", "450M-Instruct", "1.1B", "1.1B-Instruct", "3B", "3B-Instruct",
        "OLMoE-1B-7B", "OLMoE-1B-7B-SFT", "OLMoE-1B-7B-Instruct"
    ]  # fmt: skip
    openelm = {size + suffix: count for size, count in PARAMETERS.items() for suffix in ("", "-Instruct")}
    olmoe = {f"OLMoE-1B-7B{suffix}": 6_919_161_856 for suffix in ("", "-SFT", "-Instruct")}
    assert {model.alias: model.parameters for model in models} == {"tiny": 4_902_528, "tiny-moe": 5_779_712} | openelm | olmoe
    assert [model.hub_id for model in models if model.alias.startswith("1.1B")] == ["apple/OpenELM-1_1B", "apple/OpenELM-1_1B-Instruct"]


@pytest.mark.parametrize("alias", ["1.1B", "1_1B", "1.1b", "OpenELM-1_1B", "openelm-1.1b", "apple/OpenELM-1_1B"])
def test_spellings(alias: str) -> None:
    model = find_model(alias)
    assert model is not None and model.name == "OpenELM-1_1B"


def test_unknown_alias() -> None:
    assert find_model("7B") is None and find_model("someone/OpenELM-270M") is None


@pytest.mark.parametrize(("alias", "folder"), [("Tiny", TINY_FOLDER), ("tiny-moe", TINY_MOE_FOLDER)])
def test_embedded_models_are_their_files(alias: str, folder: Path) -> None:
    model = find_model(alias)
    assert model is not None and is_local(model)
    assert model.config.to_dict() == read_config(folder / "config.json").to_dict()
    assert open_checkpoint(alias).source.origin == "embedded"


def test_listing_and_opening_import_no_torch() -> None:
    code = (
        "import sys; from elmexport.checkpoint import is_local, open_checkpoint; from elmexport.models import known_models; "
        "[(m.parameters, is_local(m)) for m in known_models()]; open_checkpoint('tiny'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
