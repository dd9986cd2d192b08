# SPDX-License-Identifier: Apache-2.0
"""Compiles one Triton case for one architecture, without a GPU, and prints what came out as JSON.

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

ROOT = pathlib.Path(__file__).parents[2]


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
    # What a launch with ordinary tensors specialises on.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (signature[name] == "i32" and "stride" in name)
    }
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)
    result = {"dots": dot_kinds(compiled.asm["ttir"]), "shared": compiled.metadata.shared}
    if arch.startswith("gfx"):
        result["assembly"] = compiled.asm["amdgcn"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
            file.write(compiled.asm["cubin"])
        result["cubin"] = file.name
    return result


if __name__ == "__main__":
    op, arch, *names = sys.argv[1:]
    for name, kernel, signature, constants, options in load_kernels(op).aot_cases(arch):
        if not names:
            print(name)
        elif name in names:
            print(json.dumps(compile_case(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, options, arch)))
