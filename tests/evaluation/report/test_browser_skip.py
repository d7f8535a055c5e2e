"""What a run of the suite says where there is no browser."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_without_a_browser_says_what_was_not_tested_and_how_to_install_it() -> None:
    test = Path(__file__).with_name("test_page.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", str(test)]
    ran = subprocess.run(command, env={**os.environ, "PATH": ""}, capture_output=True, text=True, cwd=test.parents[3], check=True)
    summary = ran.stdout.split("short test summary info")[1]
    assert "NOT TESTED: the HTML report in a browser" in summary
    assert "apt-get install chromium" in summary
    assert "passed" not in summary
