# SPDX-License-Identifier: Apache-2.0
"""Compiles every n-th Triton kernel of one op for one architecture, and prints a JSON list of their resources.

A process of its own: tests run with TRITON_INTERPRET=1, under which kernels cannot be compiled.
"""

import importlib
import json
import pathlib
import re
import sys
import tempfile
import types

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .resources import ROOT, cached, read_amdgcn, read_cubin


def load_kernels(op: str) -> types.ModuleType:
    """``torch_kernels.<op>.triton_kernels`` without running the packages around it, which may need compiled modules."""
    for name in ("torch_kernels", f"torch_kernels.{op}"):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / "python" / name.replace(".", "/"))]
        sys.modules[name] = package
    return importlib.import_module(f"torch_kernels.{op}.triton_kernels")


def dot_kinds(ttir: str) -> list[list]:
    """(rows, operand type) of every tl.dot in a kernel."""
    found = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(\w+)> \*", ttir)
    return sorted([int(rows), kind] for rows, kind in set(found))


def compile_case(kernel, signature, constants, options, arch: str) -> dict:
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    # What a launch with ordinary tensors specialises on; "i32:16" is a size that is a multiple of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
        or signature[name] == "i32:16"
        or (signature[name] == "i32" and "stride" in name)
    }
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
    if arch.startswith("gfx"):
        entry = read_amdgcn(compiled.asm["amdgcn"])
    else:
        with tempfile.TemporaryDirectory() as folder:
            cubin = pathlib.Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            (entry,) = read_cubin(cubin).values()
    return entry | {"shared": compiled.metadata.shared, "dots": dot_kinds(compiled.asm["ttir"])}


def main(op: str, arch: str, every: str) -> None:
    entries = []
    for name, kernel, signature, constants, options in list(load_kernels(op).aot_cases(arch))[:: int(every)]:
        signature = signature | dict.fromkeys(constants, "constexpr")
        # cache_key is the hash of the kernel's source and of everything it calls.
        key = [
            kernel.cache_key,
            signature,
            constants,
            options,
            arch,
            triton.__version__,
            pathlib.Path(__file__).read_text(),
        ]
        try:
            entry = cached(key, lambda: compile_case(kernel, signature, constants, options, arch))  # noqa: B023
        except Exception as error:
            raise RuntimeError(f"{op}/{name} does not compile for {arch}") from error
        entries.append({"kernel": f"{op}/{name}", "arch": arch, "compiler": f"triton {triton.__version__}"} | entry)
    print(json.dumps(entries))


if __name__ == "__main__":
    main(*sys.argv[1:])
