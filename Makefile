# Two commands on a fresh machine with Python 3.11: `make demo` (QUICK=1 for the short one) and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test lint evidence clean

demo: .venv/.demo
	$(BIN)/python -m experiments.demo $(if $(QUICK),--quick)

test: .venv/.dev
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -q

evidence: .venv/.dev
	$(BIN)/python -m experiments.evidence
	$(BIN)/python -m experiments.frontier

lint: .venv/.dev
	$(BIN)/python -m ruff check .

# A stamp is made only after pip has finished, so that an interrupted installation is done again.
.venv/.demo: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.demo
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv out
