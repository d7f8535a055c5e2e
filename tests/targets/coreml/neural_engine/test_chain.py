"""A model cut into packages: the numbers of the model in one, in every form; what manifest and packages say; reproducible bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from calibration.options import WeightOptions
from elmexport.artifact import Artifact, file_sha256
from elmexport.checkpoint.base import Checkpoint
from elmexport.cli.main import app
from elmexport.errors import ElmExportError
from elmexport.exporting import export_checkpoint
from elmexport.inspection import inspect_artifact
from elmexport.mil.executor import MilModel, States
from elmexport.models.openelm.config import OpenELMConfig
from elmexport.runtimes import open_artifact
from elmexport.runtimes.coreml import CoreMLRuntime, open_runtime
from elmexport.runtimes.coreml_engines import Engine, NarrowedMilEngine
from elmexport.runtimes.generation import generate
from elmexport.runtimes.sampler import Sampling
from elmexport.weights import Role
from targets.coreml.neural_engine.chain import file_names
from tests.conftest import ExportTo
from tests.memory_checkpoint import MemoryCheckpoint, random_checkpoint
from tests.targets.coreml.package_reader import Package, shape

pytestmark = pytest.mark.slow

# By scheme: megabytes that cut the small model into one, two and three packages.
LIMITS: Mapping[str, Mapping[int, float]] = {"fp16": {1: 100, 2: 1.2, 3: 0.8}, "int4": {1: 100, 2: 0.4, 3: 0.3}}
UNCALIBRATED = WeightOptions(calibrate="none")

ArtifactOf = Callable[..., Path]


@pytest.fixture(scope="module")
def artifact(small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> ArtifactOf:
    """`artifact(packages, quant, **settings)` of the small model, each made once."""
    made: dict[str, Path] = {}

    def call(packages: int, quant: str = "fp16", **settings: object) -> Path:
        key = f"{packages} {quant} {settings}"
        if key not in made:
            limit = {"max_package_mb": LIMITS[quant][packages]}
            made[key] = export_to(small_checkpoint, "coreml", quant, weights=UNCALIBRATED, settings=limit | settings)
        assert names(made[key]) == file_names(f"small-{quant}", packages)
        return made[key]

    return call


@pytest.fixture(scope="module")
def ids(small_config: OpenELMConfig) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, small_config.vocab_size, 128)


def names(artifact: Path) -> list[str]:
    return sorted(path.name for path in artifact.glob("*.mlpackage"))


def by_manifest(artifact: Path) -> Callable[[NDArray[np.int64], int], NDArray[np.float32]]:
    """The model run as the manifest says, and Core ML would: one package after another, at full sizes. Gives what follows the last token."""
    chain = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))["chain"]
    models = {package["file"]: MilModel(artifact / package["file"]) for package in chain["packages"]}
    caches: dict[str, States] = {
        package["file"]: {name: torch.zeros(2, 0) for name in package["states"]} and models[package["file"]].make_states("decode")
        for package in chain["packages"]
    }

    def logits(ids: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        function = "decode" if len(ids) == 1 else "prefill"
        given = {
            "input_ids": np.pad(ids, (0, chain["functions"][function] - len(ids)))[None].astype(np.int32),
            "position": np.array([position], np.int32),
            "last_token": np.array([len(ids) - 1], np.int32),
        }
        travelling: dict[tuple[str, str], NDArray[Any]] = {}
        results: dict[str, NDArray[Any]] = {}
        for package in chain["packages"]:
            file = package["file"]
            inputs = {name: given[name] for name in package["inputs"] if name in given and (name != "last_token" or function == "prefill")}
            inputs |= {joint["to"][1]: travelling[tuple(joint["from"])] for joint in chain["joints"] if joint["to"][0] == file}
            results = models[file].predict(inputs, caches[file], function)
            assert list(results) == package["outputs"]
            travelling |= {(file, name): value for name, value in results.items()}
        return results["logits"][0, -1].astype(np.float32)

    return logits


@pytest.mark.slow
@pytest.mark.parametrize("packages", [2, 3])
@pytest.mark.parametrize("quant", ["fp16", "int4"])
@pytest.mark.parametrize("kv", ["state", "io"])
def test_logits_are_those_of_one_package_bit_for_bit(
    artifact: ArtifactOf, ids: NDArray[np.int64], packages: int, quant: str, kv: str
) -> None:
    cut, whole = (open_artifact(artifact(count, quant, kv=kv)) for count in (packages, 1))
    for start, stop in ((0, 1), (0, 63), (63, 64), (64, 65), (65, 127), (127, 128), (40, 110)):
        assert np.array_equal(cut.logits(ids[start:stop], start), whole.logits(ids[start:stop], start)), (start, stop)
    continuations = [ids[:3], ids[5:6], ids[10:40]]
    for ours, theirs in zip(cut.continuations(continuations, 20), whole.continuations(continuations, 20), strict=True):
        assert np.array_equal(ours, theirs)


def open_engine(path: Path) -> Engine:
    runtime = open_runtime(path)
    assert isinstance(runtime, CoreMLRuntime)
    return runtime.engine()


@pytest.mark.slow
def test_the_executor_follows_the_axes_of_a_chain(artifact: ArtifactOf) -> None:
    for kv in ("state", "io"):
        assert isinstance(open_engine(artifact(3, kv=kv)), NarrowedMilEngine)  # or every prompt would cost a whole chunk and a whole cache


@pytest.mark.slow
def test_without_rounding(artifact: ArtifactOf, ids: NDArray[np.int64]) -> None:
    cut, whole = (open_runtime(artifact(count), precision="fp32").logits(ids[:70]) for count in (3, 1))
    assert np.array_equal(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["state", "io"])
@pytest.mark.parametrize("prefill", [32, 96])
def test_generates_the_same_tokens_in_every_form(artifact: ArtifactOf, ids: NDArray[np.int64], kv: str, prefill: int) -> None:
    def tokens(path: Path) -> list[int]:
        prompt = [int(token) for token in ids[:50]]
        return list(generate(open_artifact(path), prompt, max_tokens=12, sampling=Sampling(temperature=0), eos_ids=()))

    settings = {"kv": kv, "prefill": prefill}
    assert tokens(artifact(3, **settings)) == tokens(artifact(3, **settings, argmax=True)) == tokens(artifact(1, **settings))


def test_the_manifest_says_how_to_chain(artifact: ArtifactOf, ids: NDArray[np.int64]) -> None:
    cut, whole = by_manifest(artifact(3)), MilModel(next(artifact(1).glob("*.mlpackage")))
    states = whole.make_states("decode")

    def expected(part: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        given = {"input_ids": np.pad(part, (0, 64 - len(part) if len(part) > 1 else 0))[None], "position": np.array([position])}
        if len(part) > 1:
            given["last_token"] = np.array([len(part) - 1])
        return np.asarray(whole.predict(given, states, "decode" if len(part) == 1 else "prefill")["logits"][0, -1], np.float32)

    for start, stop in ((0, 64), (64, 100), (100, 101), (101, 102)):
        assert np.array_equal(cut(ids[start:stop], start), expected(ids[start:stop], start))


@pytest.mark.parametrize("layers", [[[0, 0], [1, 2]], [[0, 0], [1, 1], [2, 2]]], ids=["two", "three"])
@pytest.mark.parametrize("kv", ["state", "io"])
def test_packages_as_coremltools_reads_them(artifact: ArtifactOf, small_config: OpenELMConfig, kv: str, layers: list[list[int]]) -> None:
    path = artifact(len(layers), kv=kv)
    chain = json.loads(Artifact.open(path).manifest.to_json())["chain"]
    assert [package["layers"] for package in chain["packages"]] == layers
    caches = ["key_cache", "value_cache"]
    news = ["new_keys", "new_values"] if kv == "io" else []
    own = caches if kv == "io" else []
    wanted = [
        (["input_ids", "position", *own], ["hidden_out", *news]),
        *[(["hidden", "position", *own], ["hidden_out", *news])] * (len(layers) - 2),
        (["hidden", "position", "last_token", *own], ["logits", *news]),
    ]
    for described, (inputs, outputs) in zip(chain["packages"], wanted, strict=True):
        package = Package(path, described["file"])
        assert (described["inputs"], described["outputs"], described["states"]) == (inputs, outputs, [] if own else caches)
        assert described["weight_bytes"] == package.weight_file.stat().st_size
        first, last = described["layers"]
        heads = sum(layer.kv_heads for layer in small_config.layers[first : last + 1])
        for function in package.spec.description.functions:
            tokens = {"prefill": 64, "decode": 1}[function.name]
            assert [feature.name for feature in function.input] == [name for name in inputs if (name, tokens) != ("last_token", 1)]
            assert [feature.name for feature in function.output] == outputs
            kinds = {f.name: list(f.type.multiArrayType.shape) for f in (*function.input, *function.output)}
            kinds |= {f.name: list(f.type.stateType.arrayType.shape) for f in function.state}
            for name in {"hidden", "hidden_out"} & set(kinds):
                assert kinds[name] == [1, 1, tokens, small_config.model_dim]
            assert all(kinds[name] == [1, heads, 128, small_config.head_dim] for name in caches)
            assert all(feature.shortDescription for feature in (*function.input, *function.state, *function.output))
        said = json.loads(dict(package.model.user_defined_metadata)["elmexport.chain"])
        assert said == {"index": chain["packages"].index(described), "files": names(path), "layers": described["layers"]}
    assert chain["joints"] == [{"from": [before, "hidden_out"], "to": [after, "hidden"]} for before, after in pairwise(names(path))]


def test_one_package_says_nothing_of_a_chain(artifact: ArtifactOf) -> None:
    assert Artifact.open(artifact(1)).manifest.chain is None
    assert "elmexport.chain" not in dict(Package(artifact(1)).model.user_defined_metadata)


def test_obeys_the_limit_of_dimensions(artifact: ArtifactOf) -> None:
    for name in names(artifact(3)):
        for function in ("prefill", "decode"):
            for op in Package(artifact(3), name).operations(function):
                for output in op.outputs:
                    assert max(shape(output.type), default=1) <= 16384


@pytest.mark.parametrize("quant", ["fp16", "int4"])
@pytest.mark.parametrize("packages", [2, 3])
def test_no_weight_file_exceeds_the_limit(artifact: ArtifactOf, quant: str, packages: int) -> None:
    sizes = [path.stat().st_size for path in artifact(packages, quant).rglob("weight.bin")]
    assert len(sizes) == packages
    assert max(sizes) <= LIMITS[quant][packages] * 1e6 < sum(sizes)


def test_same_bytes_again(artifact: ArtifactOf, small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
    settings = {"max_package_mb": LIMITS["int4"][3]}
    again = export_to(small_checkpoint, "coreml", "int4", weights=UNCALIBRATED, settings=settings)
    first = artifact(3, "int4")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert [file_sha256(first / file) for file in files] == [file_sha256(again / file) for file in files]


def test_inspect_lists_every_package(artifact: ArtifactOf, small_config: OpenELMConfig) -> None:
    inspection = inspect_artifact(artifact(3), tensors=True)
    assert inspection.problems == () and inspection.tensors is not None
    found = [tensor.name for tensor in inspection.tensors if tensor.role is not None]
    once = [spec.name.replace(".", "_") for spec in small_config.weights()]
    assert {name.removesuffix("_part0").removesuffix("_part1") for name in found} == set(once)
    assert found.count("transformer_token_embeddings_weight") == 2  # the embedding in the first, the head in the last
    text = CliRunner().invoke(app, ["inspect", str(artifact(3))])
    assert text.exit_code == 0, text.output
    assert "package 2       small-fp16-2of3.mlpackage: layer 1, " in text.stdout
    assert "package 3       small-fp16-3of3.mlpackage: layer 2, " in text.stdout
    text = CliRunner().invoke(app, ["inspect", str(artifact(2))])
    assert "package 2       small-fp16-2of2.mlpackage: layers 1 to 2, " in text.stdout


@pytest.mark.slow
def test_the_user_is_told(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    def notes(limit: float) -> tuple[str, ...]:
        settings = {"max_package_mb": limit}
        options = {"out": tmp_path / str(limit), "verify": False, "settings": settings, "weights": UNCALIBRATED}
        return export_checkpoint(small_checkpoint, "coreml", "fp16", **options).notes  # type: ignore[arg-type]

    (note,) = notes(1.2)
    assert "take more than 1.2 MB, so the model is cut into 2 packages that run one after another" in note
    assert not notes(100)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"share_input_output_layers": False}, {"normalize_qk_projections": False}, {"ffn_with_glu": False}, {"num_gqa_groups": 1}],
    ids=str,
)
def test_options_of_the_configuration(small_config: OpenELMConfig, export_to: ExportTo, ids: NDArray[np.int64], changes: Any) -> None:
    checkpoint = random_checkpoint(replace(small_config, **changes))
    whole, cut = (
        export_to(checkpoint, "coreml", "fp16", weights=UNCALIBRATED, settings={"max_package_mb": limit}) for limit in (100.0, 0.95)
    )
    assert len(names(cut)) > 1
    assert np.array_equal(open_artifact(whole).logits(ids[:70]), open_artifact(cut).logits(ids[:70]))
    if not checkpoint.config.share_input_output_layers:
        tensors = inspect_artifact(cut, tensors=True).tensors or ()
        assert [tensor.role for tensor in tensors].count(Role.EMBEDDING) == [tensor.role for tensor in tensors].count(Role.LM_HEAD) == 1


def test_a_vocabulary_in_parts(small_config: OpenELMConfig, export_to: ExportTo) -> None:
    checkpoint = random_checkpoint(
        replace(small_config, vocab_size=40000, num_transformer_layers=2, qkv_multipliers=1.0, ffn_multipliers=1.0)
    )
    ids = np.array([0, 13311, 13333, 26623, 39999])
    whole = export_to(checkpoint, "coreml", "int8", weights=UNCALIBRATED)
    (size,) = (path.stat().st_size for path in whole.rglob("weight.bin"))
    cut = export_to(checkpoint, "coreml", "int8", weights=UNCALIBRATED, settings={"max_package_mb": (size - 1) / 1e6})
    assert len(names(cut)) == 2
    assert np.array_equal(open_artifact(whole).logits(ids), open_artifact(cut).logits(ids))


def test_a_limit_below_one_layer_fails_before_any_work(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ElmExportError, match=r"--max-package-mb is 0\.2, and layer \d"):
        export_checkpoint(small_checkpoint, "coreml", "fp16", out=out, settings={"max_package_mb": 0.2})
    assert list(tmp_path.iterdir()) == []


def test_the_gpu_s_form_is_not_cut(small_checkpoint: MemoryCheckpoint, tmp_path: Path) -> None:
    settings = {"max_package_mb": 1.0, "device": "gpu"}
    with pytest.raises(
        ElmExportError, match=r"with --device gpu a model is one package.*--max-package-mb 2, knowing that Macs load about 2000"
    ):
        export_checkpoint(small_checkpoint, "coreml", "fp16", out=tmp_path / "out", settings=settings)
    assert list(tmp_path.iterdir()) == []


class TestDamage:
    """A chain that is not whole, or not one export's, is refused, and the message says which file."""

    @pytest.fixture
    def folder(self, artifact: ArtifactOf, tmp_path: Path) -> Path:
        """The packages of a chain without the manifest, which would already tell by sizes and hashes."""
        copy = tmp_path / "copy"
        shutil.copytree(artifact(3), copy)
        (copy / "manifest.json").unlink()
        return copy

    def test_the_folder_runs_without_its_manifest(self, folder: Path, artifact: ArtifactOf, ids: NDArray[np.int64]) -> None:
        assert np.array_equal(open_runtime(folder).logits(ids[:9]), open_artifact(artifact(3)).logits(ids[:9]))

    def test_missing(self, folder: Path) -> None:
        shutil.rmtree(folder / "small-fp16-2of3.mlpackage")
        with pytest.raises(ElmExportError, match=r"lacks small-fp16-2of3\.mlpackage: the model was cut into 3 packages"):
            open_runtime(folder)

    def test_missing_in_an_artifact(self, artifact: ArtifactOf, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(artifact(3), copy)
        shutil.rmtree(copy / "small-fp16-2of3.mlpackage")
        with pytest.raises(ElmExportError, match=r"small-fp16-2of3\.mlpackage.* is missing"):
            open_artifact(copy)

    def test_swapped(self, folder: Path) -> None:
        one, two, spare = (folder / name for name in ("small-fp16-1of3.mlpackage", "small-fp16-2of3.mlpackage", "spare"))
        for source, target in ((one, spare), (two, one), (spare, two)):
            source.rename(target)
        with pytest.raises(ElmExportError, match=r"1of3\.mlpackage should be package 1 of 3, and is package 2 of 3 .*renamed or mixed"):
            open_runtime(folder)

    def test_of_another_export(self, folder: Path, small_checkpoint: MemoryCheckpoint, export_to: ExportTo) -> None:
        other = export_to(small_checkpoint, "coreml", "fp16", context=64, weights=UNCALIBRATED, settings={"max_package_mb": 0.8})
        assert names(other) == names(folder)
        shutil.rmtree(folder / "small-fp16-3of3.mlpackage")
        shutil.copytree(other / "small-fp16-3of3.mlpackage", folder / "small-fp16-3of3.mlpackage")
        with pytest.raises(ElmExportError, match=r"are of different exports: elmexport\.context is '64' and '128'"):
            open_runtime(folder)

    def test_one_too_many(self, folder: Path, artifact: ArtifactOf) -> None:
        shutil.copytree(artifact(1) / "small-fp16.mlpackage", folder / "small-fp16.mlpackage")
        with pytest.raises(ElmExportError, match=r"holds small-fp16\.mlpackage besides the 3 packages"):
            open_runtime(folder)

    def test_a_package_alone(self, folder: Path) -> None:
        with pytest.raises(ElmExportError, match=r"2of3\.mlpackage is package 2 of 3 of one model; give the folder"):
            open_runtime(folder / "small-fp16-2of3.mlpackage")


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "packages"), [(7.0, 2), (4.3, 3)])
def test_tiny(tiny: Checkpoint, export_to: ExportTo, limit: float, packages: int) -> None:
    """The trained model, self-check included; `generate` prints the same text."""
    whole, cut = (export_to(tiny, "coreml", "fp16", verify=True, settings={"max_package_mb": mb}) for mb in (1000.0, limit))
    assert names(cut) == file_names("OpenELM-tiny-fp16", packages)
    ids = np.random.default_rng(0).integers(0, tiny.config.vocab_size, 150)
    assert np.array_equal(open_artifact(whole).logits(ids), open_artifact(cut).logits(ids))
    checks = [Artifact.open(path).manifest.self_check for path in (whole, cut)]
    assert checks[0] == checks[1] and checks[0].done
    texts = [CliRunner().invoke(app, ["generate", str(path), "The", "--max-tokens", "20", "--temperature", "0"]) for path in (whole, cut)]
    assert texts[0].exit_code == 0, texts[0].output
    assert texts[0].stdout == texts[1].stdout
