# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from torch_kernels import _registry


@pytest.fixture(autouse=True)
def registered(request: pytest.FixtureRequest) -> None:
    """Skips the tests of a backend that this family has no kernels for."""
    if "backend" in request.fixturenames:
        name = request.getfixturevalue("backend").name
        if name not in {backend.name for backend in _registry.OPS["graph_attention"].backends}:
            pytest.skip(f"no {name} kernels")
