# SPDX-License-Identifier: Apache-2.0
"""Facts of the machine: the CPU from the operating system, NVIDIA GPUs from the driver through cuda-python.

Nothing here is needed to run an op. `python -m torch_kernels info`, the benchmarks and the GPU tests read it.
cuda-python is the optional extra `gpu`, imported only when a GPU is asked about; without it, or without a driver,
`gpus` raises `GpuUnavailable` with one sentence that says what is missing, and `describe` prints that sentence.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The instruction sets that decide which CPU kernel runs, in the spelling of /proc/cpuinfo (x86 flags, Arm features).
# fmt: off
_FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2", "sme",
)
# fmt: on


class GpuUnavailable(RuntimeError):
    """No GPU can be read; the message says what is missing."""


@dataclass(frozen=True)
class Cpu:
    name: str
    architecture: str  # x86_64, aarch64, arm64, ...
    cores: int  # the ones this process may use
    features: tuple[str, ...]
    caches: dict[str, int]  # bytes by level: L1d, L2, L3; one instance of each, as core 0 sees it
    memory_bytes: int | None

    @property
    def last_level_cache_bytes(self) -> int:
        return max(self.caches.values(), default=32 << 20)


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    shared_bytes_per_block: int  # the largest a kernel may opt in to
    clock_mhz: float  # the highest the driver states, not the current one
    memory_clock_mhz: float
    memory_bus_bits: int
    driver: str  # kernel driver, "unknown" where the system does not say
    cuda: str  # newest CUDA version the driver supports

    @property
    def bandwidth_gb_s(self) -> float:
        """Peak memory bandwidth by arithmetic: two transfers per memory clock over the whole bus."""
        return 2 * self.memory_clock_mhz * 1e6 * self.memory_bus_bits / 8 / 1e9


@functools.cache
def cpu() -> Cpu:
    cpuinfo = _read("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    if platform.system() == "Darwin":
        present |= {"asimd"} if platform.machine() == "arm64" else set()
        present |= {f for f in ("bf16", "i8mm", "sme") if _sysctl(f"hw.optional.arm.FEAT_{f.upper()}") == "1"}
    return Cpu(
        name=_cpu_name(cpuinfo),
        architecture=platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        features=tuple(f for f in _FEATURES if f in present),
        caches=_caches(),
        memory_bytes=_memory_bytes(),
    )


def gpus() -> list[Gpu]:
    """The GPUs that CUDA shows this process, in torch's order. Raises GpuUnavailable."""
    driver = _driver()
    attribute = driver.CUdevice_attribute

    def read(index: int) -> Gpu:
        device = _call(driver.cuDeviceGet, index)

        def get(name: str) -> int:
            return _call(driver.cuDeviceGetAttribute, getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device)

        cuda = _call(driver.cuDriverGetVersion)
        return Gpu(
            index=index,
            name=_call(driver.cuDeviceGetName, 256, device).split(b"\0")[0].decode(),
            compute_capability=(get("COMPUTE_CAPABILITY_MAJOR"), get("COMPUTE_CAPABILITY_MINOR")),
            multiprocessors=get("MULTIPROCESSOR_COUNT"),
            l2_bytes=get("L2_CACHE_SIZE"),
            memory_bytes=_call(driver.cuDeviceTotalMem, device),
            shared_bytes_per_block=get("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
            clock_mhz=get("CLOCK_RATE") / 1e3,
            memory_clock_mhz=get("MEMORY_CLOCK_RATE") / 1e3,
            memory_bus_bits=get("GLOBAL_MEMORY_BUS_WIDTH"),
            driver=_driver_version(),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        )

    return [read(index) for index in range(_call(driver.cuDeviceGetCount))]


def cubin_attributes(cubin: bytes | Path, index: int = 0) -> dict[str, dict[str, int]]:
    """What the driver says of each kernel in a cubin or fatbin loaded on GPU `index`: kernel name -> attributes."""
    driver = _driver()
    names = {
        "registers": "NUM_REGS",
        "shared_bytes": "SHARED_SIZE_BYTES",
        "local_bytes": "LOCAL_SIZE_BYTES",
        "constant_bytes": "CONST_SIZE_BYTES",
        "max_threads": "MAX_THREADS_PER_BLOCK",
        "binary_version": "BINARY_VERSION",
    }
    image = cubin.read_bytes() if isinstance(cubin, Path) else cubin
    device = _call(driver.cuDeviceGet, index)
    _call(driver.cuCtxPushCurrent, _call(driver.cuDevicePrimaryCtxRetain, device))
    try:
        library = _call(driver.cuLibraryLoadData, image, [], [], 0, [], [], 0)
        try:
            kernels = _call(driver.cuLibraryEnumerateKernels, _call(driver.cuLibraryGetKernelCount, library), library)
            return {
                _call(driver.cuKernelGetName, kernel).decode(): {
                    key: _call(
                        driver.cuKernelGetAttribute,
                        getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}"),
                        kernel,
                        device,
                    )
                    for key, name in names.items()
                }
                for kernel in kernels
            }
        finally:
            _call(driver.cuLibraryUnload, library)
    finally:
        _call(driver.cuCtxPopCurrent)
        _call(driver.cuDevicePrimaryCtxRelease, device)


def machine_name(device: str = "cpu") -> str:
    """A name for results measured on `device`, fit for a folder: nvidia-h200, amd-epyc-9575f-2-cores."""
    if device.startswith("cuda"):
        name = _gpu_name(int(device.partition(":")[2] or 0))
    else:
        name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*", "", cpu().name, flags=re.IGNORECASE) + f" {cpu().cores} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe() -> str:
    """A few lines for people."""
    host = cpu()
    caches = ", ".join(f"{level} {_size(size)}" for level, size in host.caches.items()) or "caches unknown"
    lines = [
        f"CPU  {host.name} ({host.architecture}), {host.cores} cores, {caches}"
        + (f", memory {_size(host.memory_bytes)}" if host.memory_bytes else ""),
        f"     {' '.join(host.features) or 'no vector extension that a kernel asks for'}",
    ]
    try:
        found = gpus()
    except GpuUnavailable as missing:
        return "\n".join([*lines, f"GPU  {missing}"])
    for gpu in found:
        major, minor = gpu.compute_capability
        lines += [
            f"GPU  {gpu.index}: {gpu.name}, compute capability {major}.{minor}, {gpu.multiprocessors} multiprocessors "
            f"at up to {gpu.clock_mhz:.0f} MHz, driver {gpu.driver}, CUDA up to {gpu.cuda}",
            f"     memory {_size(gpu.memory_bytes)} at {gpu.bandwidth_gb_s:.0f} GB/s "
            f"({gpu.memory_bus_bits} bits at {gpu.memory_clock_mhz:.0f} MHz), L2 {_size(gpu.l2_bytes)}, "
            f"shared memory per block up to {_size(gpu.shared_bytes_per_block)}",
        ]
    return "\n".join(lines)


def _driver() -> Any:
    """The initialised driver binding."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise GpuUnavailable(
            "facts need cuda-python, which is not installed: pip install 'torch-kernels[gpu]'"
        ) from error
    try:
        (status,) = driver.cuInit(0)
    except (
        Exception
    ) as error:  # the binding raises its own classes, which differ between versions, when libcuda is not there
        raise GpuUnavailable("no NVIDIA driver: the system has no libcuda") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise GpuUnavailable(f"no usable NVIDIA GPU: cuInit says {_reason(driver, status)}")
    return driver


def _call(function: Any, *args: Any) -> Any:
    status, *values = function(*args)
    if int(status) != 0:
        raise GpuUnavailable(f"{function.__name__} failed: {getattr(status, 'name', status)}")
    return values[0] if values else None


def _reason(driver: Any, status: Any) -> str:
    _, text = driver.cuGetErrorString(status)
    return text.decode() if text else str(status)


def _driver_version() -> str:
    found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", _read("/proc/driver/nvidia/version"))
    return found[1] if found else "unknown"


def _cpu_name(cpuinfo: str) -> str:
    found = re.search(r"^(?:model name|Model)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    name = found[1] if found else _sysctl("machdep.cpu.brand_string") or platform.processor()
    return " ".join(name.split()) or platform.machine() or "unknown CPU"


def _gpu_name(index: int) -> str:
    try:
        return gpus()[index].name
    except GpuUnavailable:  # the name needs no more than torch
        import torch

        return torch.cuda.get_device_name(index)


def _caches() -> dict[str, int]:
    caches = {}
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(entry / name).strip() for name in ("level", "type", "size"))
        parsed = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind != "Instruction" and parsed:
            name = f"L{level}d" if kind == "Data" else f"L{level}"
            caches[name] = int(parsed[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[parsed[2]]
    if not caches:
        for name, key in (("L1d", "hw.l1dcachesize"), ("L2", "hw.l2cachesize"), ("L3", "hw.l3cachesize")):
            if found := int(_sysctl(key) or 0):
                caches[name] = found
    return caches


def _memory_bytes() -> int | None:
    if found := re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE):
        return int(found[1]) << 10
    return int(_sysctl("hw.memsize") or 0) or None


def _sysctl(key: str) -> str:
    if platform.system() != "Darwin":
        return ""
    return subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False).stdout.strip()


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GB"
