# SPDX-License-Identifier: Apache-2.0
"""Everything worth doing on a GPU, in one command of at most ten minutes and without a network.

Builds for this GPU alone, tests, looks for races and bad accesses, measures, and writes logs and results into
bench/results/<gpu>/. Without the step `build` the last build here is used, or else what is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
OURS = ("--kernel-name", "kns=torch_kernels")
SANITIZER_OPTIONS = {
    # torch asks the driver for functions that are not there, and looks at what its calls return itself.
    "memcheck": (*OURS, "--report-api-errors", "no"),
    "racecheck": OURS,
    "synccheck": OURS,
    "initcheck": (),  # what torch's kernels write is initialised: it must see them
}
FEW_CASES = "verify-,commit-,7b-gate-m8,rag-top1-10x150,t1024"  # some of each benchmark, for a dry run
FOUND, FAILED_TO_START = 9, "Device not supported"  # exit code for findings; where compute-sanitizer cannot run


@dataclass
class Step:
    name: str
    about: str
    minutes: float  # at most
    commands: list[list[str]]  # one after the other, until one fails
    variables: dict[str, str] = field(default_factory=dict)
    missing: str = ""  # why this machine cannot do it
    independent: bool = False  # commands that fail or take more than half of the time left do not lose the others


@dataclass
class Outcome:
    step: str
    result: str  # ok, failed, stopped (took too long), skipped (impossible here), left out (no time)
    seconds: float
    detail: str

    @property
    def good(self) -> bool:
        return self.result in ("ok", "skipped")


class Machine:
    """What the steps need to know of the machine and of the command line."""

    def __init__(self, dry_run: bool, output: Path | None) -> None:
        self.gpu = torch.cuda.is_available() and not dry_run
        self.build = ROOT / "build" / ("gpu" if self.gpu else "gpu-dry-run")
        self.package = self.build / "path"  # a copy of the package with the modules built here
        self.output = output or (ROOT / "bench" / "results" / self.name() if self.gpu else self.build / "results")
        self.logs = self.output / "logs"
        self.path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"

    def name(self) -> str:
        """As the benchmarks name it; the package cannot be imported before it is built, but this file of it can."""
        source = ROOT / "python" / "torch_kernels" / "_device.py"
        spec = importlib.util.spec_from_file_location("_device", source)
        device = sys.modules["_device"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(device)
        return device.machine_name("cuda")

    def architecture(self) -> str:
        major, minor = torch.cuda.get_device_capability()
        return f"{major}{minor}-real"

    def tool(self, name: str) -> str | None:
        return shutil.which(name, path=self.path) or shutil.which(name, path="/usr/local/cuda/bin")

    def environment(self) -> dict[str, str]:
        variables = os.environ | {"PATH": self.path, "PYTHONUNBUFFERED": "1"}
        if not self.gpu:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        if list(self.package.glob("torch_kernels/_cpu*")):
            variables["PYTHONPATH"] = os.pathsep.join([str(self.package), os.environ.get("PYTHONPATH", "")])
        return variables

    def copy_package(self) -> None:
        """Python sources beside the modules. `sitecustomize` keeps an editable install from coming first."""
        target = self.package / "torch_kernels"
        shutil.copytree(
            ROOT / "python/torch_kernels",
            target,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        )
        (self.package / "sitecustomize.py").write_text(
            "import sys\n"
            "sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith('ScikitBuild')]\n"
        )


def steps(machine: Machine) -> list[Step]:
    gpu, python = machine.gpu, sys.executable
    no_gpu = "" if gpu else "no GPU"
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q"]
    parallel = ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
    parallel = parallel if importlib.util.find_spec("xdist") else []
    of_the_host = ("examples", "install", "numbers", "processes", "sanitizers", "site")
    others = ("aot", "bench", "emulator", "test_gpu.py", *(f"test_{name}.py" for name in of_the_host))
    elsewhere = [f"--ignore=tests/{name}" for name in others]
    suite = [*pytest, *parallel, "--durations=10", *elsewhere, "tests", "-k"]
    compiled_there = "triton or reference"  # hundreds of Triton's kernels are compiled there
    sanitizer = machine.tool("compute-sanitizer")
    return [
        Step("build", "modules for this GPU only", 4, build_commands(machine), missing=missing_for_build(machine)),
        Step(
            "info", "versions, devices, and which backend serves which op", 2, [[python, "-m", "torch_kernels", "info"]]
        ),
        Step("selftest", "every op against its reference", 1, [[python, "-m", "torch_kernels", "selftest"]]),
        Step("reruns", "bitwise reruns, CUDA graphs, streams, for every op", 3, [[*pytest, "tests/test_gpu.py"]]),
        Step("tests", "the suite, where cuda means the device", 4, [[*suite, f"not ({compiled_there})"]]),
        Step(
            "instructions",
            "the device's instructions against what the emulator takes them for",
            2,
            [[*pytest, "tests/emulator/test_emulator.py", "-k", "on_device"]],
            missing=no_gpu,
        ),
        Step("triton", "the suite, where triton and reference mean the device", 6, [[*suite, compiled_there]]),
        *(
            Step(
                tool,
                f"the small calls under compute-sanitizer --tool {tool}",
                2,
                [
                    [
                        *(sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)),
                        *("--print-limit", "30", *SANITIZER_OPTIONS[tool]),
                        *(*pytest, "-x", "tests/test_gpu.py", "-k", "rerun and cuda"),
                    ]
                ],
                # Each tensor in memory of its own, so that one element too far is outside.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TORCH_KERNELS_TEST_BACKENDS": "cuda"},
                no_gpu or ("" if sanitizer else "no compute-sanitizer"),
            )
            for tool in SANITIZER_OPTIONS
        ),
        Step(
            "bench",
            "the benchmarks, quickly: for the full ones see make bench",
            8,
            bench_commands(machine),
            independent=True,
        ),
    ]


def missing_for_build(machine: Machine) -> str:
    wanted = ["cmake", "ninja", *(["nvcc"] if machine.gpu else [])]
    missing = [name for name in wanted if not machine.tool(name)]
    missing += [] if importlib.util.find_spec("nanobind") else ["nanobind"]
    return f"no {', '.join(missing)}" if missing else ""


def build_commands(machine: Machine) -> list[list[str]]:
    if missing_for_build(machine):
        return []
    nanobind = subprocess.check_output([sys.executable, "-m", "nanobind", "--cmake_dir"], text=True).strip()
    settings = {
        "CMAKE_MAKE_PROGRAM": machine.tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": nanobind,
        # A machine without a network may lack the package that wheels share.
        "TORCH_KERNELS_LINK_NANOBIND": "OFF" if importlib.util.find_spec("nanobind_backend") else "ON",
        "TORCH_KERNELS_CUDA": "ON" if machine.gpu else "OFF",
        "TORCH_KERNELS_EMULATOR": "OFF" if machine.gpu else "ON",
    }
    if machine.gpu:
        settings |= {
            "CMAKE_CUDA_COMPILER": machine.tool("nvcc"),
            "TORCH_KERNELS_CUDA_ARCHITECTURES": machine.architecture(),
            "TORCH_KERNELS_LINE_INFO": "ON",
        }
    folder, cmake = str(machine.build), machine.tool("cmake")
    return [
        [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            folder,
            "-G",
            "Ninja",
            *(f"-D{name}={value}" for name, value in settings.items()),
        ],
        [machine.tool("ninja"), "-C", folder],
        [cmake, "--install", folder, "--prefix", str(machine.package)],
    ]


def bench_commands(machine: Machine) -> list[list[str]]:
    """Files are told apart by what they import: a benchmark of an op is made of cases."""
    commands = []
    for path in sorted((ROOT / "bench").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "from harness import" not in source or "__main__" not in source:
            continue
        written = ["--json", str(machine.output / f"{path.stem}.json")]
        device = ["--device", "cuda" if machine.gpu else "cpu"]
        if "Case(" not in source:
            options = ["--time", "5" if machine.gpu else "0.5"]
        else:
            options = ["--quick", "--plot", str(machine.output / f"{path.stem}.png")]
            options += [] if machine.gpu else ["--peers", "", "--cases", FEW_CASES]
        commands.append([sys.executable, str(path.relative_to(ROOT)), *device, *written, *options])
    return commands


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks first: an interrupted pytest still tells what failed."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=30)  # xdist gives its workers ten seconds before it tells
    except subprocess.TimeoutExpired:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(step: Step, machine: Machine, deadline: float) -> Outcome:
    """Runs a step's commands with their output in a log. A step that takes too long is ended with all its processes."""
    start = time.monotonic()
    log = machine.logs / f"{step.name}.log"
    result = "ok"
    with log.open("w") as output:
        for i, command in enumerate(step.commands):
            output.write(f"$ {' '.join(command)}\n")
            output.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=machine.environment() | step.variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            left = max(0.0, deadline - time.monotonic())
            if step.independent and i + 1 < len(step.commands):
                left /= 2
            try:
                status = process.wait(timeout=None if math.isinf(left) else left)
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
                stop(process)
                if isinstance(reason, KeyboardInterrupt):
                    raise
                status, result = 0, "stopped"
                if not step.independent:
                    break
            if status:
                result = "failed"
                if not step.independent:
                    break
    text = log.read_text(errors="replace")
    if result == "failed" and FAILED_TO_START in text:
        result = "skipped"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if result in ("failed", "stopped"):
        print("\n".join(lines[-30:]), flush=True)
    return Outcome(step.name, result, time.monotonic() - start, lines[-1])


def table(outcomes: list[Outcome]) -> str:
    rows = [f"| {o.step:12} | {o.result:8} | {o.seconds:6.0f} s | {o.detail[:100]}" for o in outcomes]
    return "\n".join([f"| {'step':12} | {'result':8} | {'time':>8} | last line", "| --- | --- | ---: | ---", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    parser.add_argument("--only", metavar="A,B", help="these steps instead of all")
    parser.add_argument(
        "--minutes", type=float, help="time for all steps together (default 9.5; a dry run takes as long as it takes)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="instead of bench/results/<gpu>/")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU: emulator and Triton's interpreter")
    options = parser.parse_args()
    if not options.list and not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --dry-run runs what a CPU can")
    machine = Machine(options.dry_run or options.list, options.output and options.output.resolve())
    chosen = steps(machine)
    if options.list:
        print("\n".join(f"{step.name:12} {step.about}, at most {step.minutes:g} min" for step in chosen))
        return 0
    if options.only:
        names = options.only.split(",")
        if unknown := set(names) - {step.name for step in chosen}:
            parser.error(f"no step {', '.join(sorted(unknown))}: see --list")
        chosen = [step for step in chosen if step.name in names]

    minutes = options.minutes or (9.5 if machine.gpu else float("inf"))
    deadline = time.monotonic() + 60 * minutes
    machine.logs.mkdir(parents=True, exist_ok=True)
    machine.copy_package()
    outcomes: list[Outcome] = []
    for step in chosen:
        if step.missing:
            outcomes.append(Outcome(step.name, "skipped", 0, step.missing))
        elif deadline - time.monotonic() < 5:
            outcomes.append(Outcome(step.name, "left out", 0, "no time left"))
        else:
            print(f"{step.name}: {step.about}", flush=True)
            # The time there is lent. The last step has what is left of it.
            own = 60 * step.minutes if machine.gpu and step is not chosen[-1] else math.inf
            outcomes.append(run(step, machine, min(deadline, time.monotonic() + own)))
        record = {
            "gpu": machine.output.name,
            "torch": torch.__version__,
            "steps": [asdict(outcome) for outcome in outcomes],
        }
        (machine.logs / "steps.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(outcomes))
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
