# Every target sets up what it needs: the first one on a fresh machine creates .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python
# Where Python may not keep bytecode, as in some containers, each process would compile torch anew.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test test-slow test-lowest check format figures notebooks lab docs bench peers gpu mini-clip tune-methods methods clean
.DEFAULT_GOAL := help

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.ready ## Create .venv and install everything

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.12 ..."; exit 2; }
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet $(COMPILE) --python $(RUN) -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## The whole way on the embedded default, training included: three minutes
	$(BIN)/vlmlayers demo

test: setup ## All tests but the slow ones
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto -m "not slow"

test-slow: setup ## The slow tests: kills, fuzzing, browser, long runs
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto -m slow

test-lowest: ## The tests on the lowest declared versions, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest && .venv-lowest/bin/pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n auto -m "not slow"

check: setup ## Lint, format, import rules and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

format: setup ## Apply the formatter and the lint fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: setup ## Redraw every figure and table from the committed tables
	$(RUN) figures/all.py

notebooks: setup ## Execute every notebook on the embedded default
	OMP_NUM_THREADS=2 $(RUN) -m pytest -q tests/test_notebooks.py

lab: setup ## Open JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

docs: demo ## Build the site under site/: guide, notebooks as executed, gallery, reference
	$(BIN)/sphinx-build -W --keep-going -q -c docs . site

bench: setup ## The benchmarks that need nothing else; tables go to benchmarks/results/
	$(RUN) benchmarks/run.py

gpu: setup ## On a GPU: its tests, benchmarks and a small run in eight minutes, a short table last
	$(RUN) benchmarks/gpu.py

peers: setup ## The same work by other libraries, in environments of their own
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	$(BIN)/uv pip install --quiet --python .venv-peers/bin/python -c constraints.txt -r benchmarks/peers.txt
	test -x .venv-thingsvision/bin/python || $(PYTHON) -m venv .venv-thingsvision
	$(BIN)/uv pip freeze --python $(BIN)/python | grep -E '^torch(vision)?==' > .venv-thingsvision/torch.txt
	$(BIN)/uv pip install --quiet --python .venv-thingsvision/bin/python \
		--override .venv-thingsvision/torch.txt -r benchmarks/peers_thingsvision.txt
	$(RUN) benchmarks/peers.py

mini-clip: setup ## Train a miniature CLIP again (resumable; hours on a CPU, minutes on a GPU)
	$(BIN)/uv pip install --quiet --python $(RUN) -r tools/mini_clip/requirements.txt
	PYTHONPATH=tools $(RUN) -m mini_clip --out runs/mini-clip

tune-methods: setup ## Search the recipes mini again (resumable; half an hour of a core)
	OMP_NUM_THREADS=1 $(RUN) figures/tune_methods.py --write

methods: setup ## Compare all methods on the miniature CLIP again (resumable; half an hour of a core)
	OMP_NUM_THREADS=1 $(RUN) figures/record_methods.py

clean: ## Remove what the targets made, but not runs/
	rm -rf .venv .venv-lowest .venv-peers .venv-thingsvision site .jupyter_cache jupyter_execute docs/reference build dist .mypy_cache .ruff_cache .pytest_cache
