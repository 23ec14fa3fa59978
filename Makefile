# make demo [PHOTOS=folder]   see it work on your photographs, or on those that scikit-image ships
# make test | test-slow       the tests, in TESTERS processes; the slow ones, one after the other, take hours
# make check                  lint, format, types
# make man                    the manual pages, anew from the command line's own help
# make bench                  the benchmarks (figures, no verdicts)
VENV ?= .venv
PYTHON ?= python3
PHOTOS ?=
TESTERS ?= 2
BENCHMARKS ?= small_files views networks migration
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: demo test test-slow check format man bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m esrfs.cli.demo $(if $(PHOTOS),--photos '$(PHOTOS)') --out demo-out

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(TESTERS) --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

man: $(VENV)/.installed
	$(BIN)/python -m esrfs.cli.manual docs/man

bench: $(VENV)/.installed
	set -e; for each in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$each; done

clean:
	rm -rf $(VENV) demo-out dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
