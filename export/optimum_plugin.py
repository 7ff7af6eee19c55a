"""gemma-edge as an Optimum exporter: what the TasksManager knows of it, and the command's work.

Importing this module registers the `gemma_edge` backend for Gemma 4's model types.
"""

from __future__ import annotations

import argparse
from typing import Any

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedTextConfig

from .cli import run_export
from .geometry import TextModel, parse_text_model, plan_caches

BACKEND = "gemma_edge"
TASK = "text-generation"  # the graph always has caches; Optimum's "-with-past" means a second graph with them

register = TasksManager.create_register(BACKEND)

Axes = dict[str, dict[int, str]]


@register("gemma4", TASK)
@register("gemma4_text", TASK)
class Gemma4ExporterConfig(ExporterConfig):
    """The decoder graph's inputs and outputs for a transformers config; the device fixes cache axes."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    ATOL_FOR_VALIDATION = 1e-3

    @property
    def text_model(self) -> TextModel:
        return parse_text_model(self._config.to_dict(), self._config.model_type)

    @property
    def inputs(self) -> Axes:
        tokens = {1: "sequence_length"}
        axes: Axes = {"inputs_embeds": tokens}
        if self.text_model.geometry.hidden_size_per_layer_input:
            axes["per_layer_inputs"] = tokens
        axes |= {"attention_mask": {1: "total_sequence_length"}, "position_ids": tokens}
        return axes | self._caches("past_key_values")

    @property
    def outputs(self) -> Axes:
        return {"logits": {1: "logits_to_keep"}} | self._caches("present")

    @property
    def values_override(self) -> dict[str, Any] | None:
        return None

    def _caches(self, prefix: str) -> Axes:
        caches = plan_caches(self.text_model, context=1, sliding_slack=0, dtype="float32")
        return {f"{prefix}.{layer.index}.{part}": {} for layer in caches.layers for part in ("key", "value")}


def run(args: argparse.Namespace) -> int:
    """The command line's export. Raises GemmaEdgeError."""
    return run_export(args)
