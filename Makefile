# make quickstart | test | test-extras | test-versions | newest | extras | check | docs | smoke | gpu | gpu-wheels | clean. Each sets up .venv on first use and is fast the second time.
# PYTHON chooses the interpreter (3.11 or later): make test PYTHON=python3.12

PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do command -v $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := $(VENV)/extras
LOWEST := $(VENV)/lowest
GPU_IMAGE := $(VENV)/gpu-image
NEWEST := $(VENV)/newest
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 3

# Threads that wait for work leave the cores to others.
export OMP_WAIT_POLICY ?= passive
export PYTHONUNBUFFERED = 1
# Compiled modules are kept, also where the environment forbids it: the tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help quickstart smoke test test-extras test-versions versions lowest gpu-image newest extras check constraints docs gpu gpu-wheels clean

help:
	@echo "make quickstart  assemble, tune, measure and report on this machine, with real parts (minutes)"
	@echo "make smoke       the same in miniature, about three minutes, at lower quality"
	@echo "make test        the whole test suite"
	@echo "make test-extras what needs gradio, trackio, MLflow, Ray or Triton"
	@echo "make test-versions  a part of the suite on the lowest versions, and on what GPU images carry"
	@echo "make newest      the same part on Python 3.13 and the index's newest torch, a CUDA build of 6 GB"
	@echo "make extras      whether every extra of pyproject.toml can be installed"
	@echo "make check       format, lint, types, import layers and circles, shell scripts"
	@echo "make constraints write constraints.txt, the versions that are installed for the tests"
	@echo "make docs        the documents as a site with an API reference, into build/site; links are checked"
	@echo "make gpu         tests/gpu and the benchmark on a GPU, with the Python that is there (PYTHON=...); again until done"
	@echo "make gpu-wheels  what a bare GPU machine lacks, into build/gpu_wheels"
	@echo "make clean       remove the environment, caches and build products; runs/ stays"

quickstart: $(VENV)/.installed
	$(BIN)/mm-moslora quickstart $(ARGS)

smoke: $(VENV)/.installed
	$(BIN)/mm-moslora quickstart --smoke $(ARGS)

# A test that hangs shows where, and ends its worker alone.
ONE_TEST := -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true

test: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ONE_TEST) $(ARGS)

test-extras: $(EXTRAS)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(EXTRAS)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile $(ONE_TEST) \
	  --deselect tests/distributed/test_compare_on_clusters.py::test_as_a_slurm_array tests/tracking/test_tracking_depth.py \
	  tests/serve/test_serve_demo.py tests/serve/test_web_guard.py tests/models/memory_efficient/test_kernel_selection.py tests/kernels/lora/test_triton_dropout.py \
	  tests/launch/test_ray_engine.py tests/distributed/test_compare_on_clusters.py $(ARGS)

# What notices first when a library is another than the one beside which the code was written.
VERSIONED := tests/packaging/test_dependencies.py tests/adapters/test_adapter_behaviours.py tests/adapters/layers/test_quantised_layers.py \
  tests/data/sources/test_record_sources.py tests/data/sources/test_hf_tables.py tests/gpu tests/models/test_assembly.py tests/kernels/test_attention_varlen.py \
  tests/kernels/lora/test_triton_dropout.py tests/models/memory_efficient/test_kernel_selection.py \
  tests/models/vision/test_encoders.py tests/models/batching/test_packed_batch.py tests/models/test_pretrained_vlm.py \
  tests/tracking/test_trackers.py tests/training/test_golden_losses.py tests/training/test_image_dependence.py \
  tests/eval/scoring/test_general_metrics.py
VERSION_TESTS = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VERSIONS=$@ $(VENV)/$@/bin/python -m pytest -q -n $(WORKERS) \
  --dist loadfile $(VERSIONED) $(ARGS)
test-versions:
	$(MAKE) lowest
	@test -n "$(PYTHON312)" || echo "No Python 3.12 found: the tests on what GPU images carry are left out (PYTHON312=...)."
	$(if $(PYTHON312),$(MAKE) gpu-image)

# The environments alone.
versions: $(LOWEST)/.installed
	$(if $(PYTHON312),$(MAKE) $(GPU_IMAGE)/.installed)

lowest: $(LOWEST)/.installed
	$(VERSION_TESTS)

# On the torch of `lowest`, so on its Triton.
gpu-image: VERSIONED := $(filter-out %test_triton_dropout.py %test_kernel_selection.py,$(VERSIONED))
gpu-image: $(GPU_IMAGE)/.installed
	$(VERSION_TESTS)

newest: $(NEWEST)/.installed
	$(VERSION_TESTS)

extras: $(VENV)/.installed-dev
	@for extra in $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"])'); do \
	  $(UV) pip compile --quiet --extra "$$extra" --output-file /dev/null pyproject.toml || exit 1; \
	done; echo "Every extra resolves."

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_imports.py
	$(BIN)/shellcheck -x .ci/run $$(find scripts -name '*.sh' -o -name '*.sbatch')

constraints: $(VENV)/.installed-dev
	$(PIP) freeze --exclude-editable | sed -n 's/^\([^ ]*==[^+ ]*\).*/\1/p' > $(VENV)/tested.txt
	{ head -n 1 constraints.txt && $(UV) pip compile --quiet pyproject.toml --universal --no-annotate --no-header \
	  $(addprefix --extra ,serve quant video smolvlm diffusion trl math) --constraint $(VENV)/tested.txt; } \
	  | grep -v emscripten > $(VENV)/constraints.txt && mv $(VENV)/constraints.txt constraints.txt

docs: $(VENV)/docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --quiet --strict

# TORCH=cpu: a torch without CUDA, 0.2 GB instead of 3, from PyTorch's own index.
TORCH ?=
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python found. Install Python 3.11 or later, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old; Python 3.11 or later is needed: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make environments; on Debian: apt-get install python3-venv" >&2; exit 1; }

# The stamps depend on pyproject.toml alone: the installation is editable, so new code needs no new one.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@test -z "$(TORCH)" || { $(PIP) install --quiet uv && $(UV) pip install --quiet --python $(BIN)/python --torch-backend $(TORCH) torch torchvision; }
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

# gradio and trackio insist on an older Pillow and MLflow on an older pyarrow than the rest is tested with, so they live in
# an environment on top of the first one: what they do not change is found there. liger-kernel brings Triton, 1 GB that
# nothing else here uses without a GPU.
$(EXTRAS)/.installed: pyproject.toml $(VENV)/.installed-dev
	$(BIN)/python -m venv $(EXTRAS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  $$($(EXTRAS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(EXTRAS)/bin/python -m pip install --disable-pip-version-check --quiet --editable '.[demo,trackio,mlflow,ray,liger]'
	@touch $@

# The site's generator reads the sources without importing them, so it needs nothing of the project.
$(VENV)/docs/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(VENV)/docs/packages.txt
	$(VENV)/docs/bin/python -m pip install --disable-pip-version-check --quiet --requirement $(VENV)/docs/packages.txt
	@touch $@

# Both on CUDA builds of torch 2.11, the only ones on the index, which run on CPUs, too. Files that are the same are hard
# links into uv's cache, so that the second environment needs little more room.
UV = UV_CACHE_DIR=$(CURDIR)/$(VENV)/uv UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=hardlink $(BIN)/uv
# The shims of pyenv answer for versions that they do not run.
PYTHON312 ?= $(shell for name in python3.12 "$$(pyenv root 2>&1)"/versions/3.12*/bin/python3.12; do \
  "$$name" -c '' 2>&1 && echo "$$name" && break; done | tail -n 1 | grep -x '[^ ]*python3.12')

$(LOWEST)/.installed: pyproject.toml $(VENV)/.installed-dev
	$(UV) venv --quiet --clear --python $(BIN)/python $(LOWEST)
	$(UV) pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
	  --editable '.[test,serve,quant,diffusion,trl,video,math]'
	@touch $@

$(GPU_IMAGE)/.installed: pyproject.toml $(VENV)/.installed-dev
	$(UV) venv --quiet --clear --python $(PYTHON312) $(GPU_IMAGE)
	$(UV) pip install --quiet --python $(GPU_IMAGE)/bin/python --editable '.[test,serve,quant,video]' 'torch==2.11.*' \
	  "transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml).*"
	@touch $@

$(NEWEST)/.installed: pyproject.toml $(VENV)/.installed-dev
	$(UV) venv --quiet --clear --python 3.13 $(NEWEST)
	$(UV) pip install --quiet --python $(NEWEST)/bin/python --editable '.[test,serve,quant,video]'
	@touch $@

# Not in .venv, which holds PyTorch for CPUs where make made it: PYTHON=..., else the python3 of the machine.
gpu:
	scripts/gpu.sh

gpu-wheels: $(VENV)/.installed-dev
	$(BIN)/python scripts/gpu_wheels.py $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
