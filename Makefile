PYTHON ?= python3
# CPU builds of torch carry the version of this pin; any torch that `pip` finds works.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs

.PHONY: demo test test-slow demo-model lint clean

demo: $(VENV)/.cpu  ## Super-resolve a photograph by 4 with the bundled engine
	mkdir -p out
	$(BIN)/moesr-run tests/assets/chelsea_lr.png -o out/chelsea_x4.png --color-fix wavelet --force
	@echo "open out/chelsea_x4.png beside tests/assets/chelsea_lr.png"

test: $(VENV)/.test  ## Run the default test suite
	$(BIN)/python -m pytest

test-slow: $(VENV)/.test  ## Run the tests that take minutes each
	$(BIN)/python -m pytest -m slow

demo-model: $(VENV)/.test  ## Train a model by the recipes of the bundled one
	$(BIN)/python -m moesr.training.demo_photos $(RUNS)/photos
	$(BIN)/moesr-train all --config demo-x4 --data $(RUNS)/photos/train -o $(RUNS)/demo
	$(BIN)/moesr-train decoder --config demo-x4-colour --data $(RUNS)/photos/train -o $(RUNS)/demo/colour \
		--from $(RUNS)/demo/experts/checkpoint --init $(RUNS)/demo/decoder/checkpoint
	$(BIN)/moesr-export $(RUNS)/demo/colour/checkpoint -o $(RUNS)/demo/engine --tile 256

lint: $(VENV)/.lint  ## Style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cpu: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[cpu]"
	touch $@

$(VENV)/.test: $(VENV)/.cpu
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

# The packages lie at the top level; type checkers need them below one namespace.
$(VENV)/.lint: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable ".[lint]"
	mkdir -p $(VENV)/namespace/moesr
	ln -sfn ../../../runtime ../../../export ../../../kernels ../../../training $(VENV)/namespace/moesr/
	touch $@

clean:
	rm -rf $(VENV) out
