"""The artifact folder: all or nothing, never over something else, verifiable."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elmexport.artifact import MANIFEST, Artifact, artifact_folder, check_free, file_sha256, write_manifest
from elmexport.errors import ElmExportError
from elmexport.progress import SilentProgress
from elmexport.runtimes import open_artifact
from tests.manifests import example_manifest

CONTENT = example_manifest(target="onnx")


def make(out: Path, *, force: bool = False, text: str = "weights") -> Path:
    """A small artifact of two files."""
    with artifact_folder(out, force=force) as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_text(text)
        (folder / "config.json").write_text("{}")
        write_manifest(folder, CONTENT)
    return out


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Writing


def test_a_finished_folder_holds_what_was_written_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    out = make(tmp_path / "new" / "artifact")
    assert names(out) == {"onnx", "config.json", MANIFEST}
    assert names(out.parent) == {"artifact"}
    assert Artifact.open(out).verify() == []


def test_same_content_same_bytes(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()


def test_a_manifest_that_nobody_could_read_is_not_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ElmExportError, match=r"manifest\.json: settings\.sizes is \[1\], where"),
        artifact_folder(tmp_path / "artifact") as folder,
    ):
        write_manifest(folder, example_manifest(settings={"sizes": [1]}))
    assert names(tmp_path) == set()


def test_an_unfinished_folder_does_not_bear_the_final_name(tmp_path: Path) -> None:
    with artifact_folder(tmp_path / "artifact") as folder:
        assert not (tmp_path / "artifact").exists()
        assert folder.parent == tmp_path and folder.name.startswith(".artifact.partial-")
        write_manifest(folder, CONTENT)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, ElmExportError])
def test_any_error_removes_everything(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), artifact_folder(tmp_path / "artifact") as folder:
        (folder / "weights").write_text("half")
        raise error("stop")
    assert names(tmp_path) == set()


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    out = make(tmp_path / "artifact", text="first")
    with pytest.raises(ElmExportError, match=r"exists already; pass --force to replace it, or choose another place with --out"):
        make(out, text="second")
    assert (out / "onnx" / "model.onnx").read_text() == "first"
    assert names(tmp_path) == {"artifact"}


def test_force_replaces_an_artifact_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    out = make(tmp_path / "artifact", text="first")
    (out / "notes.txt").write_text("added by hand")
    make(out, force=True, text="second")
    assert (out / "onnx" / "model.onnx").read_text() == "second"
    assert names(out) == {"onnx", "config.json", MANIFEST}
    assert names(tmp_path) == {"artifact"}


def test_an_error_under_force_keeps_the_old_artifact(tmp_path: Path) -> None:
    out = make(tmp_path / "artifact", text="first")
    with pytest.raises(ValueError, match="stop"), artifact_folder(out, force=True):
        raise ValueError("stop")
    assert Artifact.open(out).verify() == []
    assert names(tmp_path) == {"artifact"}


def test_force_through_a_link_replaces_the_folder_behind_it(tmp_path: Path) -> None:
    out = make(tmp_path / "disk" / "artifact", text="first")
    link = tmp_path / "link"
    link.symlink_to(out)
    make(link, force=True, text="second")
    assert link.is_symlink() and (out / "onnx" / "model.onnx").read_text() == "second"
    assert (names(tmp_path), names(out.parent)) == ({"disk", "link"}, {"artifact"})


def test_force_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    make(tmp_path / "artifact", force=True)
    assert names(tmp_path / "artifact") == {"onnx", "config.json", MANIFEST}


def test_force_does_not_replace_what_is_no_artifact(tmp_path: Path) -> None:
    folder, file = tmp_path / "photos", tmp_path / "file"
    folder.mkdir()
    (folder / "one.jpg").write_text("x")
    file.write_text("x")
    for out in (folder, file):
        with pytest.raises(
            ElmExportError, match=r"is not an artifact folder \(it holds no manifest\.json\), so --force will not replace it"
        ):
            make(out, force=True)
        with pytest.raises(ElmExportError, match="will not replace it"):
            check_free(out, force=True)
    assert names(folder) == {"one.jpg"} and file.read_text() == "x"


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ElmExportError, match=r"cannot write .*file/artifact"):
        make(tmp_path / "file" / "artifact")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder in which nobody can make another")
def test_a_parent_that_cannot_be_made_is_an_error_of_writing(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"cannot write /proc/new/parent/artifact"):
        make(Path("/proc/new/parent/artifact"))


def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(ElmExportError, match=r"cannot write '.*bad.udcff': the path is not text"):
        make(tmp_path / "bad\udcff")
    assert names(tmp_path) == set()


def test_a_name_that_the_file_system_refuses(tmp_path: Path) -> None:
    for act in (make, lambda out: check_free(out, force=False)):
        with pytest.raises(ElmExportError, match=r"cannot write .*name too long; choose another --out"):
            act(tmp_path / ("x" * 300))


# Interrupted and failing writes


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_midway(out: Path) -> int:
    """Start writing an artifact in another process and kill it when everything but the rename is done; returns its pid."""
    process = spawn(
        """if True:
        import sys, time
        from pathlib import Path
        from tests.test_artifact import CONTENT, artifact_folder, write_manifest
        with artifact_folder(Path(sys.argv[1]), force=True) as folder:
            (folder / "weights").write_text("x")
            write_manifest(folder, CONTENT)
            print("ready", flush=True)
            time.sleep(60)
        """,
        out,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return process.pid


def test_kill_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    pid = kill_midway(out)
    (left,) = names(tmp_path)
    assert left.startswith(".artifact.partial-") and left.endswith(f"-{pid}")
    with pytest.raises(ElmExportError, match=r"artifact: no such file or folder; give the folder that an export printed"):
        open_artifact(out)


def test_kill_while_replacing_keeps_the_old_artifact(tmp_path: Path) -> None:
    out = make(tmp_path / "artifact", text="first")
    kill_midway(out)
    assert Artifact.open(out).verify() == []
    assert (out / "onnx" / "model.onnx").read_text() == "first"


def test_the_next_export_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    kill_midway(tmp_path / "artifact")
    alive = tmp_path / f".artifact.partial-{os.getppid()}"  # of a process that still writes
    other = tmp_path / ".artifact.partial-notes"  # not ours: no process id
    alive.mkdir()
    other.mkdir()
    make(tmp_path / "artifact")
    assert names(tmp_path) == {"artifact", alive.name, other.name}


def test_leftovers_of_a_killed_process_that_had_this_ones_number(tmp_path: Path) -> None:
    """In containers that is the rule: every first process is number 1."""
    partial, old = (tmp_path / f".artifact.{kind}-{os.getpid()}" for kind in ("partial", "old"))
    for force in (False, True):
        for leftover in (partial, old):
            leftover.mkdir()
            (leftover / "weights").write_text("x")
        make(tmp_path / "artifact", force=force)
        assert names(tmp_path) == {"artifact"}


def test_a_name_full_of_glob_characters_removes_only_its_own_leftovers(tmp_path: Path) -> None:
    kill_midway(tmp_path / "a1")
    left = names(tmp_path)
    make(tmp_path / "a[0-9]*?")
    assert names(tmp_path) == left | {"a[0-9]*?"}


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    """The system refuses a file above 64 KiB, as a full disk would refuse it midway."""
    process = spawn(
        """if True:
        import resource, signal, sys
        from pathlib import Path
        from tests.test_artifact import ElmExportError, artifact_folder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            with artifact_folder(Path(sys.argv[1])) as folder:
                (folder / "small").write_bytes(bytes(1000))
                (folder / "weights").write_bytes(bytes(100000))
        except ElmExportError as error:
            print(error)
        """,
        tmp_path / "artifact",
    )
    out, err = process.communicate()
    assert re.fullmatch(
        r"cannot write \S+/artifact: File too large; free space or choose another --out\. Nothing was left behind\n", out
    ), out + err
    assert names(tmp_path) == set()


# Reading


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make(tmp_path / "artifact")


def damage_truncate(path: Path) -> None:
    os.truncate(path / "onnx" / "model.onnx", 3)


def damage_flip(path: Path) -> None:
    (path / "onnx" / "model.onnx").write_text("Weights")  # as long as before


def damage_remove(path: Path) -> None:
    (path / "config.json").unlink()


def damage_add(path: Path) -> None:
    (path / "onnx" / "extra.bin").write_text("x")


@pytest.mark.parametrize(
    ("damage", "problem", "changes_size"),
    [
        (damage_truncate, "onnx/model.onnx has 3 bytes, the manifest says 7", True),
        (damage_flip, "onnx/model.onnx has been altered (its SHA-256 differs from the manifest's)", False),
        (damage_remove, "config.json is missing", True),
        (damage_add, "onnx/extra.bin is not in the manifest", False),
    ],
)
def test_damage_is_found(artifact: Path, damage: Callable[[Path], None], problem: str, changes_size: bool) -> None:
    damage(artifact)
    assert Artifact.open(artifact).verify() == [problem]
    if changes_size:  # seen without hashing, so opening it in a runtime tells
        with pytest.raises(ElmExportError, match=rf"is damaged: {re.escape(problem)}\. Copy it again or export it again"):
            open_artifact(artifact)


def test_all_damage_is_told_at_once(artifact: Path) -> None:
    damage_truncate(artifact)
    damage_remove(artifact)
    damage_add(artifact)
    assert len(Artifact.open(artifact).verify()) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"holds no manifest\.json: it is not an artifact, or its export was interrupted; export it again"),
        ("", r"manifest\.json is not JSON \(.*\); export it again"),
        ('{"format": 1, "tar', r"manifest\.json is not JSON \(.*\); export it again"),
        ("\xff", r"manifest\.json is not JSON \(.*\); export it again"),
        ("[" * 100_000, r"manifest\.json is not JSON \(.*\); export it again"),
        ("7", r"manifest\.json is 7, where an object belongs; export it again"),
        ("{}", r"manifest\.json lacks format; export it again"),
        ('{"format": 2, "files": {}}', r"manifest format 2, this version reads up to 1; update elmexport"),
    ],
)
def test_a_damaged_manifest(artifact: Path, text: str | None, message: str) -> None:
    manifest = artifact / MANIFEST
    if text is None:
        manifest.unlink()
    else:
        manifest.write_bytes(text.encode("latin-1"))
    with pytest.raises(ElmExportError, match=message):
        Artifact.open(artifact)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..\\x", "C:\\x", "C:x", "a\0b"])
def test_files_outside_of_the_folder_are_never_opened(artifact: Path, name: str) -> None:
    file = artifact / MANIFEST
    document = json.loads(file.read_bytes())
    document["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    file.write_text(json.dumps(document))
    with pytest.raises(ElmExportError, match="under files lies outside of the folder"):
        Artifact.open(artifact)


def test_open_artifact_on_something_else(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_text("x")
    for path in (tmp_path, tmp_path / "one.jpg"):
        with pytest.raises(ElmExportError, match=r"neither an artifact \(a folder with manifest\.json\), nor a .*interrupted"):
            open_artifact(path)


def test_open_artifact_of_an_unknown_target(tmp_path: Path) -> None:
    with artifact_folder(tmp_path / "artifact") as folder:
        write_manifest(folder, example_manifest(target="tflite"))
    with pytest.raises(ElmExportError, match=r"manifest\.json: target is 'tflite', which nothing here knows; known: onnx, coreml, gguf"):
        open_artifact(tmp_path / "artifact")


class Counted(SilentProgress):
    """Notes stages, their totals and how far each came."""

    def __init__(self) -> None:
        self.stages: list[list[Any]] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append([name, total, 0])

    def advance(self, n: int) -> None:
        self.stages[-1][2] += n


def test_hashing_and_verifying_report_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elmexport.artifact._BLOCK", 7)
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b").write_bytes(b"")
    progress = Counted()
    write_manifest(tmp_path, example_manifest(), progress)
    assert Artifact.open(tmp_path).verify(progress) == []
    assert progress.stages == [["hashing files", 100, 100], ["verifying files", 100, 100]]
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"x" * 100).hexdigest()
