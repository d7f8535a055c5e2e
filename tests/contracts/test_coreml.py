"""What a package says of its place in a chain, and what of it is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from elmexport.contracts.coreml import PackageIndex, is_logits, logits_names


def test_the_json_in_the_metadata() -> None:
    index = PackageIndex(1, ["a-1of2.mlpackage", "a-2of2.mlpackage"], [3, 5])
    metadata = index.to_metadata()
    assert json.loads(metadata["elmexport.chain"]) == {"index": 1, "files": ["a-1of2.mlpackage", "a-2of2.mlpackage"], "layers": [3, 5]}
    assert PackageIndex.from_metadata(metadata) == index
    assert PackageIndex.from_metadata({"elmexport.model": "tiny"}) is None


@pytest.mark.parametrize(
    "found", ["{", 3, {}, {"index": 2, "files": ["a", "b"], "layers": [0, 1]}, {"index": "0", "files": ["a"], "layers": [0]}], ids=str
)
def test_other_json_is_refused(found: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        PackageIndex.from_metadata({"elmexport.chain": found if isinstance(found, str) else json.dumps(found)})


def test_names_of_logits() -> None:
    assert logits_names(1) == ("logits",)
    assert logits_names(3) == ("logits_0", "logits_1", "logits_2")
    assert all(map(is_logits, (*logits_names(1), *logits_names(12))))
    assert not is_logits("token")
