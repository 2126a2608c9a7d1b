# Everything runs in .venv, which the first target that needs it sets up. PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Two test processes share the machine: one thread each, or OpenMP's threads wait for each other.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := demo
.PHONY: demo reproduce bench test test-all quality style

demo: $(INSTALLED)
	$(BIN)/transformers-aar generate "Siren" "Bell" "Rain" -o demo --plot --seed 0 --overwrite
	$(BIN)/transformers-aar reconstruct demo/*.wav -o demo/reconstructed --plot --overwrite
	@echo
	@echo "Generated sounds (WAV) and pictures (PNG): $(CURDIR)/demo"
	@echo "The same sounds through the codec:         $(CURDIR)/demo/reconstructed"

# About two hours on two cores. Stopped and started again, it goes on.
reproduce: $(INSTALLED)
	$(BIN)/python scripts/reproduce_claims.py scripts/configs/claims.yaml --output_dir runs/claims

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	$(PYTEST)

bench: $(INSTALLED)
	$(BIN)/python scripts/benchmark.py --output-dir benchmark

quality: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

style: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(INSTALLED): setup.py pyproject.toml constraints.txt scripts/check_torchaudio.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "$(PYTHON) is no Python 3.10 or newer: name one, as in 'make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12'."; exit 1; }
	@echo "Installing into .venv, one to two minutes the first time ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python scripts/check_torchaudio.py
	@touch $@
