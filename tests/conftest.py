# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from .backends import Backend, testing_backends  # noqa: E402  (Triton reads the variable when it is imported)

COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("ci", derandomize=True, max_examples=20, database=None, **COMMON)
hypothesis.settings.register_profile("nightly", max_examples=1000, **COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    # Under pytest-xdist every worker is a process of its own; two pools on all cores would fight.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_report_header() -> str:
    return "backends: " + ", ".join(f"{backend.name} ({backend.device})" for backend in testing_backends())


@pytest.fixture(scope="session", params=testing_backends(), ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param
