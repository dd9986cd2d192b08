#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes a virtual environment with everything that building, testing and measuring needs.
# A machine whose own torch sees a GPU keeps that torch; any other gets the release the project is tested with.
set -eu
venv=$1
python=${PYTHON:-python3}

if "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  "$python" -m venv --system-site-packages "$venv"
else
  "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet --no-compile --upgrade pip
  "$venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy
fi
"$venv/bin/python" - >"$venv/requirements.txt" <<'EOF'
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import pip._vendor.tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
requirements = project["build-system"]["requires"] + ["cmake", "ninja"]
for extra in ("test", "bench", "demo", "docs", "dev", "wheel"):
    requirements += project["project"]["optional-dependencies"][extra]
print("\n".join(requirements))
EOF
"$venv/bin/pip" install --quiet --no-compile -r "$venv/requirements.txt"

# The emulator compiles the CUDA sources with g++ and needs CUDA's headers, if not from a toolkit then from PyPI.
if ! command -v nvcc >/dev/null && [ ! -d "${CUDA_HOME:-/usr/local/cuda}/include" ]; then
  "$venv/bin/pip" install --quiet --no-compile "nvidia-cuda-runtime>=13" "nvidia-cuda-crt>=13" "nvidia-cuda-cccl>=13"
fi

# pip would do it on one core; and not every environment lets Python keep what it compiles when it imports.
"$venv/bin/python" -m compileall -q -j 0 "$venv"/lib/python*/site-packages >/dev/null || true # templates do not compile
