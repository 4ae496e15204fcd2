PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs notebooks adversary soak bench clean

demo: .venv/installed
	$(BIN)/ppl-vae demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html
	@echo docs/_build/html/index.html

notebooks: .venv/installed
	$(BIN)/python tests/test_notebooks.py

adversary: .venv/installed
	$(BIN)/python tests/adversary/run.py --page docs/adversary.md

soak: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/survival/soak.py --page docs/survival.md

bench: export OMP_NUM_THREADS = 1
bench: .venv/installed .bench/installed
	$(BIN)/python benchmarks/speed.py --numpyro .bench/bin/python --out benchmarks/results/speed.json --page docs/speed.md \
		--also benchmarks/results/speed_zen4.json
	$(BIN)/python benchmarks/vectorised.py --out benchmarks/results/vectorised.json
	$(BIN)/python benchmarks/hierarchical.py --out benchmarks/results/hierarchical.json
	$(BIN)/python benchmarks/rewrites.py --out benchmarks/results/rewrites.json

.bench/installed:
	$(PYTHON) -m venv .bench
	.bench/bin/python -m pip install --quiet --disable-pip-version-check numpyro jax
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv .bench runs docs/_build docs/reference docs/notebooks
