# The first run of any target makes .venv; PYTHON chooses the Python (3.11 or newer) it is made with.
PYTHON ?= python3
VENV := .venv/bin
.PHONY: up down test lint lock proto install

up: require-python ## set everything up, start every service, print the addresses when healthy
	@$(PYTHON) tools/install.py --start && exec $(VENV)/python -m basalt.up

down: ## stop what `make up` started
	@if [ -x $(VENV)/python ]; then $(VENV)/python -m basalt.down; else echo "Basalt is not running here."; fi

test: install lint ## set everything up and run all tests
	$(VENV)/python -m pytest -q --durations=10

lint: install
	$(VENV)/ruff check . && $(VENV)/ruff format --check . && $(VENV)/pyright --pythonpath $(VENV)/python

install: require-python
	@$(PYTHON) tools/install.py

proto: install ## make basalt/rpc again from proto/
	$(VENV)/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. --grpc_python_out=. \
		proto/basalt/rpc/vision/v1/vision.proto

lock: require-python ## choose new exact versions of everything: requirements.lock
	$(PYTHON) tools/lock.py

require-python:
	@command -v $(PYTHON) >/dev/null || { echo "Basalt needs Python 3.11 or newer, and there is no '$(PYTHON)' here. \
	Install one, or name yours: make PYTHON=/path/to/python3.11 ..."; exit 1; }
