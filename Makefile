# `make run` and `make test` need a Python >= 3.11 and nothing else: what they use is installed into .venv.
PYTHON ?= python3.13 python3.12 python3.11 python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: install run test check gpu vllm lab docs bench audit readme clean help

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(VENV)/.base ## the package and what `specs run` needs, into .venv

run: $(VENV)/.base ## SPECS on the embedded model, into runs/default; ARGS="-c smoke" adds arguments
	$(BIN)/specs run --run-dir runs/default $(ARGS)

test: $(VENV)/.dev ## round trip, all notebooks, pytest, vLLM's CPU build, wheel, docs
	$(BIN)/python tools/check.py $(ARGS)

check: $(VENV)/.dev ## round trip, ruff and the quick tests: before a commit (3 minutes)
	$(BIN)/python tools/check.py check

# Without a card it says so and ends well; SPECS_NEED_GPU=1 makes that an error.
gpu: $(VENV)/.dev ## tests and cells whose result may differ on a CUDA card, where there is one
	$(BIN)/python tools/check.py gpu

vllm: $(BIN)/pip ## an environment for vLLM's CPU build, in .venv-vllm (3 minutes, 4 GB)
	$(BIN)/python tools/make_vllm.py

lab: $(VENV)/.dev ## JupyterLab on the notebooks, with .venv as its kernel
	$(BIN)/python -m ipykernel install --sys-prefix --name specs_nb --display-name specs_nb >/dev/null
	@mkdir -p $(VENV)/share/jupyter/lab/settings  # no question about news, no call for them
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' \
	  > $(VENV)/share/jupyter/lab/settings/overrides.json
	$(BIN)/jupyter lab --notebook-dir=nbs $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

docs: $(VENV)/.dev ## a site from the notebooks and docs/, in site/
	$(BIN)/python tools/make_docs.py $(ARGS)

bench: $(VENV)/.dev ## each measurement in bench/ but sampling.py, which takes hours
	@set -e; for f in $(filter-out bench/sampling.py,$(wildcard bench/*.py)); do \
	  echo "== $$f"; $(BIN)/python $$f $(ARGS); done

# An environment apart, so that what is looked at doesn't look at itself.
audit: $(VENV)/.dev ## packages against requirements.lock and advisories; ARGS="--also NAME --fetch NAME"
	@$(VENV)-audit/bin/pip-audit --version >/dev/null 2>&1 || { $(BIN)/python -m venv $(VENV)-audit && \
	  $(VENV)-audit/bin/python -m pip install -q 'pip-audit>=2.10,<3' 'uv>=0.13,<0.14'; }
	$(VENV)-audit/bin/python tools/audit.py --env $(VENV) $(ARGS)

readme: $(VENV)/.dev ## README.md from nbs/index.ipynb
	$(BIN)/python tools/make_readme.py

clean: ## remove what was generated; runs/ and .venv stay
	rm -rf site _docs _proc build dist *.egg-info .pytest_cache
	find nbs specs_nb tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

# No hub: the embedded model ships with the package; override to train one from the hub. One thread is faster
# on tiny models.
run test check gpu bench: export HF_HUB_OFFLINE ?= 1
run test check gpu bench: export OMP_NUM_THREADS ?= 1

# Stamps make a second call instant; a changed pyproject.toml installs again.
$(VENV)/.dev: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $(VENV)/.base $@

$(VENV)/.base: pyproject.toml | $(BIN)/pip
	@echo "installing into $(VENV) (a few minutes the first time) …"
	$(BIN)/python -m pip install -q -e .
	@touch $@

# Candidates are run, not only looked up: a version manager's shim exists for interpreters that aren't active.
$(BIN)/pip:
	@for p in $(PYTHON); do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$p; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: no Python >= 3.11 among: $(PYTHON). Install one, or name it: make PYTHON=/path/to/python"; \
	  exit 1; fi; \
	if ! $$found -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "error: $$found cannot make virtual environments." \
	    "Install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; fi; \
	echo "$(VENV): $$($$found --version)"; $$found -m venv $(VENV)
