"""Triton's interpreter must be chosen before Triton is imported: its tests run in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["interpreted", "huge_interpreted"])
def test_the_kernels_under_tritons_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name(f"{name}.py"))]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
