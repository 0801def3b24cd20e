# Each target sets itself up in .venv. To use a Python that already has torch as it is:
#     make test-gpu PYTHON=python3 VENV=
PYTHON ?= python3
VENV ?= .venv
N ?= 4
ARGS ?=
PEERS ?= mixtral-8x7b:1,8,32,64,256,8192 qwen3-30b-a3b:1,8,32,64,256,16384 olmoe-1b-7b:16384 sonic-30b:32768 \
	deepseek-v3:4096,16384
HOT ?= mixtral-8x7b:8192 qwen3-30b-a3b:16384 olmoe-1b-7b:16384 sonic-30b:32768 deepseek-v3:4096,16384

ifeq ($(VENV),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

NEEDS_GPU = $(PY) -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "needs a CUDA GPU")'

.PHONY: help run peers peers-hot test test-gpu lint diff plots

help:            ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

$(VENV)/.ready: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -r requirements-dev.txt
	touch $@

run: $(READY)    ## the main job: run, gate, time and chart every level (ARGS="--tokens 64" ...)
	$(PY) level_runner.py $(ARGS)

peers: $(READY)  ## level 8 beside other libraries, at the sizes of README's table (on a GPU; PEERS="olmoe-1b-7b:16384")
	@$(NEEDS_GPU)
	for each in $(PEERS); do $(PY) level_runner.py --levels 8 --preset $${each%%:*} --tokens $${each#*:} \
		--peers "triton_kernels,transformers grouped_mm,ScatterMoE,DeepGEMM" $(ARGS) || exit; done

peers-hot: $(READY)  ## level 8 beside triton_kernels alone: no light layer leaves the chip cool (on a GPU; HOT="...")
	@$(MAKE) peers PEERS="$(HOT)" ARGS='--peers triton_kernels --out plots/triton_kernels $(ARGS)'

test: $(READY)   ## every test that this machine can run
	$(PY) -m pytest -n auto -m "not gpu" $(ARGS)

test-gpu: $(READY)  ## every test, on a machine with a GPU
	@$(NEEDS_GPU)
	$(PY) -m pytest -m alone
	$(PY) -m pytest -m "not alone" $(ARGS)

lint: $(READY)   ## style and errors that need no run
	$(PY) -m ruff check .

diff:            ## what level N adds to the level below: make diff N=4
	@ls labs/level$$(($(N) - 1))_*.py labs/level$(N)_*.py > /dev/null 2>&1 || \
		{ echo "N=$(N): no such level, or none below it"; exit 2; }
	@git --no-pager diff --no-index --stat --patch labs/level$$(($(N) - 1))_*.py labs/level$(N)_*.py || true

plots: $(READY)  ## draw all charts and README tables again from the JSON in plots/
	$(PY) level_runner.py --plot plots/*.json plots/peers/*.json plots/triton_kernels/*.json
	$(PY) -m labs.studies.redraw
	$(PY) level_runner.py --readme
