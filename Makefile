# Every target works from a fresh clone; the environment is made once, by the first that needs it.
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
PEERS := .venv-peers
# The tests start some five hundred processes: none but the first is to compile our modules.
unexport PYTHONDONTWRITEBYTECODE
# Built-in shards, prepared once; the demo and people's first runs read them.
DEMO_SHARDS := shards/builtin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: venv
venv: $(VENV)/installed ## the environment: .venv with every pinned package

# Remade only when what it should hold has changed.
$(VENV)/installed: pyproject.toml constraints.txt
	@command -v "$(PYTHON)" > /dev/null || { echo "error: $(PYTHON) not found: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# The libraries we are compared with, on top of our environment (benchmarks/peers/requirements.txt says why so). pip tells
# that our own numpy is newer than theirs, which is why they have an environment of their own.
.PHONY: peers
peers: $(PEERS)/installed ## the libraries that benchmarks.exactness and .loader compare with, in .venv-peers

SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'
$(PEERS)/installed: benchmarks/peers/requirements.txt $(VENV)/installed
	test -x $(PEERS)/bin/python || "$(PYTHON)" -m venv $(PEERS)
	$(PY) $(SITE_PACKAGES) > "$$($(PEERS)/bin/python $(SITE_PACKAGES))/the_other.pth"
	$(PEERS)/bin/python -m pip install --quiet -r benchmarks/peers/requirements.txt
	@touch $@

# Those that `export` is compared with; NNCodec wants numpy < 2 and has an environment that sees nothing of ours.
.PHONY: export-peers
export-peers: venv ## what benchmarks.export_peers compares with: .venv-export-peers and .venv-nncodec
	test -x .venv-export-peers/bin/python || "$(PYTHON)" -m venv .venv-export-peers
	$(PY) $(SITE_PACKAGES) > "$$(.venv-export-peers/bin/python $(SITE_PACKAGES))/the_other.pth"
	.venv-export-peers/bin/python -m pip install --quiet nncf==3.4.0 bsdiff4==1.3.2 zstandard==0.25.0
	test -x .venv-nncodec/bin/python || "$(PYTHON)" -m venv .venv-nncodec
	.venv-nncodec/bin/python -m pip install --quiet nncodec==2.1.3 torch==2.14.1 numpy==1.26.4

.PHONY: demo
demo: venv ## shards, a two-rank training and a comparison with larger models: runs/demo/report.html
	$(PY) -m pipeline.prepare source=builtin out=$(DEMO_SHARDS)
	$(PY) -m pipeline.train experiment=demo
	$(PY) -m pipeline.compare name=demo data.root=$(DEMO_SHARDS) data.size=64 steps=5 alone=false

# Two workers more than cores: ranks wait for one another much of their time, and the worker that has the cluster waits for
# Slurm's clocks. They come first, file by file (tests/sharing.py), so that the many short files of the unit tests fill
# the end.
SIDE_BY_SIDE = -n $$(($$(nproc) + 2)) --maxprocesses 8 --no-loadscope-reorder

.PHONY: test
test: venv ## the tests but the slow ones, as CI runs them
	$(PY) -m pytest -m "not slow" $(SIDE_BY_SIDE) --durations=25

# Lint and the tests beside one another: pyright, the longest part of lint, is one process.
.PHONY: quick
quick: venv ## lint, and the quick unit tests: for the loop of whoever works here
	$(MAKE) --jobs=2 --output-sync=target --no-print-directory lint quick-tests

.PHONY: quick-tests
quick-tests: venv ## those unit tests alone
	$(PY) -m pytest -q -m "not slow and not not_quick" -n 2 tests/unit

.PHONY: test-all
test-all: venv ## every test, an hour and a half; what came out goes into the table of tests/README.md
	$(PY) -m pytest --junit-xml=test-all.xml; code=$$?; $(PY) -m tests.fault_table test-all.xml; exit $$code

.PHONY: soak
soak: venv ## one training under 50 faults, ten minutes: it ends as the unbroken one, and nothing grows
	$(PY) -m pytest tests/faults/test_soak.py -m slow -s

.PHONY: fuzz
fuzz: venv ## ten minutes of random damage to what is read: refused in a sentence, or read right; seeds are printed
	$(PY) -m tests.fuzzing

.PHONY: lint
lint: venv ## format, rules, types, the stair, scripts, words
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m ruff check --preview --select DOC102,DOC202,DOC403 pipeline
	$(PY) -m pyright
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/shellcheck .ci/run benchmarks/gpu_kit.sh slurm/environment.sh slurm/compare.sh slurm/ended.sh slurm/preflight.sh slurm/prepare.sh slurm/study.sh slurm/train.sh slurm/trainings.sh
	$(VENV)/bin/codespell
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml

.PHONY: docs
docs: venv ## the generated pages of docs/: commands, results, schemas, the public surface
	$(PY) docs/generate.py

.PHONY: format
format: venv ## put the code in its form
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

.PHONY: hooks
hooks: venv ## check each commit as CI will (git hooks by pre-commit; works offline)
	$(PY) -m pre_commit install

# Pictures that cannot be made here are given by path, and what they are for is left out without:
# make bench CIFAR10=cifar10.tar IMAGENET_SAMPLE=folder IMAGENET_CLASSES=names.txt
.PHONY: bench
bench: venv peers ## the published figures, measured here; an hour and a quiet machine (benchmarks/README.md)
	$(PY) -m benchmarks.train_step
	$(PY) -m benchmarks.epoch_start
	$(PY) -m benchmarks.epoch_start --large
	$(PY) -m benchmarks.resume_start
	$(PY) -m benchmarks.exactness --peers
	$(PY) -m benchmarks.preemption
	$(PY) -m benchmarks.checkpoint_save
	$(PY) -m benchmarks.rank_checks
	$(PY) -m benchmarks.long_record
	$(PY) -m benchmarks.builtin_seeds --seeds 0 1 2
	$(PY) -m benchmarks.ledger_matrix
	$(PY) -m benchmarks.meter_overhead
	$(PY) -m benchmarks.foreign_programs
	$(PY) -m benchmarks.exposed_time
	$(PY) -m benchmarks.links
	$(PY) -m benchmarks.links --batches
	$(PY) -m benchmarks.forecast
	$(PY) -m benchmarks.forecast --from-one-rank --reuse
	$(PY) -m benchmarks.published_points
	$(PY) -m benchmarks.hostile_files
	$(PY) -m benchmarks.faltering_network
	$(if $(CIFAR10),$(PY) -m benchmarks.cifar10 --tar "$(CIFAR10)",@echo "cifar10: left out, give CIFAR10=cifar10.tar")
	$(if $(CIFAR10),$(PY) -m benchmarks.pruned_cifar10 --tar "$(CIFAR10)",@echo "pruned_cifar10: left out, give CIFAR10=cifar10.tar")
	$(if $(IMAGENET_SAMPLE),$(PY) -m benchmarks.loader --folder "$(IMAGENET_SAMPLE)",@echo "loader: left out, give IMAGENET_SAMPLE=folder")
	$(if $(IMAGENET_SAMPLE),$(PY) -m benchmarks.prepare --folder "$(IMAGENET_SAMPLE)",@echo "prepare: left out, give IMAGENET_SAMPLE=folder")
	$(if $(WEIGHTS),$(PY) -m benchmarks.fine_tuning --folder "$(IMAGENET_SAMPLE)" --classes "$(IMAGENET_CLASSES)" --weights "$(WEIGHTS)",@echo "fine_tuning: left out, give IMAGENET_SAMPLE=folder IMAGENET_CLASSES=names.txt WEIGHTS=squeezenet_v1_0.npz")
	$(if $(IMAGENET_SAMPLE),$(PY) -m benchmarks.imagenet_sample --folder "$(IMAGENET_SAMPLE)" --classes "$(IMAGENET_CLASSES)",@echo "imagenet_sample: left out, give IMAGENET_SAMPLE=folder IMAGENET_CLASSES=names.txt")
