# The doors of the workbook. `make help` lists them. Needs make and Python 3.10 or newer, nothing else.
# EXTRA adds optional groups of pyproject.toml: `make test EXTRA=,parity`.
PYTHON ?= python3
EXTRA  ?=
comma  := ,
VENV   := .venv
BIN    := $(VENV)/bin
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)
READY  := $(VENV)/ready$(subst $(comma),-,$(EXTRA))

# A relative data folder is relative to where make runs, not to a notebook.
ifdef ERWIN_NSA_DATA
override ERWIN_NSA_DATA := $(shell cd "$(ERWIN_NSA_DATA)" 2>/dev/null && pwd || printf %s "$(ERWIN_NSA_DATA)")
export ERWIN_NSA_DATA
endif

.PHONY: help env demo test test-browser lab docs readme hooks clean
.DEFAULT_GOAL := help

help: ## List the targets (instant)
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' Makefile

env: $(READY) ## Make the environment in .venv (1 to 10 minutes the first time, mostly the download of torch; then instant)
	@echo "env: $(VENV) is ready. Use it with: source $(BIN)/activate"

$(READY): pyproject.toml constraints.txt
	@echo "env: installing erwin_nsa[dev$(EXTRA)] into $(VENV), usually 1 to 10 minutes (mostly the download of torch)"
	@sh .ci/venv.sh "$(PYTHON)" "$(VENV)"
	@start=$$(date +%s); \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev$(EXTRA)]" && \
	touch $(VENV)/ready $@ && echo "env: installed in $$(( $$(date +%s) - start )) s"

demo: env ## Run the tour without a browser and write out/tour.html and out/metrics.json (3 to 6 minutes on two cores)
	@echo "demo: running nbs/tour.ipynb, usually 3 to 6 minutes on two cores"
	@$(BIN)/python .ci/demo.py

test: env ## Check that exports are current, run every notebook, then pytest (10 to 20 minutes on two cores)
	@echo "test: exports, notebooks, pytest; usually 10 to 20 minutes on two cores"
	@$(BIN)/python .ci/test.py

test-browser: ## Run the explorers in Chromium and JupyterLab (2 minutes; needs chromium or google-chrome on PATH, else the tests are skipped)
	@$(MAKE) --no-print-directory env EXTRA=$(EXTRA),browser
	@echo "test-browser: pages and notebooks in a headless browser, usually 2 minutes on two cores"
	@$(BIN)/python -m pytest tests/browser

lab: env ## Open the tour in JupyterLab: this machine only, token on (10 seconds to start; Ctrl-C twice ends it)
	@echo "lab: starting JupyterLab on nbs/tour.ipynb, usually 10 seconds; press Ctrl-C twice to end it"
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@cp .ci/lab_settings.json $(VENV)/share/jupyter/lab/settings/overrides.json
	@$(BIN)/python -m jupyterlab --ip=127.0.0.1 --LabApp.news_url=None $(AS_ROOT) \
	  --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter \
	  --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs/tour.ipynb

docs: env ## Build the site with Quarto, or check its pages where Quarto is missing (20 to 40 minutes; the check takes 1)
	@if command -v quarto >/dev/null 2>&1; then \
	  echo "docs: running every notebook, then building the site into _docs with $$(command -v quarto), usually 20 to 40 minutes"; \
	  $(BIN)/python .ci/publish.py; \
	else \
	  echo "docs: no quarto on PATH, so the site is not built; checking its pages instead, usually 1 minute"; \
	  $(BIN)/python .ci/docs.py; \
	fi

readme: env ## Write README.md, CONTRIBUTING.md and llms.txt from the notebooks (5 seconds)
	@echo "readme: writing README.md, CONTRIBUTING.md and llms.txt from the notebooks, usually 5 seconds"
	@$(BIN)/python .ci/readme.py

hooks: env ## Make git merge notebooks cell by cell and refuse unclean ones, in this clone only (5 seconds)
	@echo "hooks: setting up git for notebooks in this clone, usually 5 seconds"
	@sh .ci/hooks.sh

clean: ## Remove out, caches and build folders, not .venv (instant)
	@echo "clean: removing out, caches and build folders; .venv stays (remove it by hand)"
	@rm -rf out build dist _docs _proc .pytest_cache .benchmarks .hypothesis *.egg-info nbs/nbdev.yml
	@find erwin_nsa kernels nbs tests .ci -name __pycache__ -type d -prune -exec rm -rf {} +
