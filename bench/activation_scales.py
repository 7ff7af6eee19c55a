"""What the static activation scales of a qat-mobile checkpoint do, on the nano model put into that format.

    python bench/activation_scales.py [--texts N] [--tokens N]

The nano model's weights are rounded per row as the format has them (it was not trained for it, so bits are
given generously), activations are calibrated on half of the texts of `gemma-edge verify`, and the other half
is read token by token. The reference is transformers' own model with its scales, reading each text at once:
mean Kullback-Leibler divergence of the next token, and how often the likeliest token is another one. How far
transformers is from itself, token by token, says what rounding alone does. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import machine, median, print_json, print_machine
from transformers import AutoTokenizer, Gemma4ForCausalLM, Gemma4ForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.support.graph_runner import GraphRunner  # noqa: E402
from tests.support.tiny_bundles import export_tiny  # noqa: E402
from tests.support.tiny_qat import (  # noqa: E402
    calibrate,
    quantized,
    without_activation_scales,
    write_qat_checkpoint,
)

NANO = ROOT / "models" / "nano"
TEXTS = ROOT / "export" / "verify" / "texts.jsonl"
LAYOUTS = {
    "8 bits": dict(num_bits=8, quantize_embeddings=True, module_quant_configs={}),
    "4-bit MLP, 8 bits": dict(
        num_bits=8, quantize_embeddings=True, module_quant_configs={r"\.mlp\.": {"num_bits": 4}}
    ),
}
RECIPES = {
    "float32 products": "activations: float32\n",
    "float32 products, scales": "activations: float32\nactivation_scales: true\n",
    "int8 products": "",
    "int8 products, scales": "activation_scales: true\n",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=6, help="to be read, half of them to calibrate")
    parser.add_argument("--tokens", type=int, default=160, help="of each text")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the model is small
    about = machine()
    print_machine(about)
    texts = read_texts(args.texts, args.tokens)
    rows = []
    for name, layout in LAYOUTS.items():
        layout = layout | dict(modules_to_not_convert=["per_layer_model_projection"])
        model = quantized(nano(), layout=layout)
        calibrate(model, torch.cat(texts[::2], dim=1), headroom=1.0)
        held_out = texts[1::2]
        with tempfile.TemporaryDirectory() as work:
            checkpoint = write_qat_checkpoint(Path(work) / "checkpoint", model)
            reference = logits_of(model, held_out)
            stepwise = steps_of(model, held_out)
            without = logits_of(without_activation_scales(model), held_out)
            print(f"\nnano in {name}, {sum(ids.shape[1] for ids in held_out)} tokens")
            rows.append(row(name, "transformers, token by token", reference, stepwise, 0.0))
            rows.append(row(name, "transformers without scales", reference, without, 0.0))
            for variant, settings in RECIPES.items():
                bundle = export(Path(work), checkpoint, variant, settings)
                found, step_ms = read(bundle, held_out)
                rows.append(row(name, variant, reference, found, step_ms))
    print()
    print_json({"bench": "activation_scales", "rows": rows, "machine": about})
    return 0


def nano() -> Gemma4ForCausalLM:
    """The text model in float32."""
    whole = Gemma4ForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32)
    model = Gemma4ForCausalLM(whole.config.get_text_config())
    model.model.load_state_dict(whole.model.language_model.state_dict())
    model.lm_head.weight = whole.lm_head.weight
    return model.eval()


def read_texts(count: int, tokens: int) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    lines = [json.loads(line)["messages"] for line in TEXTS.read_text().splitlines()[:count]]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in lines]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"][:tokens] for text in texts]
    return [torch.tensor([ids]) for ids in encoded]


def logits_of(model: Gemma4ForCausalLM, texts: list[torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([model(ids).logits[0].numpy() for ids in texts])


def steps_of(model: Gemma4ForCausalLM, texts: list[torch.Tensor]) -> np.ndarray:
    """The same as `logits_of`, one token after another."""
    logits = []
    for ids in texts:
        cache = None
        for token in ids[0]:
            with torch.no_grad():
                result = model(token.reshape(1, 1), past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            logits.append(result.logits[0, -1].numpy())
    return np.array(logits)


def export(work: Path, checkpoint: Path, name: str, settings: str) -> Path:
    folder = work / name.replace(" ", "-")
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: bench\ntitle: For a benchmark\nextends: qat-mobile\n{settings}rules:\n"
        "  - {weights: per_layer_model_projection.weight, bits: 32, method: float}\n"
    )
    return export_tiny(
        folder, checkpoint=checkpoint, recipe=str(recipe), context=512, block=128, slack=64
    ).path


def read(bundle: Path, texts: list[torch.Tensor]) -> tuple[np.ndarray, float]:
    """(logits of every position, milliseconds of a decode step)"""
    graphs = GraphRunner(bundle)
    logits, times = [], []
    for ids in texts:
        graphs.reset()
        for token in ids[0].tolist():
            start = time.perf_counter()
            logits.append(graphs.run([token])[-1])
            times.append((time.perf_counter() - start) * 1e3)
    return np.array(logits), median(times)


def row(layout: str, variant: str, reference: np.ndarray, found: np.ndarray, step_ms: float) -> dict:
    expected, got = (
        torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (reference, found)
    )
    divergence = float((expected.exp() * (expected - got)).sum(-1).mean())
    other = float((reference.argmax(-1) != found.argmax(-1)).mean())
    timing = f"{step_ms:6.2f} ms a step" if step_ms else ""
    print(f"  {variant:<28} KL {divergence:.5f}   other token {other:6.1%}   {timing}", flush=True)
    return dict(layout=layout, variant=variant, kl=divergence, other_token=other, step_ms=step_ms)


if __name__ == "__main__":
    raise SystemExit(main())
