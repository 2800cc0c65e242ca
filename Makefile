# Every target sets everything up in .venv first, once; a second call sets nothing up again.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test lint types claims bench docs fmt clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Sterna needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $(READY)

demo: $(READY)
	@rm -rf runs/demo runs/demo-stragglers
	$(BIN)/sterna compare digits.sync digits.fp16 digits.terngrad digits.terngrad_dense \
	  --epochs 20 --workers 4 --seeds 3 --out runs/demo
	@echo
	@echo "One of eight workers is four times slower: who waits for it, and what that costs (virtual seconds)."
	$(BIN)/sterna compare digits.sync digits.ssp digits.asgd digits.dc_asgd \
	  --engine virtual --vectorise --workers 8 --straggler 0:4.0 --target-accuracy 0.96 \
	  --epochs 20 --seeds 3 --out runs/demo-stragglers

test: $(READY) lint types
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy

claims: $(READY)
	$(BIN)/pytest -m slow tests -s

bench: $(READY)
	$(BIN)/python benchmarks/codecs.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/server.py
	$(BIN)/python benchmarks/entropy.py
	$(BIN)/python benchmarks/low_rank.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/links.py --mbit 100,1000 --loopback

docs: $(READY)
	$(BIN)/mkdocs build --strict

fmt: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build site
