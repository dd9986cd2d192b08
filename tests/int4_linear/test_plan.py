# SPDX-License-Identifier: Apache-2.0
"""The plan of the CUDA kernels, host code: splits that do not depend on M, tiles that cover, memory that fits."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_plan(tmp_path: Path) -> None:
    program = tmp_path / "plan"
    compiler = os.environ.get("CXX", "g++")
    source = Path(__file__).with_name("plan.cpp")
    subprocess.run([compiler, "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ok", done.stdout
