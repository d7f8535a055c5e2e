"""Messages: none fills a screen, whatever names and numbers a damaged file or a slip of the hand put into it; the fix stays."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from elmexport.checkpoint import open_checkpoint
from elmexport.errors import LONGEST, ElmExportError, Fp16RangeError, VerificationError
from elmexport.models.openelm.catalog import TINY_FOLDER

WORD = "z" * 3000


@pytest.mark.parametrize(
    "change",
    [
        {"activation_fn_name": WORD},
        {"model_dim": WORD},
        {"model_type": WORD},
        {"num_kv_heads": [WORD] * 6},
        {"ffn_multipliers": [WORD]},
        {"qkv_multipliers": [0.123456789] * 500},
        {"eos_token_id": list(range(100_000, 101_000))},
        {"bos_token_id": [1.5] * 900},
        {"num_query_heads": list(range(2000))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_config_with_endless_values(tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(TINY_FOLDER, tmp_path / "m", ignore=shutil.ignore_patterns("__pycache__"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ElmExportError) as caught:
        open_checkpoint(str(tmp_path / "m"))
    assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize(
    "options", [{"model": WORD}, {"model": f"a/{WORD}"}, {"model": "tiny", "tokenizer": WORD}, {"model": f"{WORD}.pt"}]
)
def test_endless_arguments(options: dict[str, str]) -> None:
    with pytest.raises(ElmExportError) as caught:
        open_checkpoint(**options)
    assert len(str(caught.value)) <= LONGEST
    assert ";" in str(caught.value) or "no such file" in str(caught.value)


def test_what_is_cut() -> None:
    short = f"{'/long' * 50}/config.json: lacks model_dim; use another"
    assert str(ElmExportError(short)) == short
    long = str(VerificationError(f"{WORD} is wrong; mend it"))
    assert long.startswith("zzz") and long.endswith("zzz is wrong; mend it") and "…" in long and len(long) < 250
    many = str(ElmExportError(f"found {list(range(5000))}; allowed are 1 and 2"))
    assert len(many) == LONGEST and many.startswith("found [0, 1, 2") and many.endswith("; allowed are 1 and 2")


def test_range_errors_carry_their_parts() -> None:
    error = Fp16RangeError("7e4 is too large", "export with bf16").of("weight")
    assert (str(error), error.found) == ("weight: 7e4 is too large; export with bf16", "weight: 7e4 is too large")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and isinstance(ElmExportError("x").of("weight"), ElmExportError)
