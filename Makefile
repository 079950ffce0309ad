# The two commands: `make demo` (set-up where missing, then the main job) and `make test` (the same set-up, then the tests).
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-adapters check bench bench-cli bench-snapshots soak fuzz clean kernel bench-drivers bench-sessions plots hard kvm-host

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

setup: ## install what is missing: apt packages, virtual environment, guestd and keeper, kernel, base image
	@tools/setup.sh

demo: setup ## the main job: an agent that goes to lunch and comes back
	@$(VENV)/bin/recess demo $(DEMO_ARGS)

check: ## the gate: format, lint, types, import contracts, unit and tidy tests
	@tools/setup.sh gate
	@tools/check.sh

test: setup ## all tests, real machines included
	@tools/test.sh

test-adapters: setup ## the adapters against the real packages of PyPI
	@tools/adapters.sh

bench: setup ## the figures, each beside the bare QEMU equivalent of the same run
	@$(PY) -m benchmarks.run

bench-cli: setup ## what a user of the command line waits for, beside podman, runsc and QEMU by hand
	@tools/bench_cli_peers.sh
	@$(PY) -m benchmarks.cli $(BENCH_ARGS)

bench-drivers: setup plots ## a machine under each driver beside a process of the host: table and plots
	@$(VENV)/bin/recess bench drivers $(BENCH_ARGS)

bench-snapshots: setup plots ## snapshots beside QEMU's, libvirt's and gVisor's of the same guest: table and plots
	@$(VENV)/bin/recess bench snapshots $(BENCH_ARGS)

bench-sessions: setup plots ## long sessions, killed: Recess beside its peers, one model server and one card: table, CSV, plots
	@$(PY) -m benchmarks.sessions --peers "$$(tools/bench_peers.sh)" $(BENCH_ARGS)

plots: setup # what draws the benchmarks' plots
	@$(PY) -c 'import matplotlib' 2>/dev/null || $(PY) -m pip install -q 'matplotlib==3.11.2'

hard: setup ## other people's programs, frozen midway and forked, on each driver (its images take minutes to build)
	@RECESS_HARD=1 $(VENV)/bin/pytest -q -s tests/hard $(HARD_ARGS)

kvm-host: setup ## the Firecracker driver's tests in an emulated host with KVM (RECESS_FIRECRACKER_BIN, KVM_HOST_ARGS)
	@$(PY) -m tests.kvm_host $(KVM_HOST_ARGS)

soak: setup ## the long run on real machines
	@tools/soak.sh

fuzz: setup ## look for bytes that a reader cannot take, two minutes for each of ten (FUZZ_ARGS)
	@$(PY) -c 'import atheris' 2>/dev/null || $(PY) -m pip install -q 'atheris==3.0.0'
	@$(PY) tools/fuzz.py $(FUZZ_ARGS)

kernel: setup ## build the trimmed guest kernel (some 15 minutes of one core, 2.6 GB for a while)
	@tools/kernel.sh

clean: ## remove what was built here (not the home of your machines)
	rm -rf $(VENV) build dist guest/target src/recess/_bin .mypy_cache .ruff_cache .pytest_cache
