# SPDX-License-Identifier: Apache-2.0
"""What the way from Python to the kernel costs: calls on the smallest inputs, which leave the kernel little to do.

The overhead of an op is its call minus the bare native call, round by round. On CUDA the times are the host's, launches
included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from harness import record
from harness.timing import Sampler, cpu_sampler, interleave, spread
from units import duration

LIBRARY = torch.library.Library("kernels_bench", "DEF")
LIBRARY.define("empty(Tensor x) -> ()")


def smallest_tree_attention(device: str) -> tuple[tuple, dict]:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(*shape, device=device)

    prefix = torch.tensor([1], dtype=torch.int32, device=device)
    root = torch.tensor([[-1]], dtype=torch.int32, device=device)
    cache, node = ones(1, 2, 1, 8), ones(1, 1, 1, 8)
    return (node, cache, cache.clone(), prefix, root), {"k_tree": node.clone(), "v_tree": node.clone()}


OPS: dict[str, Callable[[str], tuple[tuple, dict]]] = {"tree_attention": smallest_tree_attention}


def native_call(op: str, arguments: tuple, keywords: dict, device: str) -> Callable[[], object] | None:
    """The bare nanobind call with outputs allocated beforehand: outputs, then every argument in the schema's order."""
    from torch_kernels import _native

    native = getattr(_native.cpu if device == "cpu" else _native.cuda(), op, None)
    if native is None:
        return None
    values = list(arguments)
    for argument in getattr(torch.ops.kernels, op).default._schema.arguments[len(arguments) :]:
        values.append(keywords.get(argument.name, argument.default_value))
    outputs = getattr(torch.ops.kernels, op)(*arguments, **keywords)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return lambda: native(*outputs, *values)


def synchronised(sample: Sampler) -> Sampler:
    """Empties the queue after each sample, so that the host never waits inside one."""

    def measure() -> float:
        seconds = sample()
        torch.cuda.synchronize()
        return seconds

    return measure


def contenders(device: str) -> dict[str, Callable[[], object]]:
    import torch_kernels

    x = torch.ones(8, device=device)
    out = torch.empty_like(x)
    LIBRARY.impl("empty", lambda x: None, "CPU" if device == "cpu" else "CUDA")
    empty = torch.ops.kernels_bench.empty.default
    calls: dict[str, Callable[[], object]] = {
        "torch.add-out": lambda: torch.add(x, x, out=out),
        "empty-op": lambda: empty(x),
    }
    for op, smallest in OPS.items():
        arguments, keywords = smallest(device)
        public, registered = getattr(torch_kernels, op), getattr(torch.ops.kernels, op)
        calls[op] = lambda f=public, a=arguments, k=keywords: f(*a, **k)
        calls[f"{op}-torch.ops"] = lambda f=registered, a=arguments, k=keywords: f(*a, **k)
        if native := native_call(op, arguments, keywords, device):
            calls[f"{op}-native"] = native
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--time", type=float, default=5.0, metavar="S", help="seconds in all")
    parser.add_argument(
        "--json", nargs="?", const=record.DEFAULT, metavar="PATH", help="alone: bench/results/<machine>/"
    )
    parser.add_argument(
        "--repro", action="store_true", help="print the command and environment that repeat this run, and stop"
    )
    options = parser.parse_args()
    if options.repro:
        print(record.repro("python bench/overhead.py", options))
        return 0
    torch.set_num_threads(1)  # waking a second thread costs more than these calls
    calls = contenders(options.device)
    samplers = {name: cpu_sampler([call]) for name, call in calls.items()}
    if options.device != "cpu":
        samplers = {name: synchronised(sampler) for name, sampler in samplers.items()}
    samples = interleave(samplers, options.time, 15, 3000)
    run = record.describe(
        "overhead", options.device, record.repro("python bench/overhead.py", options), {"seconds": options.time}
    )
    run["cases"] = {name: {"time": spread(values)} for name, values in samples.items()}
    for op in OPS:
        if (native := samples.get(f"{op}-native")) is None:
            print(f"{op}: no native module here, so its overhead cannot be told from the kernel", file=sys.stderr)
            continue
        for path in (op, f"{op}-torch.ops"):
            extra = [call - kernel for call, kernel in zip(samples[path], native, strict=True)]
            run["cases"][f"{path}-overhead"] = {"time": spread(extra)}
    width = max(map(len, run["cases"]))
    print(f"| {'call':<{width}} | median (p20–p80) |\n| {'-' * width} | ---: |")
    for name, case in run["cases"].items():
        median, low, high = (duration(case["time"][part]) for part in ("median", "p20", "p80"))
        print(f"| {name:<{width}} | {median} ({low}–{high}) |")
    add = statistics.median(samples["torch.add-out"])
    print(f"\nA torch.add(out=) takes {duration(add)} here; one thread.")
    if options.json:
        record.write(run, record.path_for(options.json, run, "json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
