# Everything runs in .venv, which is built when it is missing. PYTHON names another interpreter to build it with.
# Times are those of two idle cores.
# TORCH=2.15.0 TRITON=3.9.0 beside a target: on these versions, in .venv-2.15.0.
PYTHON ?= python3
VENV := .venv
VERSIONS := -c constraints.txt
ifdef TORCH
VENV := .venv-$(TORCH)
VERSIONS := torch==$(TORCH) $(if $(TRITON),triton==$(TRITON))
endif
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -n 2 --dist worksteal -q
NOT_LONG := and not long

.PHONY: demo test long lint bench study plots gpu clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]' $(VERSIONS)
	touch $@

demo: $(VENV)/installed  ## train an autocomplete, learn the story, compare with nn.GRU: a figure in out/; 2 minutes
	$(PY) -m tritongru demo

test: $(VENV)/installed  ## kernels emulated, then what needs the compiler, each in a process of its own; about 4 minutes
	TRITON_INTERPRET=1 $(PYTEST) -m "not compiled and not gpu $(NOT_LONG)"
	$(PYTEST) -m "compiled $(NOT_LONG)"

# Other Tritons that serve `sequence`, to compile its kernels with; PyTorch is not needed for that
TRITONS := 3.6.0 3.9.0

.venv-triton-%/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check numpy triton==$*
	touch $@

ifdef LONG
NOT_LONG :=
test: $(TRITONS:%=.venv-triton-%/installed)
endif

long:  ## make test with the long exploration: what CI runs
	$(MAKE) test LONG=1

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/installed  ## suite workloads on a CUDA machine, elsewhere what the CPU can measure
	$(PY) -m benchmarks

study: $(VENV)/installed  ## compile the forms of kernels/README.md: its table, and the figures in plots/figures
	$(PY) -m benchmarks study
	$(PY) -m plots --out plots/figures

plots: $(VENV)/installed  ## the figures in plots/figures, from committed data alone
	$(PY) -m plots --out plots/figures

gpu: $(VENV)/installed  ## on a CUDA machine, 9 minutes: correctness, tiles, times, workloads, tests, memcheck, into one folder
	$(PY) -m benchmarks day

clean:
	rm -rf .venv .venv-* out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
