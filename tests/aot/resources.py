# SPDX-License-Identifier: Apache-2.0
"""The resource table: what every GPU kernel takes of every architecture, read from its machine code. No GPU is needed.

    python -m tests.aot.resources              compile everything, print the table
    python -m tests.aot.resources --update     and write it to tests/aot/resources.json
    python -m tests.aot.resources --update tree_attention     of these ops only
    python -m tests.aot.resources --update --changed          of sources only that are not those of the table

One entry per kernel and architecture: registers per thread; stack bytes; local memory instructions (spills); shared
memory in bytes; tensor-core instructions by opcode. Triton kernels come from ``aot_cases(arch)`` of each op's
``triton_kernels``, CUDA kernels from ``csrc/*/*.cu``. Results are cached
under build/aot by the hash of everything they depend on.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import triton

ROOT = pathlib.Path(__file__).parents[2]
TABLE = pathlib.Path(__file__).with_name("resources.json")
CACHE = ROOT / "build" / "aot"
TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TRITON_ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
CUDA_ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
SHARED_LIMIT = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
MMA_OPCODES = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "v_mfma")


def shared_limit(arch: str) -> int:
    return SHARED_LIMIT[arch.removesuffix("a")] * 1024


def _run(command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def cached(key_parts, compute):
    """compute(), or what it gave when these parts of the key were last seen."""
    key = hashlib.sha256("\0".join(map(str, key_parts)).encode()).hexdigest()[:32]
    file = CACHE / f"{key}.json"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.{id(key)}")
        part.write_text(json.dumps(compute()))
        part.replace(file)
    return json.loads(file.read_text())


def _contents(files) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(files))).hexdigest()


def _count(opcodes, assembly: str) -> dict[str, int]:
    counts = {opcode: len(re.findall(rf"\b{opcode}", assembly)) for opcode in opcodes}
    return {opcode: count for opcode, count in counts.items() if count}


def read_cubin(cubin: pathlib.Path) -> dict[str, dict]:
    """Resources of each kernel in a cubin, by mangled name."""
    usage = _run([TOOLS / "cuobjdump", "--dump-resource-usage", cubin])
    found = {}
    for name, line in re.findall(r"Function ([^\s:]+):\s*\n\s*(REG:.*)", usage):
        value = {key: int(number) for key, number in re.findall(r"(\w+(?:\[\d\])?):(\d+)", line)}
        found[name] = {"registers": value["REG"], "stack": value["STACK"], "shared": value["SHARED"]}
    for section in re.split(r"\n\s*Function : ", _run([TOOLS / "cuobjdump", "--dump-sass", cubin]))[1:]:
        name, _, body = section.partition("\n")
        if name.strip() in found:
            found[name.strip()] |= {
                "local": len(re.findall(r"\b(?:LDL|STL)\b", body)),
                "mma": _count(MMA_OPCODES, body),
            }
    return found


def read_amdgcn(assembly: str) -> dict:
    def number(field):
        return int(re.search(rf"\.{field}:\s*(\d+)", assembly).group(1))

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "local": number("vgpr_spill_count"),
        "mma": _count(MMA_OPCODES, assembly),
    }


def triton_sources() -> dict[str, str]:
    """Every op with Triton kernels, with a hash of all that goes into them."""
    package = ROOT / "python/torch_kernels"
    ops = sorted(path.parent.name for path in package.glob("*/triton_kernels*"))
    return {
        op: _contents(
            [
                *package.glob("_triton*.py"),
                *(package / op).glob("heuristics.py"),
                *(package / op).glob("triton_kernels/*.py"),
            ]
        )[:16]
        for op in ops
    }


def _compile_triton(op: str, source_hash: str, arch: str, every: int) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as triton_cache:
        environment |= {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": triton_cache}
        command = [sys.executable, "-m", "tests.aot.compile_triton", op, arch, every]
        entries = json.loads(_run(command, env=environment, cwd=ROOT))
    return [{"source": source_hash} | entry for entry in entries]


def triton_jobs(archs=TRITON_ARCHS, every: int = 1):
    """(description, function giving entries) of every op with Triton kernels and every architecture; of each op's
    kernels every n-th."""
    for op, source_hash in triton_sources().items():
        for arch in archs:
            yield f"{op} {arch}", functools.partial(_compile_triton, op, source_hash, arch, every)


def nvcc_version() -> str | None:
    if not shutil.which("nvcc"):
        return None
    return re.search(r"V(\d+\.\d+\.\d+)", _run(["nvcc", "--version"])).group(1)


def _compile_cuda(source: pathlib.Path, arch: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernels.cubin"
        _run(["nvcc", "-std=c++20", "-O3", "-cubin", f"-arch={arch}", f"-I{ROOT / 'csrc'}", "-o", cubin, source])
        return read_cubin(cubin)


def _demangle(name: str) -> str:
    """The readable name with template arguments but without parameters, which add nothing."""
    if not shutil.which("c++filt"):
        return name
    readable = _run(["c++filt", name]).strip().removeprefix("void ")
    if not readable.endswith(")"):
        return readable
    depth = 0
    for index in reversed(range(len(readable))):
        depth += {")": 1, "(": -1}.get(readable[index], 0)
        if depth == 0:
            return readable[:index]
    return readable


def _host_only(header: pathlib.Path) -> bool:
    return header.parts[-2] in ("cpu", "emulator") or header == ROOT / "csrc/core/error.h"


def _with_includes(source: pathlib.Path) -> set[pathlib.Path]:
    """A source and the files of csrc that it includes, directly or not, without those that only the host compiles."""
    found, new = set(), [source]
    while new:
        file = new.pop()
        found.add(file)
        names = re.findall(r'^ *# *include "(.+)"', file.read_text(), re.MULTILINE)
        included = (folder / name for name in names for folder in (file.parent, ROOT / "csrc"))
        new += [path for path in included if path.exists() and path not in found and not _host_only(path)]
    return found


def cuda_sources() -> dict[str, str]:
    """Every CUDA source as "op/file", with a hash of all that goes into it."""
    sources = sorted((ROOT / "csrc").glob("*/*.cu"))
    return {f"{source.parent.name}/{source.stem}": _contents(_with_includes(source))[:16] for source in sources}


def _cuda_entries(label: str, source_hash: str, arch: str, version: str) -> list[dict]:
    source = ROOT / "csrc" / f"{label}.cu"
    kernels = cached([label, source_hash, arch, version], lambda: _compile_cuda(source, arch))
    common = {"arch": arch, "compiler": f"nvcc {version}", "source": source_hash}
    return [{"kernel": f"{label}: {_demangle(name)}"} | common | entry for name, entry in kernels.items()]


def cuda_jobs(archs=CUDA_ARCHS, labels=None):
    """The same for every CUDA source, or those labelled so; none where nvcc is missing."""
    version = nvcc_version()
    for label, source_hash in cuda_sources().items() if version else []:
        for arch in archs if labels is None or label in labels else ():
            yield f"{label} {arch}", functools.partial(_cuda_entries, label, source_hash, arch, version)


def collect(jobs, workers: int = 2, report=None) -> list[dict]:
    """The entries of all jobs, sorted. A kernel that does not compile raises."""
    entries = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(job): description for description, job in jobs}
        for future in concurrent.futures.as_completed(running):
            entries += future.result()
            if report:
                report(running[future])
    return sort(entries)


def sort(entries: list[dict]) -> list[dict]:
    return sorted(entries, key=lambda entry: (entry["kernel"], entry["arch"]))


def read_table() -> list[dict]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else []


def write_table(entries) -> None:
    TABLE.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="write tests/aot/resources.json")
    parser.add_argument("--changed", action="store_true", help="leave out sources that the table knows")
    parser.add_argument("ops", nargs="*", help="ops to compile (default: all)")
    arguments = parser.parse_args()
    table, sources = read_table(), triton_sources() | cuda_sources()
    known = {entry["source"] for entry in table} & set(sources.values()) if arguments.changed else set()

    def chosen(kernel: str) -> bool:
        return not arguments.ops or re.split("[ /]", kernel)[0] in arguments.ops

    jobs = [(label, job) for label, job in (*triton_jobs(), *cuda_jobs()) if chosen(label)]
    jobs = [(label, job) for label, job in jobs if sources[label.split(" ")[0]] not in known]
    entries = collect(jobs, os.cpu_count(), lambda job: print("compiled", job, file=sys.stderr, flush=True))
    for entry in entries:
        numbers = "{arch:8} {registers:4} registers {stack:6} stack {local:4} local {shared:7} shared".format(**entry)
        print(f"{numbers}  {entry['kernel']}  {entry['mma']}")
    if arguments.update:
        kept = [entry for entry in table if not chosen(entry["kernel"]) or entry["source"] in known]
        write_table(sort([*entries, *kept]))


if __name__ == "__main__":
    main()
