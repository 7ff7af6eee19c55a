"""`optimum-cli export gemma-edge` does what `gemma-edge export` does; the TasksManager knows the exporter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
from transformers import AutoConfig

from gemma_edge.runtime.bundle import open_bundle

from .support.tiny_bundles import tiny_profile
from .support.tiny_checkpoint import write_tiny_checkpoint

OPTIMUM = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "gemma-edge"]


def test_command(tmp_path: Path):
    one_layer = dict(num_hidden_layers=1, layer_types=["full_attention"], num_kv_shared_layers=0)
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", layout="multimodal", **one_layer)
    profile = tmp_path / "tiny-device.yaml"
    profile.write_bytes(msgspec.json.encode(tiny_profile()))
    out = tmp_path / "bundle"
    command = [*OPTIMUM, "--model", str(checkpoint), "--device", str(profile), "--recipe", "int8", str(out)]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "read for each token" in first.stdout
    assert open_bundle(out, verify_hashes=True).manifest.recipe == "int8"
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "--force replaces it" in second.stderr and "Traceback" not in second.stderr


def test_tasks_manager_knows_the_exporter(tmp_path: Path):
    from optimum.exporters.tasks import TasksManager

    from gemma_edge.export import optimum_plugin

    for layout, model_type in (("text", "gemma4_text"), ("multimodal", "gemma4")):
        checkpoint = write_tiny_checkpoint(tmp_path / layout, layout=layout)
        make = TasksManager.get_exporter_config_constructor(
            optimum_plugin.BACKEND, model_type=model_type, task="text-generation", library_name="transformers"
        )
        config = make(AutoConfig.from_pretrained(checkpoint))
        assert list(config.inputs)[:4] == [
            "inputs_embeds",
            "per_layer_inputs",
            "attention_mask",
            "position_ids",
        ]
        assert [name for name in config.inputs if name.endswith(".key")] == [
            f"past_key_values.{index}.key" for index in range(5)
        ]
        assert list(config.outputs)[-1] == "present.4.value"
