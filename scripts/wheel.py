# SPDX-License-Identifier: Apache-2.0
"""Builds a wheel for this platform and checks that it may be published.

    python scripts/wheel.py [--cuda OFF]                             what `make wheel` runs: into dist/
    python scripts/wheel.py --repair WHEEL --out FOLDER              the second half alone, for cibuildwheel

On Linux auditwheel gives the wheel its manylinux tag. It would also copy OpenMP's runtime into the wheel, with a second
pool of threads: that one is torch's, so it is left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 60 << 20
SYSTEM = ("libc", "libm", "libdl", "librt", "libpthread", "libgcc_s", "libstdc++", "ld-linux")
ALLOWED = (*SYSTEM, "libgomp")  # not libcudart: it is linked statically, and torch's may be another version


def run(*command: str | Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def build(folder: Path, cuda: str | None, architectures: str | None) -> Path:
    settings = {"TORCH_KERNELS_CUDA": cuda, "TORCH_KERNELS_CUDA_ARCHITECTURES": architectures}
    defined = [f"-Ccmake.define.{name}={value}" for name, value in settings.items() if value]
    fresh = "-Ccmake.args=--fresh"  # settings of an earlier build are not remembered; what it compiled is
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", fresh, *defined, "-w", folder)
    (wheel,) = folder.glob("torch_kernels-*.whl")
    return wheel


def repair(wheel: Path, out: Path) -> Path:
    """The wheel with the tag of the oldest system that it runs on."""
    out.mkdir(parents=True, exist_ok=True)
    if sys.platform != "linux":
        return Path(shutil.copy(wheel, out))
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", folder, wheel)
        (repaired,) = Path(folder).glob("*.whl")
        return Path(shutil.copy(repaired, out))


def libraries(module: Path) -> set[str]:
    """The shared libraries that a compiled module asks for: libc, libgomp, ..."""
    from elftools.elf.elffile import ELFFile

    with open(module, "rb") as file:
        tags = ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")
        return {re.split(r"\.so|-x86", tag.needed)[0] for tag in tags}


def problems(wheel: Path) -> list[str]:
    found = []
    if wheel.stat().st_size > MOST_BYTES:
        found.append(f"it has {wheel.stat().st_size / 2**20:.1f} MB, more than {MOST_BYTES >> 20}")
    python, abi, platforms = wheel.stem.split("-")[-3:]
    if (python, abi) != ("cp310", "abi3"):
        found.append(f"its tag is {python}-{abi}, not cp310-abi3")
    if sys.platform == "linux" and "manylinux" not in platforms:
        found.append(f"its platform is {platforms}, not manylinux")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        archive.extractall(folder)
        names = [name for name in archive.namelist() if not name.endswith("/")]
        modules = [name for name in names if name.endswith((".so", ".pyd"))]
        if sys.platform == "linux":
            for module in modules:
                if extra := libraries(Path(folder, module)) - set(ALLOWED):
                    found.append(f"{module} needs {', '.join(sorted(extra))}")
    found += [f"{module} is not compiled for the stable ABI" for module in modules if ".abi3." not in module]
    stubs = [re.sub(r"\.abi3\.\w+$", ".pyi", module) for module in modules]
    wanted = ["torch_kernels/_cpu.pyi", "torch_kernels/py.typed", *stubs]
    information = ["sboms/sbom.cdx.json", "licenses/LICENSE", "licenses/licenses/nanobind.txt"]
    wanted += [f"{'-'.join(wheel.stem.split('-')[:2])}.dist-info/{name}" for name in information]
    return found + [f"{name} is missing" for name in dict.fromkeys(wanted) if name not in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repair", type=Path, metavar="WHEEL", help="a wheel that was built elsewhere")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="FOLDER")
    parser.add_argument("--cuda", choices=("ON", "OFF"), help="default: where nvcc is found")
    parser.add_argument("--cuda-architectures", metavar="LIST", help="as CMake wants them; default: all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = options.repair or build(Path(folder), options.cuda, options.cuda_architectures)
        wheel = repair(raw.resolve(), options.out)
    found = problems(wheel)
    if not found:
        run(sys.executable, "-m", "abi3audit", "--strict", wheel)
    print(f"{wheel} ({wheel.stat().st_size / 2**20:.1f} MB)", *(f"  {problem}" for problem in found), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
