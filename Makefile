# gemma-edge: `make help` lists the targets. Everything runs in .venv, which the first target that needs it makes.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0

# What the targets take, as in `make export DEVICE=raspberry-pi MODEL=nano`.
DEVICE ?= auto
MODEL ?=
RECIPE ?=
CONTEXT ?=
BUNDLE ?=
PROMPT ?=
FORCE ?=
WAV ?=
SAY ?=
TYPED ?=
TRANSCRIPTS ?=
SPEAK ?=
HOME_FILE ?=
BROKER ?= demo
PEERS ?=
QAT ?=
EXTRAS ?= cpu,http,audio
# The values reach the shell through the environment, unexpanded, so that quotes and dollar signs in them are safe.
override PROMPT := $(value PROMPT)
override MODEL := $(value MODEL)
override BUNDLE := $(value BUNDLE)
override WAV := $(value WAV)
override SAY := $(value SAY)
override SPEAK := $(value SPEAK)
override HOME_FILE := $(value HOME_FILE)
override BROKER := $(value BROKER)
export DEVICE MODEL RECIPE CONTEXT BUNDLE PROMPT WAV SAY SPEAK HOME_FILE BROKER

GEMMA_EDGE := $(VENV)/bin/gemma-edge
VENV_PYTHON := $(VENV)/bin/python
READY := $(VENV)/.setup
READY_DEVICE := $(VENV)/.setup-device

# ask, serve, demo and voice take BUNDLE, or else make one: of the bundled nano model unless MODEL says otherwise.
OWN_MODEL := $(or $(MODEL),nano)
OWN_NAME := $(notdir $(OWN_MODEL))-$(basename $(notdir $(DEVICE)))$(RECIPE:%=-%)$(CONTEXT:%=-%)
OWN_BUNDLE := bundles/$(subst $() $(),_,$(subst :,_,$(subst %,_,$(OWN_NAME))))
# A bundle of the nano model is made again when what it is made of changes; it takes seconds.
NANO_SOURCES := $(if $(filter nano,$(OWN_MODEL)),$(wildcard models/nano/*.* export/*.py export/*/*.* device_profiles/*.yaml))
USED_BUNDLE := $(or $(BUNDLE),$(OWN_BUNDLE))
# With a bundle at hand the runtime's few packages are enough: no torch on the device.
NEEDS := $(if $(BUNDLE),$(if $(wildcard $(READY)),$(READY),$(READY_DEVICE)),$(OWN_BUNDLE)/manifest.json)
override PEERS := $(value PEERS)
override QAT := $(value QAT)
export USED_BUNDLE OWN_BUNDLE OWN_MODEL PEERS QAT

# $(call run_export,MODEL,OUT,FORCE): MODEL and OUT are shell words; empty leaves the choice to the exporter.
run_export = $(GEMMA_EDGE) export --device "$$DEVICE" $(if $(1),--model $(1)) $(if $(2),--out $(2)) \
	$${RECIPE:+--recipe "$$RECIPE"} $${CONTEXT:+--context "$$CONTEXT"} $(if $(3),--force)
# "nano" is the model that comes with the repository.
own_model = $(if $(filter nano,$(OWN_MODEL)),models/nano,"$$OWN_MODEL")

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help setup setup-device export ask serve demo voice test test-slow test-cuda test-arm64 bench lint clean distclean

help: ## this list
	@echo "usage: make TARGET [NAME=VALUE ...]"
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  DEVICE=NAME   a device profile, an alias, a YAML file, or auto (the default): gemma-edge devices lists them"
	@echo "  MODEL=NAME    nano, a folder or a Hub id (export: default by device; ask, serve, demo: nano)"
	@echo "  RECIPE=NAME   quantization recipe (default: by device)"
	@echo "  CONTEXT=N     tokens of context (default: by device)"
	@echo "  BUNDLE=DIR    the bundle to write or to use (default: one under bundles/)"
	@echo "  PROMPT=TEXT   the question for ask"
	@echo "  FORCE=1       export over an existing bundle"
	@echo "  SAY=TEXT      what voice hears instead of the microphone, spoken by espeak-ng, a turn for each sentence"
	@echo "  WAV=FILE      a recording for voice to hear; TYPED=1: the keyboard; TRANSCRIPTS=1: show what was heard"
	@echo "  SPEAK=HOW     how voice answers: auto, piper, espeak, off, or FILE.wav"
	@echo "  HOME_FILE=F   tools and settings of voice (default: the example's); BROKER=URL (default: one of its own)"
	@echo "  EXTRAS=LIST   what setup-device installs (default: cpu,http,audio; docs/install.md)"
	@echo "  PEERS=FOLDER  bench: llama.cpp and LiteRT-LM too, built and kept in this folder (bench/peers.py)"
	@echo "  QAT=BUNDLE    bench: a qat-mobile bundle of a full-size model, beside BUNDLE's int4"
	@echo "  PYTHON=PATH   the Python of .venv (3.11 or later)"

setup: $(READY) ## make .venv with the gemma-edge command and all that export and the tests need

setup-device: $(READY_DEVICE) ## make .venv with the runtime only, for the device (no torch)

export: $(READY) ## turn a checkpoint into a bundle (DEVICE= MODEL= RECIPE= CONTEXT= BUNDLE= FORCE=)
	@$(call run_export,$(if $(MODEL),$(own_model)),$(if $(BUNDLE),"$$BUNDLE",$(if $(MODEL),"$$OWN_BUNDLE")),$(FORCE))

ask: $(NEEDS) ## stream one answer (PROMPT= BUNDLE= or DEVICE= MODEL= RECIPE= CONTEXT=)
	@if [ -z "$$PROMPT" ]; then echo "make ask needs a question: make ask PROMPT='turn on the hall light'" >&2; exit 2; fi
	@$(GEMMA_EDGE) ask "$$USED_BUNDLE" "$$PROMPT" --stats

serve: $(NEEDS) ## run the daemon until interrupted (BUNDLE= or DEVICE= MODEL= RECIPE= CONTEXT=)
	@$(GEMMA_EDGE) serve "$$USED_BUNDLE"

demo: $(if $(BUNDLE),$(READY),$(NEEDS)) ## summaries of a day of real sensor events, over MQTT (BUNDLE= or DEVICE= MODEL= ...)
	@$(VENV_PYTHON) -m gemma_edge.examples.sensor_summary.demo "$$USED_BUNDLE"

voice: $(if $(BUNDLE),$(READY),$(NEEDS)) ## a voice assistant (SAY=TEXT, WAV=recording, TYPED=1 or the microphone; SPEAK= HOME_FILE= BROKER= BUNDLE= ...)
	@$(VENV_PYTHON) -m gemma_edge.examples.voice_assistant "$$USED_BUNDLE" --broker "$$BROKER" \
		$${WAV:+--wav "$$WAV"} $${SAY:+--say "$$SAY"} $(if $(TYPED),--text) $(if $(TRANSCRIPTS),--transcripts) $${SPEAK:+--speak "$$SPEAK"} $${HOME_FILE:+--home "$$HOME_FILE"}

test: lint ## lint, types and the fast tests
	@$(VENV_PYTHON) -m pytest -m "not slow and not arm64 and not cuda"

test-slow: $(READY) ## the tests that take minutes or a full-size model, and test-arm64
	@$(VENV_PYTHON) -m pytest -m slow
	@$(MAKE) --no-print-directory test-arm64

test-cuda: $(READY) ## checks on an NVIDIA GPU, with a report; without a GPU it fails and says so
	@$(VENV_PYTHON) -m tests.cuda.report

test-arm64: $(READY) ## the wheel on emulated Raspberry Pis: aarch64 wheels, text, sound, MQTT, HTTP (qemu-user)
	@$(VENV_PYTHON) -m tools.arm64 --check
	@$(VENV_PYTHON) -m pytest -m arm64

bench: $(if $(BUNDLE),$(READY),$(NEEDS)) ## speed and memory beside their targets, in one table (BUNDLE= QAT= PEERS=)
	@$(VENV_PYTHON) bench/targets.py "$$USED_BUNDLE" $${QAT:+"$$QAT"} $${PEERS:+--peers "$$PEERS"}

lint: $(READY) ## ruff and mypy
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy

clean: ## remove caches and build leftovers (keeps .venv and bundles/)
	rm -rf build dist .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . \( -name .venv -o -name .git \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove .venv and bundles/ too
	rm -rf $(VENV) bundles src/*.egg-info

$(OWN_BUNDLE)/manifest.json: $(NANO_SOURCES) | $(READY)
	@$(call run_export,$(own_model),"$$OWN_BUNDLE",$(wildcard $(OWN_BUNDLE)))

$(READY): pyproject.toml tools/install_torch.sh
	@$(call make_venv)
	@echo "installing gemma-edge with its export and test packages into $(VENV) (a minute or two)"
	@tools/install_torch.sh $(VENV_PYTHON) $(TORCH)
	@$(VENV_PYTHON) -m pip --disable-pip-version-check install --quiet --quiet "torch==$(TORCH)" -e ".[dev]"
	@touch $@
	@echo "ready: $(GEMMA_EDGE)"

$(READY_DEVICE): pyproject.toml
	@$(call make_venv)
	@echo "installing gemma-edge's runtime ($(EXTRAS)) into $(VENV)"
	@$(VENV_PYTHON) -m pip --disable-pip-version-check install --quiet --quiet -e ".[$(EXTRAS)]"
	@touch $@
	@echo "ready: $(GEMMA_EDGE)"

# A .venv that works is kept; one that is missing or broken (a moved clone, a removed Python) is made anew.
define make_venv
if ! $(VENV_PYTHON) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "gemma-edge needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name one: make setup PYTHON=python3.12" >&2; exit 1; }; \
	$(PYTHON) -m venv --clear $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 1; }; \
fi
endef
