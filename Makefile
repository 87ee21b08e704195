PYTHON ?= python3
# CPU builds of torch carry the version of this pin; any torch that `pip` finds works.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs
# Processes among which `make test` divides the tests. Each may take up to 6 GB.
JOBS ?= 2

.PHONY: demo test test-slow demo-model demo-next lint clean

demo: $(VENV)/.cpu  ## Super-resolve a photograph by 4 with the bundled engine
	mkdir -p out
	$(BIN)/moesr-run tests/assets/chelsea_lr.png -o out/chelsea_x4.png --color-fix wavelet --force
	@echo "open out/chelsea_x4.png beside tests/assets/chelsea_lr.png"

test: $(VENV)/.test  ## Run the default test suite
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: $(VENV)/.test  ## Run the tests that take minutes each
	$(BIN)/python -m pytest -m slow

# A thread each, since two trainings that share cores wait for each other.
demo-model: export OMP_NUM_THREADS ?= 1
demo-model: $(RUNS)/demo-x4/engine $(RUNS)/demo-x8/engine  ## Train the bundled models again and export them

$(RUNS)/photos: | $(VENV)/.test
	$(BIN)/python -m moesr.training.data.demo_photos $@

# What every stage leaves is kept. One first stage serves both, so that `make -j2 demo-model` trains the two at once.
.SECONDARY:
FIRST := $(RUNS)/demo-x4/autoencoder/checkpoint

$(FIRST): | $(RUNS)/photos
	$(BIN)/moesr-train autoencoder --config demo-x4 --data $(RUNS)/photos/train -o $(@D)

$(RUNS)/demo-x%/experts/checkpoint: | $(FIRST)
	$(BIN)/moesr-train experts --config demo-x$* --data $(RUNS)/photos/train --from $(FIRST) -o $(@D)

# Blind LR images teach a decoder nothing at first: the x4 one starts on clean ones. The x8 one sees no others.
$(RUNS)/demo-x4/decoder/checkpoint: | $(RUNS)/demo-x4/experts/checkpoint
	$(BIN)/moesr-train decoder --config demo-x4-clean --data $(RUNS)/photos/train --from $| -o $(RUNS)/demo-x4/clean
	$(BIN)/moesr-train decoder --config demo-x4 --data $(RUNS)/photos/train --val $(RUNS)/photos/validation \
		--from $| --init $(RUNS)/demo-x4/clean/checkpoint -o $(@D)

$(RUNS)/demo-x8/decoder/checkpoint: | $(RUNS)/demo-x8/experts/checkpoint
	$(BIN)/moesr-train decoder --config demo-x8 --data $(RUNS)/photos/train --val $(RUNS)/photos/validation \
		--from $| -o $(@D)

# The x4 decoder once more, with more weight on what it makes without the LR image and a falling learning rate.
$(RUNS)/demo-x4/final/checkpoint: | $(RUNS)/demo-x4/decoder/checkpoint
	$(BIN)/moesr-train decoder --config demo-x4-final --latents $(RUNS)/demo-x4/decoder/latents \
		--val $(RUNS)/photos/validation --from $(RUNS)/demo-x4/experts/checkpoint --init $| -o $(@D)

$(RUNS)/demo-x4/engine: | $(RUNS)/demo-x4/final/checkpoint
$(RUNS)/demo-x8/engine: | $(RUNS)/demo-x8/decoder/checkpoint
$(RUNS)/demo-x%/engine:
	$(BIN)/moesr-export $| -o $@ --tile 304 --store fp16

# The next demo models: the first stage and the decoder add to the enlarged LR image, and experts draw the rest.
# Until their engines are bundled they have names of their own. How long this takes is not measured yet.
demo-next: export OMP_NUM_THREADS ?= 1
demo-next: $(RUNS)/demo-next-x4/engine $(RUNS)/demo-next-x8/engine

PAIRS = --data $(RUNS)/photos/train --val $(RUNS)/photos/validation

$(RUNS)/demo-next-%/autoencoder/checkpoint: | $(RUNS)/photos
	$(BIN)/moesr-train autoencoder --config demo-next-$* $(PAIRS) -o $(@D)

$(RUNS)/demo-next-%/experts/checkpoint: | $(RUNS)/demo-next-%/autoencoder/checkpoint
	$(BIN)/moesr-train experts --config demo-next-$* --data $(RUNS)/photos/train --from $| -o $(@D)

# The decoder learns to show the encoder's latents before it sees sampled ones; the adversarial loss comes last.
$(RUNS)/demo-next-%/render/checkpoint: | $(RUNS)/demo-next-%/autoencoder/checkpoint
	$(BIN)/moesr-train decoder --config demo-next-$*-render $(PAIRS) --from $| -o $(@D)

$(RUNS)/demo-next-%/decoder/checkpoint: | $(RUNS)/demo-next-%/experts/checkpoint $(RUNS)/demo-next-%/render/checkpoint
	$(BIN)/moesr-train decoder --config demo-next-$* $(PAIRS) --from $(RUNS)/demo-next-$*/experts/checkpoint \
		--init $(RUNS)/demo-next-$*/render/checkpoint -o $(@D)

$(RUNS)/demo-next-%/final/checkpoint: | $(RUNS)/demo-next-%/decoder/checkpoint
	$(BIN)/moesr-train decoder --config demo-next-$*-final --latents $(RUNS)/demo-next-$*/decoder/latents \
		--val $(RUNS)/photos/validation --from $(RUNS)/demo-next-$*/experts/checkpoint --init $| -o $(@D)

# Tiles of 272 px cover one megapixel with 1.18 times its area, as they do larger images.
$(RUNS)/demo-next-%/engine: | $(RUNS)/demo-next-%/final/checkpoint
	$(BIN)/moesr-export $| -o $@ --tile 272 --store fp16

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
