# make demo    a model forgets an image, on embedded data        make drills  kills, faults, several processes
# make test    the test suite                                    make parity  against the real PyTorch diffusers
# make bench   speed, side by side with PyTorch                  make lint    ruff, mypy
# make install .venv, with the command .venv/bin/retrack          make docs    docs/config.md, tables, the diagram
# make newest  fast tests on the newest Python and jax            make lowest  fast tests on the lowest versions
# make clean   remove the virtual environments
# JAX=cuda or JAX=tpu installs jax for that accelerator.
# LOCKED=1 installs the versions that the README's numbers were measured with (Python 3.11).

PYTHON ?= python3
JAX ?= cpu
LOCKED ?=
INSTALLED := .venv/installed-$(JAX)$(if $(LOCKED),-locked)
VERSIONS := $(if $(LOCKED),-c requirements.lock)
BIN := .venv/bin
PARITY := .venv-parity/bin
QUIET_PIP := -q --disable-pip-version-check

NEWEST := .venv-newest/bin/python
LOWEST := .venv-lowest/bin/python
FAST := $(addprefix tests/,unlearn diffusion sampling train weights checkpoints config test_api.py test_files.py test_log.py test_imports.py)

.PHONY: demo install test newest lowest drills parity bench lint docs clean

demo: $(INSTALLED)
	$(BIN)/python -m retrack_jax.main --config=configs/digits_tshirt.py
	@printf '%s\n' "" "Try next:" \
	  "  the same as with a model and pictures of your own: the pictures as files, then the command of the README" \
	  "    $(BIN)/python examples/practice_images.py runs/practice" \
	  "    $(BIN)/retrack --config=custom --workdir=runs/practice/tshirt --config.checkpoint=runs/digits_tshirt/pretrained/diffusers --config.data.dir=runs/practice/images --config.targets=@runs/practice/tshirt.txt" \
	  "  every method beside a model retrained without the T-shirt" \
	  "    $(BIN)/retrack --config=digits_tshirt:all"

install: $(INSTALLED)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/concept_figure.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

newest: .venv-newest/installed
	$(NEWEST) -m pytest -n auto --dist loadfile $(FAST)

lowest: .venv-lowest/installed
	$(LOWEST) -m pytest -n auto --dist loadfile $(FAST)

drills: $(INSTALLED)
	$(BIN)/python -m pytest tests/drills -n 2 --dist loadfile

parity: .venv-parity/installed
	$(PARITY)/python -m pytest tests/parity -n auto --dist loadfile

bench: .venv-parity/installed
	$(PARITY)/python -m tests.benchmarks

.venv/installed-%: requirements.txt pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(QUIET_PIP) -r requirements.txt $(VERSIONS)
	if [ $(JAX) != cpu ]; then $(BIN)/python -m pip install $(QUIET_PIP) "retrack_jax[$(JAX)] @ file://$(CURDIR)" $(VERSIONS); fi
	$(BIN)/python -m pip install $(QUIET_PIP) --no-deps -e .
	touch $@

.venv-newest/installed: requirements.txt
	test -x $(NEWEST) || python3.13 -m venv .venv-newest
	$(NEWEST) -m pip install $(QUIET_PIP) -r requirements.txt
	touch $@

# The least version that requirements.txt allows of each package.
.venv-lowest/installed: requirements.txt
	test -x $(LOWEST) || $(PYTHON) -m venv .venv-lowest
	sed -nE 's/^([A-Za-z0-9_.-]+)(\[[a-z]+\])?>=([0-9.]+).*/\1==\3/p' requirements.txt > .venv-lowest/versions.txt
	$(LOWEST) -m pip install $(QUIET_PIP) -r requirements.txt -c .venv-lowest/versions.txt
	touch $@

# PyTorch's CPU build first, by itself: a plain `torch` would bring CUDA's gigabytes.
.venv-parity/installed: requirements.txt tests/parity/requirements.txt
	test -x $(PARITY)/python || $(PYTHON) -m venv .venv-parity
	$(PARITY)/python -m pip install $(QUIET_PIP) torch==2.13.0
	$(PARITY)/python -m pip install $(QUIET_PIP) -r requirements.txt -r tests/parity/requirements.txt
	$(PARITY)/python -m pip install $(QUIET_PIP) --no-deps torch-fidelity==0.4.0 piq==0.8.0 open_clip_torch==3.3.0
	touch $@

clean:
	rm -rf .venv .venv-parity .venv-newest .venv-lowest
