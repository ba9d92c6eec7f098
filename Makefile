# make report   train on the digits and show what sharpness-aware steps cost
# make test     the whole test suite
# make bench    optimizer time of a step, side by side with other implementations
# make lint     ruff and clang-format
#
# Each does its own set-up: a virtual environment in .venv, pinned packages, the C++ extension in place.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT := $(VENV)/.built
SOURCES := $(wildcard csrc/*.cpp csrc/*.h) setup.py pyproject.toml bsam_fused/_version.py

.PHONY: report test bench lint format clean

report: $(BUILT)
	$(BIN)/python -m bsam_fused report --out report

test: $(BUILT)
	$(BIN)/python -m pytest -q

bench: $(BUILT)
	$(BIN)/python -m bench.step_time

lint: $(BUILT)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h

format: $(BUILT)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h

$(VENV)/.installed: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt pip setuptools wheel
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt ninja numpy pytest pytest-benchmark hypothesis \
		matplotlib jinja2 rich scikit-learn ruff clang-format build
	touch $@

$(BUILT): $(VENV)/.installed $(SOURCES)
	BSAM_FUSED_BUILD=cpu $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build dist report *.egg-info bsam_fused/*.so
