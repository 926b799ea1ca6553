# Everything a newcomer needs, one command each. `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PRESET ?= quickstart
# joint, two_stage, retrain or new_items; the last two read events before the day UNTIL.
WORKFLOW ?= joint
UNTIL ?=
SET ?=
PORT ?= 5000
SECTION ?=
RUN ?=
FIGURE ?=
HERE ?=
# The first interpreter that answers with a version sidflow supports.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "sidflow needs Python 3.11 or 3.12: none found; name one with make PYTHON=..."; exit 1; }
	@echo "installing into $(VENV) with $$($(PYTHON) --version), a few minutes the first time ..."
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,flyte,dev]'
	@touch $(STAMP)

.PHONY: install keys run ablation lineage reproduce test check format ui bench clean help
install: $(STAMP) ## create .venv with the pinned dependencies

keys: $(STAMP) ## explain every setting with its default (SECTION=joint)
	@$(BIN)/python -m workflows.resolve --keys $(SECTION)

run: $(STAMP) ## train, compare, report on the shipped sample (PRESET=quickstart, WORKFLOW=two_stage, SET="recommender.loop.epochs=2")
	@mkdir -p .sidflow && $(BIN)/python -m workflows.resolve $(PRESET) $(SET) > .sidflow/config.draft \
		&& mv .sidflow/config.draft .sidflow/config.yaml
	@$(BIN)/pyflyte run workflows/$(WORKFLOW).py $(WORKFLOW) --config .sidflow/config.yaml $(if $(UNTIL),--until $(UNTIL))

ablation: PRESET = ablation
ablation: $(STAMP) ## compare arms over seeds, one table and one figure (PRESET=ablation, SET="seeds=[0]")
	@mkdir -p .sidflow && $(BIN)/python -m workflows.resolve --ablation $(PRESET) $(SET) > .sidflow/ablation.draft \
		&& mv .sidflow/ablation.draft .sidflow/ablation.yaml
	@$(BIN)/pyflyte run workflows/ablation.py ablation --config .sidflow/ablation.yaml

lineage: $(STAMP) ## show where a run came from and what came of it (RUN=<MLflow run id>, FIGURE=lineage.png)
	@test -n "$(RUN)" || { echo "name the run: make lineage RUN=<MLflow run id>; make run and make ui show the ids"; exit 2; }
	@$(BIN)/python -m workflows.lineage $(RUN) $(if $(FIGURE),--figure "$(FIGURE)")

reproduce: $(STAMP) ## run a finished run again and compare every artefact and metric (RUN=<MLflow run id>, HERE=1: today's code)
	@test -n "$(RUN)" || { echo "name the run: make reproduce RUN=<MLflow run id>; make ui shows the ids"; exit 2; }
	@$(BIN)/python -m workflows.reproduce $(RUN) $(if $(HERE),--here)

test: $(STAMP) ## run the default test suite
	$(BIN)/python -m pytest

check: $(STAMP) ## lint, types, formatting and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ui: $(STAMP) ## open MLflow over the local store on 127.0.0.1 (PORT=5000)
	@echo "MLflow on http://127.0.0.1:$(PORT) - stop with Ctrl-C"
	@$(BIN)/mlflow ui --host 127.0.0.1 --port $(PORT) \
		--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$${SIDFLOW_HOME:-$(CURDIR)/.sidflow}/mlflow.db}"

bench: $(STAMP) ## run the benchmarks; results go to benchmarks/results
	$(BIN)/python benchmarks/decode.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/joint_step.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/packing.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/recommenders.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/serving.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sinkhorn.py

clean: ## remove runs, artefacts and caches; keeps .venv
	rm -rf .sidflow .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

help: ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-9s %s\n", $$1, $$2}'
