# SPDX-License-Identifier: Apache-2.0
"""What a package index is told; with HYPOTHESIS_PROFILE=nightly (it takes minutes) that a wheel installs and works."""

from __future__ import annotations

import email
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

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
    assert required == ["torch>=2.6", "tqdm>=4.60", "nanobind-backend>=1.0"]
    extras = {"bench", "demo", "dev", "docs", "examples", "gpu", "test", "wheel"}
    assert set(description.get_all("Provides-Extra")) == extras


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


def wheel_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheel_script", ROOT / "scripts" / "wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_check_of_wheels(tmp_path: Path) -> None:
    """A wheel that must not be published is told from one that may."""
    checks = wheel_script()
    checks.sys = SimpleNamespace(platform="test")  # its modules are no libraries
    name = "torch_kernels-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl"
    information = ["sboms/sbom.cdx.json", "licenses/LICENSE", "licenses/licenses/nanobind.txt"]
    files = ["torch_kernels/py.typed", "torch_kernels/_cpu.abi3.so", "torch_kernels/_cpu.pyi"]
    files += [f"torch_kernels-0.1.0.dist-info/{file}" for file in information]

    def problems(name: str, files: list[str]) -> list[str]:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file in files:
                archive.writestr(file, "x" * 100)
        return checks.problems(tmp_path / name)

    assert problems(name, files) == []
    for file in ("torch_kernels/py.typed", "torch_kernels/_cpu.pyi", files[-1]):
        assert problems(name, [f for f in files if f != file]) == [f"{file} is missing"]
    assert "stable ABI" in problems(name, [*files, "torch_kernels/_cuda.cpython-311.so"])[0]
    assert problems(name.replace("cp310-abi3", "cp311-cp311"), files) == ["its tag is cp311-cp311, not cp310-abi3"]
    checks.MOST_BYTES = 10
    assert "more than" in problems(name, files)[0]


def test_workflows() -> None:
    """They are well-formed, use versions of actions, wait for jobs that exist, and run what is in this repository."""
    yaml = pytest.importorskip("yaml")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.name for path in paths] == ["ci.yml", "nightly.yml", "wheels.yml"]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        jobs = yaml.safe_load(text)["jobs"]
        for job in jobs.values():
            assert "runs-on" in job
            assert set(needs if isinstance(needs := job.get("needs", []), list) else [needs]) <= set(jobs)
            used = set(re.findall(r"matrix\.(\w+)", yaml.safe_dump(job)))
            matrix = job.get("strategy", {}).get("matrix", {})
            for variant in matrix.get("include", [matrix]):
                assert used <= set(variant)
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step)
                assert re.fullmatch(r"[\w./-]+@v\d+(\.\d+\.\d+)?", step.get("uses", "a@v1"))
                assert all(f"\n{target}:" in makefile for target in re.findall(r"make (\w+)", step.get("run", "")))
        assert all((ROOT / script).exists() for script in re.findall(r"scripts/\w+\.py", text))


def test_wheels_of_a_release_have_names_of_their_own() -> None:
    """A file's name is version and platform; PyPI gets one for each platform, and every wheel is tested."""
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8"))["jobs"]
    built, tested = (jobs[name]["strategy"]["matrix"]["include"] for name in ("build", "test"))
    assert len({(variant["runner"], variant["local"]) for variant in built}) == len(built)
    public = [variant["runner"] for variant in built if not variant["local"]]
    assert sorted(public) == sorted({variant["runner"] for variant in built})
    runners = {variant["name"]: variant["runner"] for variant in built}
    assert {variant["wheel"]: variant["runner"] for variant in tested} == runners


def run(*command: str | Path, folder: Path, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "TRITON_INTERPRET"}
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with CPU kernels for every processor, checked by the script that makes it."""
    folder = tmp_path_factory.mktemp("wheel")
    script = [sys.executable, ROOT / "scripts" / "wheel.py", "--cuda", "OFF", "--out", folder]
    run(*script, folder=folder, CMAKE_BUILD_PARALLEL_LEVEL="2")
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.skipif(not NIGHTLY, reason="takes minutes: set HYPOTHESIS_PROFILE=nightly")
def test_wheel_has_what_it_should(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (described,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        check_metadata(email.message_from_bytes(archive.read(described)))
        (sbom,) = (json.loads(archive.read(n)) for n in names if n.endswith("/sboms/sbom.cdx.json"))
        stub = archive.read("torch_kernels/_cpu.pyi").decode()
    assert [n for n in names if n.endswith(".so")] == ["torch_kernels/_cpu.abi3.so"]
    assert not [n for n in names if n.startswith(("tests/", "bench/", "csrc/"))]
    assert sbom["bomFormat"] == "CycloneDX"
    assert sbom["metadata"]["component"]["version"] == torch_kernels.__version__
    assert [component["name"] for component in sbom["components"]] == ["nanobind"]
    assert "def tree_attention(" in stub and "class Dispatcher" in stub


# torch is large, so it is borrowed, and small packages with it: from this environment, and from those whose
# site-packages are named in TORCH_KERNELS_TEST_TORCHES, with an older torch or a newer one.
SITE = str(metadata.distribution("torch").locate_file(""))
SITES = [SITE, *filter(None, os.environ.get("TORCH_KERNELS_TEST_TORCHES", "").split(os.pathsep))]


@pytest.mark.skipif(not NIGHTLY, reason="takes minutes: set HYPOTHESIS_PROFILE=nightly")
@pytest.mark.parametrize("site", SITES)
def test_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path, site: str) -> None:
    """The wheel works where the checkout is out of reach."""
    run(sys.executable, "-m", "venv", "venv", folder=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    path = os.pathsep.join(dict.fromkeys((site, SITE)))
    where = run(
        python,
        "-c",
        "import torch, torch_kernels as k; print(torch.__file__, k.__file__)",
        folder=tmp_path,
        PYTHONPATH=path,
    ).split()
    assert where[0].startswith(site) and where[1].startswith(str(tmp_path / "venv")), where
    assert " 0 failed" in run(python, "-m", "torch_kernels", "selftest", folder=tmp_path, PYTHONPATH=path)
