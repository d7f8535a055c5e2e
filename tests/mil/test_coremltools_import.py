"""Import of coremltools without the packages that it would load and not use."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

from elmexport.mil.coremltools_import import _hidden

IMPORTS = """
    import sys
    from elmexport.mil.coremltools_import import quiet_coremltools

    with quiet_coremltools():
        import coremltools
    print([name for name in ("sklearn", "pandas") if name in sys.modules], coremltools._deps._HAS_HF)
    import transformers, sklearn
"""


@pytest.mark.slow
def test_packages_that_coremltools_does_not_use_are_not_loaded() -> None:
    """`pandas` comes with scikit-learn."""
    assert Version(version("scikit-learn")) > Version("1.5.1")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(IMPORTS)], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


def test_hidden_packages_are_there_for_other_threads_and_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hidden_here.py").write_text("")
    (tmp_path / "hidden_there.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with _hidden(("hidden_here", "hidden_there")):
        with pytest.raises(ModuleNotFoundError, match="hidden_here"):
            __import__("hidden_here")
        other = threading.Thread(target=__import__, args=("hidden_there",))
        other.start()
        other.join()
    assert "hidden_there" in sys.modules
    assert __import__("hidden_here").__name__ == "hidden_here"
