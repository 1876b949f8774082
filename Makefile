SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
UV_COMPILE = .venv/bin/uv pip compile -q --python .venv/bin/python --no-annotate --custom-compile-command "make lock"

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: ## Make .venv and build the package (GPU=1: ONNX Runtime with CUDA; KINETIX=1: Kinetix; ROBOT=1: no simulators)
	@tools/setup.sh

sim test bench faults libero train retrain kinetix lint: export ROBOT = 0

sim: setup ## Run LIBERO with planner and controller: make sim ARGS="task:=0 episodes:=2" (ARGS=--show-args lists them)
	@. tools/env.sh; exec python -m a2c2_ros.bringup libero_sim $(ARGS)

test: setup lint ## Lint and run the tests: make test ARGS="-k slot"
	@. tools/env.sh; pytest -x $(ARGS)

bench: setup ## Measure the control loop's timing beside a straightforward one (10 minutes): results/bench.json
	@. tools/env.sh; exec python -m a2c2_ros.benchmark.timing $(ARGS)

faults: setup ## Try every fault on the real nodes and 10,000 at random on the core (4 minutes): results/faults.json
	@. tools/env.sh; exec python -m a2c2_ros.faults $(ARGS)

libero: setup ## Success rates on LIBERO, the (e, d) grid (a day; QUICK=1: a part, 2 minutes): docs/libero.md
	@. tools/env.sh; exec python -m a2c2_ros.evaluation.grid $(if $(QUICK),--quick) $(ARGS)

train: setup ## Train every policy and head of the LIBERO tables (hours; ARGS=--list shows the steps): runs/models
	@. tools/env.sh; exec python -m a2c2_ros.training.libero $(ARGS)

retrain: setup ## Record on LIBERO, retrain the head, swap it in, evaluate before and after (75 minutes): results/retrain.json
	@. tools/env.sh; exec python -m a2c2_ros.training.retrain $(ARGS)

kinetix: export KINETIX = 1
kinetix: setup ## Success rates on Kinetix, the (e, d) grid (hours): make kinetix ARGS="--levels DIR", docs/kinetix.md
	@. tools/env.sh; exec python -m a2c2_ros.evaluation.kinetix $(ARGS)

lint: setup ## Check the style
	@. tools/env.sh; ruff check

lock: ## Resolve requirements*.in into the lock files (UPGRADE=1: newest versions)
	$(UV_COMPILE) $(if $(UPGRADE),--upgrade) --excludes tools/excludes.txt requirements.in -o requirements.lock
	$(UV_COMPILE) -c requirements.lock --excludes tools/excludes.txt requirements-robot.in -o requirements-robot.lock
	$(UV_COMPILE) $(if $(UPGRADE),--upgrade) -c requirements.lock requirements-gpu.in -o requirements-gpu.lock
	$(UV_COMPILE) $(if $(UPGRADE),--upgrade) -c requirements.lock --excludes tools/excludes.txt requirements-kinetix.in \
	  -o requirements-kinetix.lock

clean: ## Remove what was built; the virtual environment and runs/ stay
	rm -rf build install log .pytest_cache .ruff_cache .hypothesis

.PHONY: help setup sim test bench faults libero train retrain kinetix lint lock clean
