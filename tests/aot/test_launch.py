# SPDX-License-Identifier: Apache-2.0
"""What a launch asks of the CUDA runtime. Nobody has to have a GPU: the runtime is in launch.cu too."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_launches(tmp_path: Path) -> None:
    program = tmp_path / "launch"
    include = f"-I{HERE.parents[1] / 'csrc'}"
    subprocess.run(
        ["nvcc", "-std=c++20", "-cudart", "none", "-arch=sm_90", include, "-o", program, HERE / "launch.cu"], check=True
    )

    def calls(ptx_version: int) -> list[str]:
        result = subprocess.run([program, str(ptx_version)], capture_output=True, text=True, check=True)
        return result.stdout.splitlines()

    # Code from PTX for sm_80 does not wait for the kernel before it, on sm_90 neither.
    assert [calls(version)[0] for version in (80, 90, 120)] == ["launched, up to 48 KB", *["launched early"] * 2]
    # A launch with 60 KB takes nothing from one with 90 KB, which another thread may be about to make. 100 KB are too
    # much.
    assert calls(90)[1:] == [
        *["launched, up to 99 KB"] * 2,
        "asking for 102400 bytes of shared memory for kernel: refused",
    ]
