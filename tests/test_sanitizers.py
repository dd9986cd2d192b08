# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels, and the CUDA kernels in the emulator, under AddressSanitizer and UndefinedBehaviorSanitizer.

The modules are built into build/sanitize and kept there; a first build takes minutes. By default it has one instruction
set: AVX2, which other tests do not run where there is a better one; nightly all that run here. torch's memory comes
from the sanitizer's allocator, so a kernel that reads or writes one element past a tensor is reported.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
CXX = os.environ.get("CXX", "c++")
CUDA_HEADERS = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
BACKENDS = ["cpu", *(["emulator"] if any((home / "include" / "cuda_fp16.h").exists() for home in CUDA_HEADERS) else [])]

BEST = _native.cpu.instruction_set()
EVERY_ISA = list(dict.fromkeys(("generic", "avx2", BEST))) if BEST != "generic" else ["generic"]
ISAS = EVERY_ISA if NIGHTLY else ["generic" if BEST == "generic" else "avx2"]
TARGETS = [{"TORCH_KERNELS_TEST_BACKENDS": "cpu", "TORCH_KERNELS_CPU_ISA": isa} for isa in ISAS]
TARGETS += [{"TORCH_KERNELS_TEST_BACKENDS": backend} for backend in BACKENDS[1:]]

if platform.system() != "Linux" or not all(map(shutil.which, (CXX, "nice"))):
    pytest.skip("sanitizers are run on Linux with a compiler only", allow_module_level=True)


def runtimes() -> list[str]:
    """The sanitizers' libraries; the compiler repeats the bare name of one it does not have."""
    named = (
        subprocess.check_output([CXX, f"-print-file-name=lib{x}.so"], text=True).strip() for x in ("asan", "ubsan")
    )
    return [name for name in named if "/" in name]


if len(runtimes()) < 2:
    pytest.skip(f"{CXX} has no libasan.so and libubsan.so", allow_module_level=True)


def tool(name: str) -> str:
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return shutil.which(name, path=beside_python) or pytest.skip(f"no {name}")


def build() -> None:
    nanobind = subprocess.run([sys.executable, "-m", "nanobind", "--cmake_dir"], capture_output=True, text=True)
    if nanobind.returncode:
        pytest.skip("no nanobind")
    settings = {
        "CMAKE_BUILD_TYPE": "Debug",  # keeps symbols and assertions; the kernels are compiled with -O1 nevertheless
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": nanobind.stdout.strip(),
        "TORCH_KERNELS_SANITIZE": "address,undefined",
        "TORCH_KERNELS_CPU_ISAS": ";".join(ISAS),
        "TORCH_KERNELS_CUDA": "OFF",
        "TORCH_KERNELS_EMULATOR": "ON" if "emulator" in BACKENDS else "OFF",
    }
    configure = [tool("cmake"), "-S", ROOT, "-B", BUILD, "-G", "Ninja", *(f"-D{k}={v}" for k, v in settings.items())]
    for command in (configure, ["nice", tool("ninja"), "-C", BUILD, "-j2"]):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, result.stdout[-5000:]


@pytest.fixture(scope="module")
def path() -> Path:
    """A folder to put first on Python's path: this checkout's torch_kernels with sanitized modules."""
    import fcntl

    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # other processes of a parallel test run wait for the build
        fcntl.flock(lock, fcntl.LOCK_EX)
        build()
        package = BUILD / "path" / "torch_kernels"
        shutil.rmtree(package, ignore_errors=True)
        shutil.copytree(
            ROOT / "python" / "torch_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
        for module in BUILD.glob("_*.so"):
            (package / module.name).symlink_to(module)
        # An editable install must not come first.
        (package.parent / "sitecustomize.py").write_text(
            "import sys\n"
            "sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith('ScikitBuild')]\n"
        )
    return package.parent


def python(path: Path, *words: str, timeout: float | None = 600, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(path),
        "LD_PRELOAD": " ".join(runtimes()),  # Python itself is not instrumented
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "TORCH_KERNELS_BACKEND"):
        environment.pop(name, None)
    command = ["nice", sys.executable, *words]
    return subprocess.run(
        command, env=environment | variables, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_modules_are_instrumented(path: Path, backend: str) -> None:
    (module,) = path.glob(f"torch_kernels/_{backend}.*so")
    content = module.read_bytes()
    assert any(check in content for check in (b"__asan_load4", b"__asan_report_load4"))
    assert b"__ubsan_handle_type_mismatch" in content


# The native functions trust their caller: checks are made in Python.
FAULTS = {
    "heap-buffer-overflow": "native.tree_mask(torch.empty(1, 3, 3, dtype=torch.bool), torch.tensor([[-1, 0, 1, 1]]))",
    "misaligned address": "native.tree_mask(torch.empty(1, 3, 3, dtype=torch.bool), "
    "torch.frombuffer(bytearray(64), dtype=torch.int32, offset=1, count=3)[None])",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_planted_fault_is_reported(path: Path, backend: str, fault: str) -> None:
    code = f"import torch\nfrom torch_kernels import _{backend} as native\n{FAULTS[fault]}\nprint('unnoticed')"
    result = python(path, "-c", code)
    assert result.returncode != 0 and "unnoticed" not in result.stdout, result.stderr
    assert fault in result.stderr and "tree_structure" in result.stderr, result.stderr


# What adds nothing here: tests of Python code, opcheck and torch.compile, which never reach other code in a kernel, and
# the same calls again in order to compare values.
LEFT_OUT = (
    "arguments", "bits", "formats", "heuristics", "masking", "module", "peers", "registration", "speculation", "weight",
)  # fmt: skip
# Minutes in the truth's PyTorch, over code that shorter tests reach.
LONG = tuple(
    f"tests/lightning_attention/test_{test}"
    for test in (
        "attention.py::test_long_memory_does_not_drift", "backward.py::test_autograd_compiles_without_a_break",
        "backward.py::test_head_sizes", "backward.py::test_long", "decoding.py::test_many_steps_do_not_drift",
        "pool.py::test_a_long_life",
    )
)  # fmt: skip
FAMILIES = sorted(folder.name for folder in (ROOT / "csrc").iterdir() if (folder / "kernels.h").exists())


on_every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: "-".join(target.values()))


@pytest.mark.parametrize("family", FAMILIES)
@on_every_target
def test_suite(path: Path, target: dict[str, str], family: str) -> None:
    ignored = [f"--ignore=tests/{family}/test_{name}.py" for name in LEFT_OUT]
    # A sanitizer ends the process; what it says would be lost in what pytest captures of a file descriptor.
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", f"tests/{family}", *ignored]
    if not NIGHTLY:
        command += [f"--deselect={test}" for test in LONG]
    profile = {} if NIGHTLY else {"HYPOTHESIS_PROFILE": "brief"}
    timeout = None if NIGHTLY else 600
    result = python(path, *command, timeout=timeout, **target, **profile)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    assert " passed" in result.stdout


@on_every_target
def test_fuzz(path: Path, target: dict[str, str]) -> None:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", "tests/test_fuzz.py"]
    profile = {} if NIGHTLY else {"HYPOTHESIS_PROFILE": "brief"}
    timeout = None if NIGHTLY else 600
    result = python(path, *command, timeout=timeout, **target, **profile)
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    assert " passed" in result.stdout
