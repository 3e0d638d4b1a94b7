"""Triton's interpreter must be chosen before Triton is imported: its tests run in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_the_attention_kernels_under_tritons_interpreter():
    tests = Path(__file__).with_name("attention_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", str(tests)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernels_are_imported_for_a_gpu_only():
    code = (
        "import sys, recompile.lowering.attention as a; assert f'{a.__name__}.triton_op' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
