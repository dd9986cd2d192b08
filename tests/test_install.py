# SPDX-License-Identifier: Apache-2.0
"""What a package index is told; with HYPOTHESIS_PROFILE=nightly (it takes minutes) that a wheel installs and works."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest
import torch_kernels

ROOT = Path(__file__).resolve().parents[1]
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
backend = pytest.importorskip("scikit_build_core.build")


def check_metadata(description: Message) -> None:
    assert description["Name"] == "torch-kernels"
    assert description["Version"] == torch_kernels.__version__
    assert description["Requires-Python"] == ">=3.10"
    assert description["License-Expression"] == "Apache-2.0"
    required = [r for r in description.get_all("Requires-Dist") if "extra ==" not in r]
    assert required == ["torch>=2.6", "tqdm>=4.60"]
    assert set(description.get_all("Provides-Extra")) == {"bench", "demo", "dev", "docs", "examples", "gpu", "test"}


def test_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    folder = tmp_path / backend.prepare_metadata_for_build_wheel(str(tmp_path))
    check_metadata(email.message_from_string((folder / "METADATA").read_text(encoding="utf-8")))
    assert (folder / "licenses" / "LICENSE").exists()


def test_sdist_is_complete_and_lean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / backend.build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files", "csrc", "python"], cwd=ROOT, capture_output=True, text=True)
    wanted = {"CMakeLists.txt", "pyproject.toml", "LICENSE", *tracked.stdout.split()}
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    unwanted = [n for n in names if n.endswith((".so", ".pyc")) or n.startswith(("build/", ".venv/", "bench/results/"))]
    assert not unwanted


def test_types_are_published() -> None:
    assert (ROOT / "python" / "torch_kernels" / "py.typed").exists()


def test_modules_use_no_locales() -> None:
    """A module linked with its own libstdc++ (some compilers do that) crashes in a locale beside torch's libstdc++."""
    streams = re.compile(r"#include <(\w*stream|locale|regex|format|iomanip)>")
    shipped = [p for p in (ROOT / "csrc").rglob("*.*") if p.is_file() and "emulator" not in p.parts]
    assert len(shipped) > 50
    assert not [p.name for p in shipped if streams.search(p.read_text(encoding="utf-8"))]


@pytest.mark.skipif(not NIGHTLY, reason="takes minutes: set HYPOTHESIS_PROFILE=nightly")
def test_wheel_in_an_empty_environment(tmp_path: Path) -> None:
    """Builds the wheel for the CPU, and uses it from an environment where the checkout is out of reach."""

    def run(*command: str | Path, **variables: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "TRITON_INTERPRET"}
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-5000:]
        return result.stdout

    options = ["--no-deps", "--no-build-isolation", "-Ccmake.define.TORCH_KERNELS_CUDA=OFF"]
    build = ["-m", "pip", "wheel", *options, f"-Cbuild-dir={tmp_path / 'build'}", "-w", tmp_path, ROOT]
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(sys.executable, *build, PATH=beside_python, CMAKE_BUILD_PARALLEL_LEVEL="2")
    (wheel,) = tmp_path.glob("torch_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (described,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        check_metadata(email.message_from_bytes(archive.read(described)))
    compiled = [n for n in names if n.endswith(".so")]
    assert len(compiled) == 1 and compiled[0].startswith("torch_kernels/_cpu."), compiled
    assert not [n for n in names if n.startswith(("tests/", "bench/", "csrc/"))]

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    # torch is large: it is borrowed from this environment, and tqdm with it.
    site = Path(metadata.distribution("torch").locate_file(""))
    output = run(python, "-m", "torch_kernels", "selftest", PYTHONPATH=str(site))
    assert "0 failed" in output
    where = run(python, "-c", "import torch_kernels; print(torch_kernels.__file__)", PYTHONPATH=str(site))
    assert where.startswith(str(tmp_path / "venv")), where
