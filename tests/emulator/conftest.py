# SPDX-License-Identifier: Apache-2.0
"""Builds the emulator's test programs, all at once, the first time one is needed."""

import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMMON = ["-x", "c++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def cuda_include() -> Path | None:
    """Where cuda_fp16.h and its like are: $CUDA_HOME, the toolkit nvcc belongs to, /usr/local/cuda, or the packages
    nvidia-cuda-runtime, nvidia-cuda-crt and nvidia-cuda-cccl, which bring the headers without a toolkit."""
    candidates = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    if nvcc := shutil.which("nvcc"):
        candidates.append(Path(nvcc).resolve().parent.parent / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    if (nvidia := importlib.util.find_spec("nvidia")) is not None:
        for place in nvidia.submodule_search_locations or []:
            candidates += sorted(Path(place).glob("cu*/include"), reverse=True)
    return next((path for path in candidates if (path / "cuda_fp16.h").exists()), None)


class Programs:
    """The compiled programs; `run` starts one and returns (exit status, everything it printed)."""

    def __init__(self, folder: Path, include: Path):
        compiler = [os.environ.get("CXX", "g++"), *COMMON, "-I", str(include)]
        self.folder = folder
        builds = {
            "faults_sanitized": [*compiler, "-g", "-O1", *SANITIZE, str(HERE / "faults.cu")],  # longest first
            "instructions_sanitized": [*compiler, "-g", "-O0", *SANITIZE, str(HERE / "instructions.cu")],
            "faults": [*compiler, "-O2", "-rdynamic", str(HERE / "faults.cu")],
            "instructions": [*compiler, "-O1", str(HERE / "instructions.cu")],
        }
        if nvcc := shutil.which("nvcc"):
            target = ["-std=c++20", "-arch=sm_80"]  # with PTX, for later devices
            builds["instructions_device"] = [nvcc, *target, str(HERE / "instructions.cu")]
        self.names = set(builds)
        with ThreadPoolExecutor(max_workers=2) as pool:
            for _ in pool.map(lambda name: self.build(builds[name], name), builds):
                pass

    def build(self, command: list[str], name: str) -> None:
        command = [*command, "-o", str(self.folder / name)]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, " ".join(command) + "\n" + result.stdout

    def run(self, name: str, *arguments: object) -> tuple[int, str]:
        result = subprocess.run(
            [str(self.folder / name), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return result.returncode, result.stdout.strip()


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    include = cuda_include()
    if include is None:
        pytest.skip("no CUDA headers: see cuda_include in tests/emulator/conftest.py")
    return Programs(tmp_path_factory.mktemp("emulator"), include)
