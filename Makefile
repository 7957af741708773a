# make            lists the targets
# PYTHON=...      the Python that virtual environments are made from (3.11 or newer)
# make image CHANNEL=stable ARCH=arm64      and more options of `launcher image build`: BUILD_FLAGS='--base IMAGE'
PYTHON ?= python3
CHANNEL ?= nightly
VENV ?= .venv
VENV_02 ?= .venv-titan-0.2
BIN := $(VENV)/bin
# Bytecode of what is never imported, a minute per environment, is not made: Python makes what it imports.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile
# A machine without NVIDIA's driver gets torch without CUDA packages.
CPU_ONLY := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo yes)
CPU_TORCH := torch==2.13.0+cpu
CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help demo image install test test-daemons test-others test-some faults lint docs pictures bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

demo: $(VENV)/.train ## train a tiny Llama 3 here with torchtitan, up to its results row and a page
	$(BIN)/launcher submit --local --recipe debug --follow
	$(BIN)/launcher report --output report.html
	@echo 'to go on with it here:  export PATH="$(abspath $(BIN)):$$PATH"'

image: $(VENV)/.image ## build the container image of CHANNEL and write titan-CHANNEL-ARCH.sqsh
	$(BIN)/launcher image build '$(CHANNEL)' $(if $(ARCH),--arch '$(ARCH)') --output . --force $(BUILD_FLAGS)

install: $(VENV)/.dev $(VENV_02)/.train # both environments of the tests; --jobs=2 makes them side by side

test: install ## install what the tests need and run all of them
	tests/system-packages.sh
	$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target $(if $(TESTS),test-some,test-daemons test-others)

# Two halves side by side: one has the Docker engine and the Slurm, and waits for them much of the time.
WITH_DAEMONS := tests/cluster tests/image
# Thousands of short programs are started: each would compile the launcher anew where PYTHONDONTWRITEBYTECODE is set.
PYTEST = PYTHONDONTWRITEBYTECODE= LAUNCHER_TRAIN_PYTHON="$(abspath $(BIN)/python):$(abspath $(VENV_02)/bin/python)" $(BIN)/python -m pytest
test-daemons:
	$(PYTEST) $(WITH_DAEMONS)
test-others:
	$(PYTEST) tests $(WITH_DAEMONS:%=--ignore=%)
test-some:
	$(PYTEST) $(TESTS)

faults: install ## break runs in the middle of training, on a real Slurm, and write docs/fault-campaign.md's table
	tests/system-packages.sh
	LAUNCHER_TEST_FAULTS=$(or $(SLURM),1) LAUNCHER_TEST_FAULTS_TABLE=$(if $(SLURM),,docs/fault-campaign.md) $(PYTEST) tests/cluster/test_faults.py

# Not --quiet: mkdocs then takes no warning for an error. The variable silences an advertisement.
SITE = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.dev ## check format, style, types, the direction of imports and the docs' links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/hadolint Dockerfile
	$(BIN)/zizmor --offline --quiet .github/workflows
	$(SITE)

docs: $(VENV)/.dev ## write the pages that come from code, and the docs as a site into site/
	$(BIN)/python docs/tables.py
	$(SITE)

pictures: $(VENV)/.dev ## make the docs' pictures anew, with Chromium
	$(BIN)/python docs/pictures.py

bench: $(VENV)/.dev ## measure what docs/performance.md claims
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/parse_log.py
	$(BIN)/python benchmarks/download.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/cluster.py
	$(BIN)/python benchmarks/results.py

clean: ## remove virtual environments and caches; run directories stay
	rm -rf $(VENV) $(VENV_02) site .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.made $(VENV_02)/.made:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(@D)
	@echo 'installing packages into $(@D): some minutes'
	@touch $@

# torch first, and named again in each step after it: pip otherwise chooses a build with gigabytes of CUDA as soon as
# any other package conflicts.
TORCH := $(if $(CPU_ONLY),'$(CPU_TORCH)')
%/.torch: %/.made
ifeq ($(CPU_ONLY),yes)
	$*/bin/pip install $(PIP_FLAGS) '$(CPU_TORCH)' || $*/bin/pip install $(PIP_FLAGS) --extra-index-url $(CPU_INDEX) '$(CPU_TORCH)'
endif
	@touch $@

# Without torch: an image is built by the Docker engine, from what it downloads itself.
$(VENV)/.image: $(VENV)/.made pyproject.toml
	$(BIN)/pip install $(PIP_FLAGS) --editable '.[image]'
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml containers/constraints-train.txt
	$(BIN)/pip install $(PIP_FLAGS) --constraint containers/constraints-train.txt --editable '.[train]' 'torchtitan>=0.3' $(TORCH)
	@touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/pip install $(PIP_FLAGS) --constraint containers/constraints-train.txt --editable '.[train,image,apptainer,s3,docs,dev]' 'torchao>=0.18,<0.19' $(TORCH)
	@touch $@

$(VENV_02)/.train: $(VENV_02)/.torch pyproject.toml containers/constraints-train.txt
	$(VENV_02)/bin/pip install $(PIP_FLAGS) --constraint containers/constraints-train.txt --editable '.[train]' 'torchtitan==0.2.2' 'torchao>=0.16,<0.17' $(TORCH)
	@touch $@
