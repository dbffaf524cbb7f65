# kdcache: every target makes what it needs, from a clean checkout with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
STAMP := $(VENV)/.installed

.PHONY: help install demo bench evidence test test-slow test-examples test-extras test-wheel check docs format clean

help:
	@echo "make demo       train a teacher, dump it, distill students, compare (embedded data)"
	@echo "make bench      the claims about speed and size, measured here (minutes)"
	@echo "make evidence   what is claimed, each with the command that measures it"
	@echo "make test       the tests (minutes)         make test-slow  the long ones"
	@echo "make test-examples  the examples in other trainers, with the frameworks that they need"
	@echo "make test-extras    exports, int8 and pruning, with the packages that they need"
	@echo "make test-wheel     the built wheel, in an empty environment: demo and tests"
	@echo "make docs       the documentation as a site, in site/"
	@echo "make check      format, lint, types, tests  make format     rewrite the formatting"
	@echo "make install    only make $(VENV)              make clean      remove it"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("kdcache needs Python >= 3.11, found " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/kdcache demo

bench: $(STAMP)
	$(BIN)/kdcache bench --out bench.json

evidence: $(STAMP)
	@$(BIN)/python evidence/page.py --list

test: $(STAMP)
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) -m slow --timeout 3600

# Without a skip: each framework must be there.
test-examples: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,examples]'
	KDCACHE_REQUIRE_FRAMEWORKS=1 $(BIN)/python -m pytest -n 2 -m 'not gpu' tests/examples

test-extras: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,onnx,prune]'
	KDCACHE_REQUIRE_FRAMEWORKS=1 $(BIN)/python -m pytest -n 2 -m 'not gpu' tests/kdcache/deploying tests/kdcache/pruning tests/kdcache/training/test_evaluate.py

# What people install: sdist and wheel are built, the wheel passes the demo and the tests of the unpacked sdist, from
# which the packages are taken away; the three files of tests about the text of the source stay behind with it.
test-wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m pip install --disable-pip-version-check -q build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/kdcache-*
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt "$$(ls dist/kdcache-*.whl)[test]"
	mkdir dist/source && tar -xzf dist/kdcache-*.tar.gz -C dist/source --strip-components 1
	rm -r dist/source/kdcache dist/source/cli dist/source/stores/kdcache_stores
	cd dist/source && ../venv/bin/kdcache demo && ../venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal \
		--ignore tests/test_architecture.py --ignore tests/test_words.py --ignore tests/cli/test_remedies.py

# Strict: a page whose Python fails, or a link that leads nowhere, is an error.
docs: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,docs]'
	$(BIN)/mkdocs build --strict

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
