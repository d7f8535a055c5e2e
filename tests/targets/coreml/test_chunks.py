"""Where a model is cut into packages: sizes that are never exceeded, as few packages as possible, clear refusals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elmexport.errors import ElmExportError
from elmexport.graph.ir import Graph
from elmexport.models import find_model, trace
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.quantization.codec import Quantized
from elmexport.quantization.integer_codec import IntegerTensor
from elmexport.quantization.lut_codec import PalettizedTensor
from elmexport.quantization.recipes import Plan, resolve
from elmexport.quantization.schemes import Float, Integer, Lut, PerBlock, PerChannel, PerGroupedChannel, PerTensor, Scheme
from elmexport.quantization.weight_source import Scaled, WeightSource
from elmexport.weights import Role, WeightSpec
from targets.coreml import CoreMLTarget
from targets.coreml.chunks import MEGABYTE, package_sizes, plan_cuts, stored_bytes
from targets.coreml.packing import WeightFile


def plan_of(config: OpenELMConfig, quant: str) -> Plan:
    return resolve(CoreMLTarget().recipe(quant), config)


def weights_of_zeros(scheme: Scheme) -> WeightSource:
    class Zeros:
        def scheme(self, spec: WeightSpec) -> Scheme:
            return scheme

        def scaled(self, spec: WeightSpec, factor: float) -> Scaled:
            return Scaled(self.get(spec))

        def get(self, spec: WeightSpec) -> torch.Tensor | Quantized:
            if isinstance(scheme, Integer):
                groups = scheme.granularity.count(spec.shape) // spec.shape[0]
                return IntegerTensor(scheme, torch.zeros(spec.shape, dtype=torch.int8), torch.ones(spec.shape[0], groups).half())
            if isinstance(scheme, Lut):
                tables = torch.zeros(scheme.granularity.count(spec.shape), scheme.entries).half()
                return PalettizedTensor(scheme, torch.zeros(spec.shape, dtype=torch.uint8), tables)
            return torch.zeros(spec.shape).half()

    return cast(WeightSource, Zeros())


@pytest.mark.parametrize(
    ("role", "shape", "scheme"),
    [
        (Role.ATTENTION_QKV, (320, 64), Float("fp16")),
        (Role.FFN_GATE_UP, (2 * 17000, 32), Float("fp16")),
        (Role.EMBEDDING, (40000, 32), Integer(8, PerBlock(32))),
        (Role.FFN_GATE_UP, (4000, 96), Integer(4, PerChannel())),
        (Role.ATTENTION_QKV, (320, 64), Lut(4, PerGroupedChannel(8))),
        (Role.FFN_GATE_UP, (2 * 76, 64), Lut(4, PerGroupedChannel(8))),  # a group with rows of gate and of up
        (Role.EMBEDDING, (40000, 64), Lut(8, PerTensor())),
        (Role.EMBEDDING, (40000, 64), Lut(4, PerGroupedChannel(20000))),  # a group larger than a part
        (Role.EMBEDDING, (40000, 64), Lut(6, PerGroupedChannel(32))),
    ],
)
def test_a_tensor_takes_no_more_bytes_than_planned(tmp_path: Path, role: Role, shape: tuple[int, int], scheme: Scheme) -> None:
    spec = WeightSpec("tensor", shape, role)
    file = WeightFile(tmp_path, weights_of_zeros(scheme), lambda n: None)
    file.matrix(spec, 2 if role is Role.FFN_GATE_UP else 1)
    file.close()
    written = file.path.stat().st_size
    assert written <= stored_bytes(spec, scheme) + 64
    if scheme != Lut(4, PerGroupedChannel(20000)):  # nobody's choice: each row is counted with a table
        assert stored_bytes(spec, scheme) <= written + 16 * 192


@pytest.mark.parametrize("quant", ["fp16", "int8", "int4"])
@given(data=st.data())
def test_fewest_packages_and_the_most_equal_ones(small_config: OpenELMConfig, graph: Graph, quant: str, data: st.DataObject) -> None:
    plan = plan_of(small_config, quant)
    sizes = package_sizes(graph, plan)
    layers = len(graph.kv_heads)
    limit = data.draw(st.integers(max(sizes[i, i + 1] for i in range(layers)), sizes[0, layers] + 1))

    def parts(starts: Sequence[int]) -> list[int]:
        return [sizes[bounds] for bounds in pairwise((*starts, layers))]

    cuts = [(0, *cut) for count in range(layers) for cut in combinations(range(1, layers), count)]
    allowed = [starts for starts in cuts if max(parts(starts)) <= limit]
    fewest = min(map(len, allowed))
    found = plan_cuts(graph, plan, limit)
    assert found in allowed and len(found) == fewest
    assert sum(size**2 for size in parts(found)) == min(
        sum(size**2 for size in parts(starts)) for starts in allowed if len(starts) == fewest
    )


@pytest.fixture(scope="module")
def graph(small_config: OpenELMConfig) -> Graph:
    return trace(small_config)


def test_a_package_of_all_layers_has_a_tied_table_once(small_config: OpenELMConfig, graph: Graph) -> None:
    config = small_config
    sizes = package_sizes(graph, plan_of(config, "fp16"))
    table = config.vocab_size * config.model_dim * 2
    whole, layers = sizes[0, 3], 3
    assert whole == pytest.approx(config.parameter_count * 2, abs=120_000)  # tables of angles, headers
    assert sizes[0, 2] + sizes[2, layers] - whole == pytest.approx(table, abs=120_000)


def test_an_untied_head_lies_in_the_last_package(small_config: OpenELMConfig, graph: Graph) -> None:
    config = replace(small_config, share_input_output_layers=False)
    table = small_config.vocab_size * small_config.model_dim * 2
    ours, tied = (package_sizes(g, plan_of(c, "fp16")) for g, c in ((trace(config), config), (graph, small_config)))
    assert ours[0, 3] - tied[0, 3] == pytest.approx(table, abs=1000)
    assert {bounds: ours[bounds] for bounds in ours if bounds != (0, 3)} == {bounds: tied[bounds] for bounds in tied if bounds != (0, 3)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "quant", "megabytes", "packages"),
    [("270M", "fp16", 1000, 1), ("1.1B", "fp16", 1000, 3), ("1.1B", "fp16", 2000, 2), ("3B", "int4", 1000, 2), ("3B", "int4", 2000, 1)],
)
def test_packages_of_the_published_sizes(model: str, quant: str, megabytes: int, packages: int) -> None:
    known = find_model(model)
    assert known is not None
    graph, plan = trace(known.config), plan_of(known.config, quant)
    starts = plan_cuts(graph, plan, megabytes * MEGABYTE)
    assert len(starts) == packages
    sizes = [package_sizes(graph, plan)[bounds] for bounds in pairwise((*starts, len(graph.kv_heads)))]
    assert max(sizes) <= megabytes * MEGABYTE
    assert min(sizes) > 0.8 * max(sizes)


@pytest.mark.parametrize("quant", ["fp16", "int8", "int4"])
def test_a_limit_below_one_layer_is_refused_with_the_smallest_that_works(small_config: OpenELMConfig, graph: Graph, quant: str) -> None:
    plan = plan_of(small_config, quant)
    with pytest.raises(ElmExportError, match=rf"--max-package-mb is 0\.1, and layer \d.* takes [\d.]+ MB in {quant}") as error:
        plan_cuts(graph, plan, 0.1 * MEGABYTE)
    least = re.search(r"pass --max-package-mb ([\d.]+) or more", str(error.value))
    assert least is not None
    assert len(plan_cuts(graph, plan, float(least[1]) * MEGABYTE)) > 1
    with pytest.raises(ElmExportError, match="or a --quant of fewer bits"):
        plan_cuts(graph, plan, (float(least[1]) - 0.01) * MEGABYTE)


def test_the_refusal_names_what_goes_with_the_layer(small_config: OpenELMConfig) -> None:
    wide = replace(small_config, vocab_size=20000)
    with pytest.raises(ElmExportError, match=r"layer [04] with the (embedding|head) alone"):
        plan_cuts(trace(wide), plan_of(wide, "fp16"), 1)
