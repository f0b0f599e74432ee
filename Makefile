# make speedrun   scenes -> tiny checkpoint -> SFT -> RL -> eval -> report, on a CPU or a GPU     (out/speedrun)
# make test       the tests
# make bench      kernels, rollout, a whole training step and the data path on this device     (bench/results)
# make lint       ruff
# .venv is made on first use; PYTHON=python3 uses that interpreter as it is, and installs nothing.

PYTHON ?= .venv/bin/python
# Idle threads sleep instead of spinning: on a busy machine spinning costs more than it saves.
export OMP_WAIT_POLICY = passive

speedrun: $(filter .venv/bin/python,$(PYTHON))
	PYTHON="$(PYTHON)" sh runs/speedrun.sh

test: $(filter .venv/bin/python,$(PYTHON))
	$(PYTHON) -m pytest -q

lint: $(filter .venv/bin/python,$(PYTHON))
	$(PYTHON) -m ruff check .

bench: $(filter .venv/bin/python,$(PYTHON))
	$(PYTHON) -m bench.kernels
	$(PYTHON) -m bench.table
	$(PYTHON) -m bench.rollout
	$(PYTHON) -m bench.train
	$(PYTHON) -m bench.data

.venv/bin/python: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/bin/python

.PHONY: speedrun test lint bench
