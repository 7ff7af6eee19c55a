"""The average of two checkpoints of one training: what a second stage won, without what it forgot.

    python -m gemma_edge.examples.nano_model.average FIRST SECOND OUT --text 0.6 --audio 0.4

SECOND was trained on from FIRST (`train --init FIRST`), so that every point between them is a model too. The
two numbers are SECOND's shares of the text model and of the ears. If FIRST has no ears yet, SECOND's are
taken.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from .model import load_weights, new_model, save_model


@torch.no_grad()
def average(first: Path, second: Path, out: Path, *, text: float, audio: float) -> None:
    """Write the average to `out`. Raises ValueError if the checkpoints are not of one shape."""
    one, other = _weights(first), _weights(second)
    if not any("audio" in name for name in one):
        one |= {name: tensor for name, tensor in other.items() if "audio" in name}
    if {n: t.shape for n, t in one.items()} != {n: t.shape for n, t in other.items()}:
        raise ValueError(
            f"{first} and {second} have not the same tensors; expected two stages of one training"
        )
    model = new_model(0, ears=any("audio_tower" in name for name in one))
    load_weights(model, second)
    own = model.state_dict()
    for name in one:
        share = audio if "audio" in name else text
        own[name].copy_(torch.lerp(one[name].float(), other[name].float(), share))
    save_model(model, out)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("first", "second", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--text", type=float, default=0.5, help="share of SECOND in the text model")
    parser.add_argument("--audio", type=float, default=0.5, help="share of SECOND in the audio tower")
    args = parser.parse_args()
    average(args.first, args.second, args.out, text=args.text, audio=args.audio)


if __name__ == "__main__":
    main()
