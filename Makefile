# `make help` lists the targets. Every target that needs Python makes .venv first.
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
MODEL ?= tiny_flux
ARGS ?=
SWEEP ?= rank.r=8,16,32
JOBS ?= 2
SECONDS ?= 600
READERS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.dirotq-installed
FOLDERS := pipeline stages models kernels assets conf

.DEFAULT_GOAL := help
.PHONY: help setup compress plan sweep test test-diffusers test-s3 test-clusters lowest families aot check docs bench bench-bits bench-quality table bench-kernels bench-host bench-compress bench-flux bench-models bench-memory bench-load bench-export tune release torture fuzz versions classes clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo
	@echo 'make compress MODEL=<config name or diffusers folder> ARGS="rank.r=32"'

setup: $(STAMP) ## create .venv and install DiRotQ with its tools

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

compress: $(STAMP) ## run all stages: MODEL=..., ARGS="overrides"
	$(BIN)/dirotq compress "model=$(MODEL)" $(ARGS)

plan: $(STAMP) ## show what compress would run, and what it cost the last time
	$(BIN)/dirotq plan "model=$(MODEL)" $(ARGS)

sweep: $(STAMP) ## compress once per value: SWEEP="rank.r=8,16,32"
	$(BIN)/dirotq compress --multirun "model=$(MODEL)" $(SWEEP) $(ARGS)

test: $(STAMP) ## all tests that need no network, on JOBS=2 processes (GPU tests where there is a GPU)
	$(BIN)/python -m pytest -m "not download and not aot and not families" -n $(JOBS) --dist worksteal $(ARGS)

test-diffusers: $(STAMP) ## diffusers' own test mixins on packed pipelines: DIFFUSERS=<its checkout>
	@test -f "$(DIFFUSERS)/tests/testing_utils.py" || { echo "DIFFUSERS=$(DIFFUSERS) is no checkout of diffusers with its tests; name one: git clone https://github.com/huggingface/diffusers" >&2; exit 1; }
	DIFFUSERS_CHECKOUT=$(abspath $(DIFFUSERS)) $(BIN)/python -m pytest -o addopts=-ra \
		--import-mode=prepend -W ignore tests/diffusers_mixins $(ARGS)

test-s3: $(STAMP) ## tests of stores in buckets, against an S3 server on this machine
	$(BIN)/python -m pip install --quiet --editable ".[s3test]"
	$(BIN)/python -m pytest tests/pipeline/test_s3.py $(ARGS)

test-clusters: $(STAMP) ## tests of Ray, SLURM's jobs and searches, on this machine
	$(BIN)/python -m pip install --quiet --editable ".[clusters]"
	$(BIN)/python -m pytest tests/clusters $(ARGS)

lowest: $(STAMP) ## some tests with the oldest version of each dependency, in a venv of their own
	$(BIN)/python .ci/lowest.py

families: $(STAMP) ## the line on tiny pipelines that `make test` leaves out
	$(BIN)/python -m pytest -m families $(ARGS)

aot: $(STAMP) ## compile every kernel for every chip, without one
	$(BIN)/python -m pytest -m aot $(ARGS)

check: $(STAMP) .links docs ## formatting, lint, types, import contracts, the documentation's links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .links && $(abspath $(BIN))/mypy --config-file ../pyproject.toml --package dirotq
	cd .links && $(abspath $(BIN))/lint-imports --config ../pyproject.toml --no-logo

docs: $(STAMP) ## the documentation's site into site/, without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: bench-bits table ## the tables that need no GPU: bits per parameter, quality from stored scores

bench-bits: $(STAMP) ## bits per parameter of real models, from shapes alone
	@$(BIN)/python benchmarks/bits.py $(ARGS)

bench-quality: $(STAMP) ## every method on the embedded models, stored in docs/quality (a GPU, or patience)
	$(BIN)/python benchmarks/quality.py $(ARGS)

table: $(STAMP) ## docs/quality.md from the stored results
	$(BIN)/python benchmarks/quality_table.py $(ARGS)

bench-kernels: $(STAMP) ## time the kernels (needs a GPU): ARGS="linear --write"
	$(BIN)/python benchmarks/speed.py $(ARGS)

bench-host: $(STAMP) ## time what one packed linear costs the host (needs a GPU): ARGS="--write"
	$(BIN)/python benchmarks/host.py $(ARGS)

bench-compress: $(STAMP) ## the pipeline on a full-size model with generated weights (needs a GPU): ARGS="flux"
	$(BIN)/python benchmarks/compress.py $(ARGS)

bench-flux: $(STAMP) ## whole forwards at full size against bf16 and FP8 (needs a GPU): ARGS="forward --write"
	$(BIN)/python benchmarks/flux.py $(ARGS)

bench-models: $(STAMP) ## every family at full size and whole images (needs a GPU): ARGS="flux z_image --write"
	$(BIN)/python benchmarks/models.py $(ARGS)

bench-memory: $(STAMP) ## GPU memory of a whole packed pipeline, phase by phase (needs a GPU): ARGS="--shapes"
	$(BIN)/python benchmarks/memory.py $(ARGS)

bench-load: $(STAMP) ## what checking a folder's digests adds to loading it
	$(BIN)/python benchmarks/load.py $(ARGS)

bench-export: $(STAMP) ## time and memory of `dirotq export` at FLUX.1's shapes: ARGS="svdquant_w4a4"
	$(BIN)/python benchmarks/export.py $(ARGS)

tune: $(STAMP) ## choose plans for this GPU by measurement, into kernels/plans.json
	$(BIN)/python benchmarks/tune.py $(ARGS)

release: $(STAMP) ## build sdist and wheel of the last commit, check them, say what to upload
	$(BIN)/python .ci/release.py $(ARGS)

torture: $(STAMP) ## kill, cut the power, damage, fill the disk, race, also several machines: ARGS="--kills 200" (all: an hour)
	PYTHONPATH=tests/support $(BIN)/python -m torture $(ARGS)

fuzz: $(STAMP) ## random and damaged input, each reader for SECONDS=600: READERS="lora manifest" (all)
	PYTHONPATH=tests/support TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
		$(BIN)/python -m fuzz --seconds $(SECONDS) --readers $(READERS)

versions: $(STAMP) ## record the code of the stages after bumping a version
	PYTHONPATH=tests/support $(BIN)/python -m stage_versions

classes: $(STAMP) ## write the table of docs/models.md: every transformer class of diffusers
	PYTHONPATH=.:tests/support $(BIN)/python -m tiny_transformers.table

clean: ## remove .venv and caches; artifacts/ stays
	rm -rf $(VENV) .links .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf build dist site *.egg-info

# mypy and import-linter look for packages on disk and cannot follow dirotq.__path__ to the folders
# beside dirotq/; this tree of links shows them the layout that a wheel has.
.PHONY: .links
.links:
	@rm -rf $@ && mkdir $@
	@cp -rs $(CURDIR)/dirotq $@/
	@cp -rs $(addprefix $(CURDIR)/,$(FOLDERS)) $@/dirotq/
	@touch $@/dirotq/kernels/__init__.py  # import-linter passes over namespace packages
