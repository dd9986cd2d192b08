# SPDX-License-Identifier: Apache-2.0
# Every command works on a fresh machine: it makes its own environment in .venv first.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ISAS ?= native
FAMILIES := $(patsubst csrc/%/kernels.h,%,$(wildcard csrc/*/kernels.h))
BUILD := -Ccmake.define.TORCH_KERNELS_EMULATOR=ON -Ccmake.define.TORCH_KERNELS_CUDA=OFF -Ccmake.define.TORCH_KERNELS_CPU_ISAS="$(ISAS)"

.PHONY: demo test bench gpu docs wheel build lint clean

demo: build  ## speculative decoding with token trees, trained and run here
	$(RUN) examples/speculative_decoding.py

test: build lint  ## the whole suite
	$(RUN) -m pytest -n 2 --dist worksteal

bench: build  ## the benchmarks of every op, written to bench/results/<machine>/
	$(RUN) bench/overhead.py --json
	set -e; for family in $(FAMILIES); do $(RUN) bench/$$family.py --json --plot; done

gpu: $(VENV)/ready  ## everything worth doing on a GPU: build, tests, sanitizers, benchmarks
	$(RUN) scripts/gpu.py

docs: build  ## the tables that docs and README take from code and results, and the site in build/site
	$(RUN) scripts/support_matrix.py --write
	$(RUN) bench/report.py --write
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet

wheel: $(VENV)/ready  ## a checked wheel for this platform in dist/, with CUDA kernels where nvcc is found (CUDA=OFF: without)
	$(RUN) scripts/wheel.py $(if $(CUDA),--cuda $(CUDA))

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# An editable install: Python from the checkout, compiled modules beside it. Unchanged sources are not compiled again.
build: $(VENV)/ready
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation $(BUILD) -e .

$(VENV)/ready: scripts/environment.sh pyproject.toml
	PYTHON=$(PYTHON) sh scripts/environment.sh $(VENV)
	touch $@

clean:
	rm -rf build dist $(VENV)
