# The first run of any target makes .venv; PYTHON chooses the Python (3.11 or newer) it is made with.
PYTHON ?= python3
VENV := .venv/bin
.PHONY: up down test lint lock proto install images settings

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

settings: install ## write docs/settings.md again
	$(VENV)/python tools/settings_table.py

lock: require-python ## choose new exact versions of everything: requirements.lock
	$(PYTHON) tools/lock.py && $(PYTHON) tools/install.py && $(VENV)/python tools/extras.py

# VARIANT=cuda makes the GPU's images, tagged TAG-cuda. PYTHON_IMAGE and LLM_BASE are the bases; see docs/operations.md.
TAG ?= 0.1.0
VARIANT ?= cpu
PYTHON_IMAGE ?= python:3.11-slim-bookworm
LLM_BASE ?= $(if $(filter cuda,$(VARIANT)),vllm/vllm-openai:v0.32.0,$(PYTHON_IMAGE))
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
LIGHT := gateway ui evaluator trainer
HEAVY := vision llm trainer-worker

images: $(LIGHT:%=image-%) $(HEAVY:%=image-%) ## the images of all services

image-%:
	docker build -f services/$(firstword $(subst -, ,$*))/Dockerfile -t basalt-$*:$(TAG)$(SUFFIX) $(ARGS) .

$(LIGHT:%=image-%): ARGS = --build-arg PYTHON=$(PYTHON_IMAGE)
image-trainer: ARGS += --target api
$(HEAVY:%=image-%): SUFFIX = $(if $(filter cuda,$(VARIANT)),-cuda)
$(HEAVY:%=image-%): ARGS = --build-arg VARIANT=$(VARIANT) --build-arg TORCH_CPU_INDEX=$(TORCH_CPU_INDEX)
image-vision: ARGS += --build-arg PYTHON=$(PYTHON_IMAGE)
image-llm: ARGS += --build-arg BASE=$(LLM_BASE)
image-trainer-worker: ARGS += --build-arg PYTHON=$(PYTHON_IMAGE) --target worker

require-python:
	@command -v $(PYTHON) >/dev/null || { echo "Basalt needs Python 3.11 or newer, and there is no '$(PYTHON)' here. \
	Install one, or name yours: make PYTHON=/path/to/python3.11 ..."; exit 1; }
