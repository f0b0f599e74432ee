# make speedrun   scenes -> tiny checkpoint -> SFT -> RL -> eval -> report, on a CPU or a GPU     (out/speedrun)
# make ask        one picture, both paths, from the checkpoint in assets/, in seconds             (out/ask)
# make rl         GRPO from that checkpoint on rendered rooms, in minutes                          (out/rl)
# make test       the tests, in two processes of one thread each where pytest-xdist is installed
# make bench      kernels, rollout, a whole training step and the data path on this device     (bench/results)
# make lint       ruff
# make docs       writes again what docs/ holds that is computed: one_step.md, speed.md's table
# .venv is made on first use; PYTHON=python3 uses that interpreter as it is, and installs nothing.

PYTHON ?= .venv/bin/python
# Idle threads sleep instead of spinning: on a busy machine spinning costs more than it saves.
export OMP_WAIT_POLICY = passive

# A file of its own says that the installation is whole: .venv/bin/python is a link to the system's.
READY = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/installed)

speedrun: $(READY)
	PYTHON="$(PYTHON)" exec sh runs/speedrun.sh

ask: $(READY)
	PYTHON="$(PYTHON)" exec sh assets/room-1.sh

rl: $(READY)
	PYTHON="$(PYTHON)" exec sh runs/rl.sh

test: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q $$($(PYTHON) -c "import xdist; print('-n 2 --dist loadfile')" 2>/dev/null)

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: $(READY)
	$(PYTHON) -m bench.kernels
	$(PYTHON) -m bench.table
	$(PYTHON) -m bench.rollout
	$(PYTHON) -m bench.train
	$(PYTHON) -m bench.data

OLD = Python 3.11 or newer is needed: name one, as in make .venv/installed PYTHON3=python3.12
PYTHON3 ?= python3

docs: $(READY)
	$(PYTHON) -m learn.one_step
	$(PYTHON) -m bench.table

.venv/installed: requirements.txt
	@$(PYTHON3) -c 'import sys; sys.exit("$(OLD)" if sys.version_info < (3, 11) else 0)'
	@echo "installing into .venv, once: some minutes, and 2.5 GB (torch with CUDA is most of it)"
	$(PYTHON3) -m venv .venv
	.venv/bin/python -m pip install --progress-bar on --disable-pip-version-check -r requirements.txt
	touch .venv/installed

.PHONY: speedrun ask rl test lint bench docs
