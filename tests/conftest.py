# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

# One thread a process: pools that spin against each other are slower than no pool.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from . import interpreter  # noqa: E402  (Triton reads the variable when it is imported)
from .backends import CI_EXAMPLES, Backend, testing_backends  # noqa: E402

COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=CI_EXAMPLES, database=None, **COMMON)
hypothesis.settings.register_profile("brief", derandomize=True, max_examples=5, database=None, **COMMON)
hypothesis.settings.register_profile("nightly", max_examples=1000, **COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


torch.set_num_threads(1)
torch.backends.cudnn.allow_tf32 = False  # torch's convolutions would round float32 inputs on GPUs
interpreter.be_strict()
_failed: set[str] = set()


def pytest_report_header() -> str:
    return "backends: " + ", ".join(f"{backend.name} ({backend.device})" for backend in testing_backends())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The sanitized suites first: at the end, one worker would wait for the other to finish the longest."""
    items.sort(key=lambda item: item.path.name != "test_sanitizers.py")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.add(report.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """A kernel that leaves its memory spoils the process: all later tests would fail. xdist starts another worker."""
    if nodeid not in _failed or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the GPU is lost to this process since {nodeid}: {error}", returncode=1)


@pytest.fixture(scope="session", params=testing_backends(), ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(scope="session")
def any_backend() -> Backend:
    """For what all backends share: checks, registration."""
    return testing_backends()[0]
