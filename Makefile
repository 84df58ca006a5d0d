# make demo    a model forgets an image, on embedded data        make drills  kills, faults, several processes
# make test    the test suite                                    make parity  against the real PyTorch diffusers
# make bench   speed, side by side with PyTorch                  make lint    ruff
# make install .venv, with the command .venv/bin/retrack          make docs    docs/config.md, tables, the diagram
# make clean   remove the virtual environments
# JAX=cuda or JAX=tpu installs jax for that accelerator.

PYTHON ?= python3
JAX ?= cpu
BIN := .venv/bin
PARITY := .venv-parity/bin
QUIET_PIP := -q --disable-pip-version-check

.PHONY: demo install test drills parity bench lint docs clean

demo: .venv/installed-$(JAX)
	$(BIN)/python -m retrack_jax.main --config=configs/digits_tshirt.py

install: .venv/installed-$(JAX)

test: .venv/installed-$(JAX)
	$(BIN)/python -m pytest -n auto --dist loadfile

docs: .venv/installed-$(JAX)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/concept_figure.py

lint: .venv/installed-$(JAX)
	$(BIN)/ruff check .

drills: .venv/installed-$(JAX)
	$(BIN)/python -m pytest tests/drills -n 2 --dist loadfile

parity: .venv-parity/installed
	$(PARITY)/python -m pytest tests/parity -n auto --dist loadfile

bench: .venv-parity/installed
	$(PARITY)/python -m tests.benchmarks

.venv/installed-%: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(QUIET_PIP) -r requirements.txt
	if [ $* != cpu ]; then $(BIN)/python -m pip install $(QUIET_PIP) "retrack_jax[$*] @ file://$(CURDIR)"; fi
	touch $@

# PyTorch's CPU build first, by itself: a plain `torch` would bring CUDA's gigabytes.
.venv-parity/installed: requirements.txt tests/parity/requirements.txt
	test -x $(PARITY)/python || $(PYTHON) -m venv .venv-parity
	$(PARITY)/python -m pip install $(QUIET_PIP) torch==2.13.0
	$(PARITY)/python -m pip install $(QUIET_PIP) -r requirements.txt -r tests/parity/requirements.txt
	$(PARITY)/python -m pip install $(QUIET_PIP) --no-deps torch-fidelity==0.4.0 piq==0.8.0 open_clip_torch==3.3.0
	touch $@

clean:
	rm -rf .venv .venv-parity
