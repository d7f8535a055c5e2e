"""Rounding, states, functions, and programs that are not ours; and what is said of packages that cannot be run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.proto import Model_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elmexport.errors import ElmExportError
from elmexport.mil.executor import MilModel
from tests.mil.packages import function, write_package

few = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def fp16(*shape: int) -> Any:
    return mb.TensorSpec(shape, dtype=types.fp16)


def one(tmp: Path, specs: dict[str, Any], build: Any, **options: Any) -> MilModel:
    return MilModel(write_package(tmp / f"{len(list(tmp.iterdir()))}.mlpackage", {"main": function(specs, build)}), **options)


@few
@given(seed=st.integers(0, 1000))
def test_every_result_is_rounded_once(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((5, 7)).astype(np.float16) for _ in range(2))
    model = one(tmp_path, {"a": fp16(5, 7), "b": fp16(5, 7)}, lambda a, b: mb.exp(x=mb.mul(x=a, y=b)))
    (result,) = model.predict({"a": a, "b": b}).values()
    product = (a.astype(np.float32) * b.astype(np.float32)).astype(np.float16)
    expected = np.exp(product.astype(np.float32)).astype(np.float16)
    assert result.dtype == np.float16
    # float32 exponentials of two libraries differ in the last place, which may tip a rounding.
    np.testing.assert_allclose(result, expected, rtol=1.1 * 2**-10)
    assert (result == expected).mean() > 0.95


def test_overflow_is_infinite_in_fp16_only(tmp_path: Path) -> None:
    x = {"x": np.full((1, 4), 300, np.float16)}
    for precision, expected in (("fp16", np.inf), ("fp32", 300.0)):
        model = one(tmp_path, {"x": fp16(1, 4)}, lambda x: mb.sqrt(x=mb.square(x=x)), precision=precision)
        (result,) = model.predict(x).values()
        assert (result == expected).all()


def test_inputs_are_rounded_too_and_fp32_stays(tmp_path: Path) -> None:
    wide = mb.TensorSpec((1, 4), dtype=types.fp32)
    value = np.full((1, 4), 1 + 2**-13, np.float32)
    (narrow,) = one(tmp_path, {"x": fp16(1, 4)}, lambda x: mb.mul(x=x, y=np.float16(1))).run({"x": torch.from_numpy(value)}).values()
    assert (narrow == 1).all()
    (kept,) = one(tmp_path, {"x": wide}, lambda x: mb.mul(x=x, y=np.float32(1))).run({"x": torch.from_numpy(value)}).values()
    np.testing.assert_array_equal(kept, value)


def test_constants_are_folded(tmp_path: Path) -> None:
    model = one(tmp_path, {"x": fp16(1, 4)}, lambda x: mb.add(x=x, y=mb.cast(x=mb.range_1d(start=0, end=4, step=1), dtype="fp16")))
    (result,) = model.predict({"x": np.zeros((1, 4), np.float16)}).values()
    np.testing.assert_array_equal(result[0], [0, 1, 2, 3])


def state(*shape: int) -> Any:
    return mb.StateTensorSpec(shape, dtype=types.fp16)


def counter(x: Any, total: Any) -> Any:
    return mb.coreml_update_state(state=total, value=mb.add(x=mb.read_state(input=total), y=x))


def test_states_are_kept_and_belong_to_the_caller(tmp_path: Path) -> None:
    model = one(tmp_path, {"x": fp16(3), "total": state(3)}, counter)
    first, second = model.make_states(), model.make_states()
    x = {"x": np.arange(3, dtype=np.float16)}
    for n in (1, 2, 3):
        (result,) = model.predict(x, first).values()
        np.testing.assert_array_equal(result, n * x["x"])
    (result,) = model.predict(x, second).values()
    np.testing.assert_array_equal(result, x["x"])
    np.testing.assert_array_equal(first["total"], [0, 3, 6])
    assert result.base is None or not np.shares_memory(result, second["total"].numpy())
    with pytest.raises(ElmExportError, match=r"needs the states total; make_states\(\) gives them"):
        model.predict(x)


def test_functions_share_states_and_weights(tmp_path: Path) -> None:
    def double(x: Any, total: Any) -> Any:
        return mb.mul(x=mb.read_state(input=total), y=x)

    specs = {"x": fp16(3), "total": state(3)}
    package = write_package(tmp_path / "a.mlpackage", {"count": function(specs, counter), "double": function(specs, double)})
    model = MilModel(package)
    states = model.make_states()
    model.predict({"x": np.ones(3, np.float16)}, states, "count")
    (result,) = model.predict({"x": np.full(3, 5, np.float16)}, states, "double").values()
    np.testing.assert_array_equal(result, [5, 5, 5])
    with pytest.raises(ElmExportError, match="has no function 'halve'; it has count, double"):
        model.run({}, states, "halve")


def put(x: Any, update: Any, row: Any) -> Any:
    """`x` `[4, 2]` with row `row` replaced."""
    return mb.slice_update(
        x=x,
        update=update,
        begin=mb.concat(values=[row, np.array([0], np.int32)], axis=0),
        end=mb.concat(values=[mb.add(x=row, y=np.int32(1)), np.array([2], np.int32)], axis=0),
    )


# Each stores `update` in the state at `row`, and returns what must not be touched by that.
def _plain(update: Any, row: Any, cache: Any) -> Any:
    new = mb.coreml_update_state(state=cache, value=put(mb.read_state(input=cache), update, row))
    return mb.mul(x=new, y=np.float16(1))


def _keeps_the_old(update: Any, row: Any, cache: Any) -> Any:
    old = mb.read_state(input=cache)
    new = mb.coreml_update_state(state=cache, value=put(old, update, row))
    return mb.sub(x=new, y=old)


def _keeps_a_view(update: Any, row: Any, cache: Any) -> Any:
    old = mb.read_state(input=cache)
    view = mb.reshape(x=mb.transpose(x=old, perm=[1, 0]), shape=[2, 4])
    new = mb.coreml_update_state(state=cache, value=put(old, update, row))
    return mb.sub(x=mb.transpose(x=new, perm=[1, 0]), y=view)


def _reads_before_writing(update: Any, row: Any, cache: Any) -> Any:
    changed = put(mb.read_state(input=cache), update, row)
    old = mb.mul(x=mb.read_state(input=cache), y=np.float16(1))
    return mb.sub(x=mb.coreml_update_state(state=cache, value=changed), y=old)


def _writes_something_else(update: Any, row: Any, cache: Any) -> Any:
    changed = put(mb.read_state(input=cache), update, row)
    mb.coreml_update_state(state=cache, value=mb.mul(x=changed, y=np.float16(1)))
    return mb.sub(x=changed, y=mb.read_state(input=cache))


def _never_writes(update: Any, row: Any, cache: Any) -> Any:
    changed = put(mb.read_state(input=cache), update, row)
    return mb.mul(x=changed, y=np.float16(1))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (_plain, ["[[7, 8], [0, 0], [0, 0], [0, 0]]", "[[7, 8], [7, 8], [0, 0], [0, 0]]"]),
        (_keeps_the_old, ["[[7, 8], [0, 0], [0, 0], [0, 0]]", "[[0, 0], [7, 8], [0, 0], [0, 0]]"]),
        (_keeps_a_view, ["[[7, 0, 0, 0], [8, 0, 0, 0]]", "[[0, 7, 0, 0], [0, 8, 0, 0]]"]),
        (_reads_before_writing, ["[[7, 8], [0, 0], [0, 0], [0, 0]]", "[[0, 0], [7, 8], [0, 0], [0, 0]]"]),
        (_writes_something_else, ["[[0, 0], [0, 0], [0, 0], [0, 0]]"] * 2),
        (_never_writes, ["[[7, 8], [0, 0], [0, 0], [0, 0]]", "[[0, 0], [7, 8], [0, 0], [0, 0]]"]),
    ],
)
def test_updates_in_place_cannot_be_told_from_copies(build: Any, expected: list[str], tmp_path: Path) -> None:
    specs = {"update": fp16(1, 2), "row": mb.TensorSpec((1,), dtype=types.int32), "cache": state(4, 2)}
    model = one(tmp_path, specs, build)
    states = model.make_states()
    for row, text in enumerate(expected):
        (result,) = model.predict({"update": np.array([[7, 8]], np.float16), "row": np.array([row], np.int32)}, states).values()
        np.testing.assert_array_equal(result, json.loads(text))


def test_an_update_in_place_copies_nothing(tmp_path: Path) -> None:
    """Or each layer of a language model would copy the cache of all."""

    def layers(update: Any, row: Any, cache: Any) -> Any:
        old = mb.read_state(input=cache)
        for _ in range(3):
            old = mb.coreml_update_state(state=cache, value=put(old, update, row))
            update = mb.mul(x=mb.slice_by_index(x=old, begin=[0, 0], end=[1, 2]), y=np.float16(2))
        return update

    model = one(tmp_path, {"update": fp16(1, 2), "row": mb.TensorSpec((1,), dtype=types.int32), "cache": state(4, 2)}, layers)
    states = model.make_states()
    before = states["cache"].data_ptr()
    (result,) = model.predict({"update": np.ones((1, 2), np.float16), "row": np.zeros(1, np.int32)}, states).values()
    assert result.tolist() == [[8, 8]]
    assert states["cache"].tolist() == [[4, 4], [0, 0], [0, 0], [0, 0]]
    assert states["cache"].data_ptr() == before


def test_inputs_and_constants_are_never_written_to(tmp_path: Path) -> None:
    table = np.arange(8, dtype=np.float16).reshape(4, 2)

    def build(x: Any, update: Any, row: Any) -> Any:
        return [put(x, update, row), put(table, update, row), put(mb.reshape(x=x, shape=[4, 2]), update, row)]

    model = one(tmp_path, {"x": fp16(4, 2), "update": fp16(1, 2), "row": mb.TensorSpec((1,), dtype=types.int32)}, build)
    x = torch.zeros(4, 2)
    for row in (0, 1):
        of_x, of_table, of_view = model.run({"x": x, "update": torch.ones(1, 2), "row": torch.tensor([row])}).values()
        assert not x.any()
        assert of_x.sum() == of_view.sum() == 2
        assert of_table[1 - row].tolist() == table[1 - row].tolist()


class Block(torch.nn.Module):
    """A transformer block over a convolutional front end, for sequences `[2, 16, 32]`."""

    def __init__(self) -> None:
        super().__init__()
        self.front = torch.nn.Conv1d(32, 64, 3, padding=1, groups=4)
        self.norm = torch.nn.BatchNorm1d(64)
        self.qkv = torch.nn.Linear(64, 192)
        self.out = torch.nn.Linear(64, 64)
        self.last = torch.nn.LayerNorm(64)
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.gelu(self.norm(self.front(x.transpose(1, 2)))).transpose(1, 2)
        q, k, v = self.qkv(x).reshape(2, 16, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        attended = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
        x = self.last(x + self.out(attended.permute(0, 2, 1, 3).reshape(2, 16, 64)))
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    module = Block().eval()
    module.norm.running_mean.normal_()
    module.norm.running_var.uniform_(0.5, 2)
    return module


def converted(module: torch.nn.Module, x: torch.Tensor, precision: Any) -> Any:
    return ct.convert(
        torch.jit.trace(module, x),
        inputs=[ct.TensorType("x", x.shape)],
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=precision,
        skip_model_load=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [(ct.precision.FLOAT32, 2e-6), (ct.precision.FLOAT16, 5e-3)])
def test_a_model_that_coremltools_converted_from_torch(block: Block, precision: Any, tolerance: float, tmp_path: Path) -> None:
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    converted(block, x, precision).save(str(tmp_path / "block.mlpackage"))
    (result,) = MilModel(tmp_path / "block.mlpackage").predict({"x": x.numpy()}).values()
    np.testing.assert_allclose(result, block(x).detach(), rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["int8", "int4", "lut4", "sparse"])
def test_a_model_that_coremltools_compressed(block: Block, how: str, tmp_path: Path) -> None:
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    coreml = ct.optimize.coreml
    model = converted(block, x, ct.precision.FLOAT32)
    small = {"weight_threshold": 512}
    if how == "lut4":
        config = coreml.OptimizationConfig(
            coreml.OpPalettizerConfig(mode="uniform", nbits=4, granularity="per_grouped_channel", group_size=8, **small)
        )
        model = coreml.palettize_weights(model, config)
    elif how == "sparse":
        model = coreml.prune_weights(model, coreml.OptimizationConfig(coreml.OpMagnitudePrunerConfig(target_sparsity=0.5, **small)))
    else:
        options = {"dtype": how, "granularity": "per_block" if how == "int4" else "per_channel"} | (
            {"block_size": 32} if how == "int4" else {}
        )
        model = coreml.linear_quantize_weights(model, coreml.OptimizationConfig(coreml.OpLinearQuantizerConfig(**options, **small)))
    model.save(str(tmp_path / "small.mlpackage"))
    (compressed,) = MilModel(tmp_path / "small.mlpackage").predict({"x": x.numpy()}).values()
    # The same model with coremltools' own decompression must be the same numbers.
    coreml.decompress_weights(model).save(str(tmp_path / "dense.mlpackage"))
    (dense,) = MilModel(tmp_path / "dense.mlpackage").predict({"x": x.numpy()}).values()
    np.testing.assert_allclose(compressed, dense, atol=1e-6)
    assert not np.allclose(compressed, block(x).detach().numpy(), atol=1e-6)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    weight = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float16)
    return write_package(tmp_path / "model.mlpackage", {"main": function({"x": fp16(1, 16)}, lambda x: mb.linear(x=x, weight=weight))})


DATA = Path("Data", "com.apple.CoreML")


def test_an_unknown_operation_is_named(tmp_path: Path) -> None:
    model = one(tmp_path, {"x": fp16(1, 3, 4, 4)}, lambda x: mb.local_response_norm(x=mb.relu(x=x), size=2, name="lrn"))
    with pytest.raises(
        ElmExportError, match=r"operation local_response_norm \('lrn' in function 'main'\) is not known to this executor; known: abs, "
    ):
        model.predict({"x": np.zeros((1, 3, 4, 4), np.float16)})


def test_a_failing_operation_is_named(tmp_path: Path) -> None:
    table, index = mb.TensorSpec((3,), dtype=types.fp16), mb.TensorSpec((1,), dtype=types.int32)
    model = one(tmp_path, {"x": table, "i": index}, lambda x, i: mb.gather(x=x, indices=i, axis=0, name="pick"))
    with pytest.raises(ElmExportError, match=r"operation gather \('pick' in function 'main'\) failed: "):
        model.predict({"x": np.zeros(3, np.float16), "i": np.array([3], np.int32)})


def test_wrong_inputs(package: Path) -> None:
    model = MilModel(package)
    with pytest.raises(ElmExportError, match="'main' takes the inputs x, not y"):
        model.predict({"y": np.zeros((1, 16), np.float16)})
    with pytest.raises(ElmExportError, match=r"input 'x' of function 'main' has shape \[2, 16\]; it takes \[1, 16\]"):
        model.predict({"x": np.zeros((2, 16), np.float16)})


@pytest.mark.parametrize("keep", [0, 10, 64, 100, 200])
def test_a_truncated_weight_file(keep: int, package: Path) -> None:
    path = package / DATA / "weights" / "weight.bin"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ElmExportError, match=r"weight\.bin: damaged weight file .*; copy the package again or export it again"):
        MilModel(package)


def test_a_weight_file_of_something_else(package: Path) -> None:
    path = package / DATA / "weights" / "weight.bin"
    path.write_bytes(b"x" * 1000)
    with pytest.raises(ElmExportError, match="storage version"):
        MilModel(package)


def test_an_altered_weight_file(package: Path) -> None:
    path = package / DATA / "weights" / "weight.bin"
    content = bytearray(path.read_bytes())
    content[64] ^= 0xFF  # the sentinel of the first weight
    path.write_bytes(content)
    with pytest.raises(ElmExportError, match="no weight begins at byte 64"):
        MilModel(package)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (DATA / "weights", r"weight\.bin: cannot read the weight file"),
        (DATA / "model.mlmodel", r"is damaged \(Data/com\.apple\.CoreML/model\.mlmodel is missing\)"),
        (Path("Manifest.json"), r"is not a Core ML package: it has no Manifest\.json"),
    ],
)
def test_missing_files(missing: Path, message: str, package: Path) -> None:
    path = package / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ElmExportError, match=message):
        MilModel(package)


@pytest.mark.parametrize("name", ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"])
def test_damaged_files(name: str, package: Path) -> None:
    (package / name).write_bytes(b"\xff{not this")
    with pytest.raises(ElmExportError, match="is damaged"):
        MilModel(package)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_specification(part: float, package: Path) -> None:
    """Nothing of it is taken for a model, not even where whole fields are left."""
    path = package / DATA / "model.mlmodel"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ElmExportError, match="is damaged"):
        MilModel(package)


def test_a_program_without_functions(package: Path) -> None:
    model = Model_pb2.Model(specificationVersion=9)
    model.mlProgram.SetInParent()
    (package / DATA / "model.mlmodel").write_bytes(model.SerializeToString())
    with pytest.raises(ElmExportError, match="holds no function"):
        MilModel(package)


def test_another_model_type(package: Path) -> None:
    model = Model_pb2.Model(specificationVersion=4)
    model.neuralNetwork.SetInParent()
    (package / DATA / "model.mlmodel").write_bytes(model.SerializeToString())
    with pytest.raises(ElmExportError, match="a model of type neuralNetwork, only mlProgram can be run here; convert it with coremltools"):
        MilModel(package)


@pytest.mark.parametrize("path", ["../../outside.mlmodel", "/etc/passwd", "..\\outside"])
def test_paths_that_lead_out_of_the_package_are_not_opened(path: str, package: Path) -> None:
    manifest = package / "Manifest.json"
    manifest.write_text(manifest.read_text().replace("com.apple.CoreML/model.mlmodel", path.replace("\\", "\\\\")))
    with pytest.raises(ElmExportError, match="leads out of the package"):
        MilModel(package)


def test_weights_outside_of_the_package_are_not_opened(package: Path) -> None:
    path = package / DATA / "model.mlmodel"
    model = Model_pb2.Model()
    model.ParseFromString(path.read_bytes())
    block = next(iter(model.mlProgram.functions.values()))
    for operation in next(iter(block.block_specializations.values())).operations:
        for value in operation.attributes.values():
            if value.WhichOneof("value") == "blobFileValue":
                value.blobFileValue.fileName = "@model_path/../../../outside.bin"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ElmExportError, match="leads out of the package"):
        MilModel(package)
