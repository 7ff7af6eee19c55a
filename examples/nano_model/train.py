"""Train the nano model on the corpus, on one NVIDIA GPU, and write the checkpoint.

    python -m gemma_edge.examples.nano_model.train OUT --tokenizer models/nano --steps 5500

The corpus is drawn while training: no dialogue comes twice. The weights are transformers' own modules; only
the walk through them is written here (`forward`, held against transformers in the tests), so that it compiles
and packs many dialogues into one row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Gemma4ForConditionalGeneration

from .batches import ROW, Batches, SpokenBatches
from .hearing import Classroom
from .model import load_weights, new_model, save_model

ROWS = 40  # a batch


def forward(
    model: Gemma4ForConditionalGeneration,
    ids: Tensor,
    position: Tensor,
    masks: dict[str, Tensor],
    step: Callable[..., Any],
    soft: Tensor | None = None,
) -> Tensor:
    """Last hidden states (batch, seq, hidden) of packed rows. `step` is `layer_step`, compiled or not.

    `soft` (tokens, hidden): what was heard, in place of the audio placeholders, in order.
    """
    text = model.model.language_model
    audio = ids == model.config.audio_token_id
    ids = ids.masked_fill(audio, text.config.pad_token_id)
    hidden = text.embed_tokens(ids)
    rows = text.get_per_layer_inputs(ids, hidden)
    if soft is not None:
        hidden = hidden.masked_scatter(audio[..., None], soft.to(hidden.dtype))
    per_layer = text.project_per_layer_inputs(hidden, rows)
    rotary = {kind: text.rotary_emb(hidden, position, kind) for kind in masks}
    shared: dict[str, tuple[Tensor, Tensor]] = {}
    for index, layer in enumerate(text.layers):
        kind = text.config.layer_types[index]
        given = shared[kind] if layer.self_attn.is_kv_shared_layer else None
        hidden, shared[kind] = step(layer, hidden, per_layer[:, :, index], *rotary[kind], masks[kind], given)
    return text.norm(hidden)


def layer_step(
    layer: torch.nn.Module,
    hidden: Tensor,
    per_layer: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    given: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One decoder layer; `given`: the keys and values of the source layer, when they are shared."""
    attention: Any = layer.self_attn
    cos, sin = cos[:, :, None], sin[:, :, None]
    x = layer.input_layernorm(hidden)
    heads = (*x.shape[:2], -1, attention.head_dim)  # (batch, seq, heads, head_dim)
    q = _rotate(attention.q_norm(attention.q_proj(x).view(heads)), cos, sin)
    if given is None:
        k = _rotate(attention.k_norm(attention.k_proj(x).view(heads)), cos, sin)
        v = attention.v_norm(attention.v_proj(x).view(heads))
        given = k.transpose(1, 2), v.transpose(1, 2)
    o = attend(q.transpose(1, 2), *given, mask)
    hidden = hidden + layer.post_attention_layernorm(attention.o_proj(o.transpose(1, 2).flatten(2)))
    hidden = hidden + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(hidden)))
    gated = layer.act_fn(layer.per_layer_input_gate(hidden)) * per_layer
    hidden = hidden + layer.post_per_layer_input_norm(layer.per_layer_projection(gated))
    return hidden * layer.layer_scalar, given


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention (batch, heads, seq, head_dim) under one of the masks of `masks_of`."""
    batch, heads, length, _ = q.shape
    block = mask.shape[2]
    if block != length:  # windowed: each block of queries sees its own block of keys and the one before
        q = _blocks(q, block)
        k, v = (
            torch.cat((_blocks(F.pad(x, (0, 0, block, -block)), block), _blocks(x, block)), 2) for x in (k, v)
        )
    # Without `enable_gqa` the fused kernels take a mask.
    k, v = (x.expand(-1, heads, -1, -1) for x in (k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    if block != length:
        o = o.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    return o


def _blocks(x: Tensor, block: int) -> Tensor:
    """(batch, heads, seq, dim) -> (batch * blocks, heads, block, dim)."""
    return x.unflatten(2, (-1, block)).transpose(1, 2).flatten(0, 1)


def masks_of(document: Tensor, window: int) -> dict[str, Tensor]:
    """Where to attend: inside one dialogue, to the past, within the window.

    Full attention: (batch, 1, seq, seq). Sliding attention, if the rows are whole windows long, in blocks:
    (batch * blocks, 1, window, 2 * window), a block of queries against the keys of two blocks.
    """
    length = document.shape[1]
    place = torch.arange(length, device=document.device)
    full = (document[:, :, None] == document[:, None, :]) & (place[:, None] >= place[None, :])
    if length % window or length == window:
        sliding = (full & (place[:, None] - place[None, :] < window))[:, None]
    else:
        queries = document.view(-1, window)  # (batch * blocks, window)
        keys = F.pad(document, (window, -window), value=-2).view(-1, window)
        own = place[:window]
        near = torch.cat((own[None, :] > own[:, None], own[None, :] <= own[:, None]), 1)
        sliding = ((queries[:, :, None] == torch.cat((keys, queries), 1)[:, None, :]) & near)[:, None]
    return {"full_attention": full[:, None], "sliding_attention": sliding}


class RoundedWeights:
    """Runs the model on weights rounded to 4-bit blocks, and gives the gradient to the exact ones.

    The checkpoint will be quantized: weights that meet rounding in training bear it better. A block is
    `BLOCK` values of a row, or the whole row when that does not divide it.
    """

    BLOCK = 128

    def __init__(self, model: Gemma4ForConditionalGeneration) -> None:
        self.weights = [p for p in model.model.language_model.parameters() if p.ndim == 2]
        self.exact: list[Tensor] = []

    @torch.no_grad()
    def __enter__(self) -> None:
        self.exact = [weight.clone() for weight in self.weights]
        for weight in self.weights:
            weight.copy_(self.round(weight))

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for weight, exact in zip(self.weights, self.exact, strict=True):
            weight.copy_(exact)

    def round(self, weight: Tensor) -> Tensor:
        width = self.BLOCK if weight.shape[1] % self.BLOCK == 0 else weight.shape[1]
        blocks = weight.view(weight.shape[0], -1, width)
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 7.5
        return ((blocks / scale).round().clamp(-8, 7) * scale).view_as(weight)


def loss_of(
    model: Gemma4ForConditionalGeneration, hidden: Tensor, batch: dict[str, Tensor], rows: slice = slice(None)
) -> Tensor:
    """Mean cross entropy of the tokens that the model writes itself; `hidden` are those rows of the batch."""
    ids, document = batch["ids"][rows], batch["document"][rows]
    wanted = batch["learned"][rows, 1:] & (document[:, 1:] == document[:, :-1])
    logits = model.lm_head(hidden[:, :-1][wanted]).float()
    cap = model.config.text_config.final_logit_softcapping
    return F.cross_entropy(torch.tanh(logits / cap) * cap, ids[:, 1:][wanted])


def optimizer_of(
    model: Gemma4ForConditionalGeneration, classroom: Classroom | None, text_rate: float, audio_rate: float
) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms do not; the ears learn at their own rate."""
    groups: list[dict[str, Any]] = []
    modules = [(model.model.language_model, text_rate)]
    modules += [(module, audio_rate) for module in ears_of(model, classroom)]
    for module, peak in modules:
        named = list(module.named_parameters())
        tables = [p for n, p in named if p.ndim >= 2 and "embed" in n]
        matrices = [p for n, p in named if p.ndim >= 2 and "embed" not in n]
        vectors = [p for _, p in named if p.ndim < 2]
        for parameters, decay in ((matrices, 0.1), (tables, 0.01), (vectors, 0.0)):
            groups.append({"params": parameters, "weight_decay": decay, "peak": peak})
    fused = next(model.parameters()).is_cuda
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=text_rate, betas=(0.9, 0.95), eps=1e-9, fused=fused)


def ears_of(model: Gemma4ForConditionalGeneration, classroom: Classroom | None) -> list[torch.nn.Module]:
    """What learns to hear; nothing without a classroom."""
    return [model.model.audio_tower, model.model.embed_audio, classroom] if classroom else []


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train and save; returns what the run was and how it went."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    spoken = args.spoken_rows
    model = new_model(args.seed, ears=spoken > 0)
    if args.init:
        load_weights(model, args.init)
    model.to(device)
    classroom = None
    if spoken:
        width, hidden = model.config.audio_config.output_proj_dims, model.config.text_config.hidden_size
        classroom = Classroom(width, hidden).to(device)
    optimizer = optimizer_of(model, classroom, args.learning_rate, args.audio_rate)
    step_layer = torch.compile(layer_step, dynamic=False) if args.compile else layer_step
    if args.compile and spoken:
        for layer in model.model.audio_tower.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
    rounded = RoundedWeights(model)
    ears = [parameter for module in ears_of(model, classroom) for parameter in module.parameters()]
    log: list[tuple[int, dict[str, float]]] = []
    tokens, clips, total, started = 0, 0, torch.zeros(5, device=device), time.time()
    for step, batch in enumerate(batches(args, device == "cuda")):
        # Where time runs out before the steps do, the schedule ends with it.
        progress = max(step / args.steps, (time.time() - started) / args.max_seconds)
        if progress >= 1.0:
            break
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, progress, args.warm_up)
        # Every other step, once past the beginnings: the model has to be right with and without rounding.
        rounding = step % 2 == 1 and progress >= args.round_from
        with (
            rounded if rounding else nullcontext(),
            torch.autocast(device, torch.bfloat16),
        ):
            soft, lessons = None, torch.zeros(3, device=device)
            if classroom is not None:
                strength = min(1.0, progress / args.quiet) if args.quiet else 1.0
                soft, lessons = classroom(model, batch, args.seed + step, strength)
            masks = masks_of(batch["document"], model.config.text_config.sliding_window)
            hidden = forward(model, batch["ids"], batch["position"], masks, step_layer, soft)
            text_loss = loss_of(model, hidden[spoken:], batch, slice(spoken, None))
            spoken_loss = loss_of(model, hidden[:spoken], batch, slice(0, spoken)) if spoken else lessons[0]
            # Sounds and spelling help at first; words are what the decoder reads, to the end.
            taught = (1.0 - progress) * lessons[:2].sum() + lessons[2]
            (text_loss + spoken_loss + args.lessons * taught).backward()
        torch.nn.utils.clip_grad_norm_(model.model.language_model.parameters(), 1.0)
        if ears:
            torch.nn.utils.clip_grad_norm_(ears, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += torch.stack([text_loss, spoken_loss, *lessons]).detach()
        tokens += batch["ids"].numel()
        clips += int((batch["samples"] > 0).sum()) if "clips" in batch and step % 20 == 0 else 0
        if (step + 1) % args.log_every == 0:
            names = ("text", "spoken", "sounds", "spelling", "words")
            log.append((step + 1, dict(zip(names, (total / args.log_every).tolist(), strict=True))))
            seconds = time.time() - started
            losses = ", ".join(f"{name} {value:.4f}" for name, value in log[-1][1].items())
            print(
                f"step {step + 1}/{args.steps} loss: {losses}; {tokens / seconds:,.0f} tok/s, "
                f"{20 * clips / seconds:,.0f} clips/s, {seconds:.0f} s",
                flush=True,
            )
            total.zero_()
        if (step + 1) % args.save_every == 0:
            save_model(model, args.out)
    save_model(model, args.out)
    return {
        "steps": step,
        "tokens": tokens,
        "clips": 20 * clips,
        "seed": args.seed,
        "init": args.init.name if args.init else None,
        "learning_rate": args.learning_rate,
        "audio_rate": args.audio_rate,
        "text_rows": args.rows,
        "spoken_rows": args.spoken_rows,
        "row": args.row,
        "seconds": round(time.time() - started, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": log[-1][1] if log else None,
    }


def batches(args: argparse.Namespace, pin: bool) -> Iterator[dict[str, Tensor]]:
    """Rows of spoken dialogues first, then rows of text, in one batch."""

    def loader(dataset: Batches | SpokenBatches, workers: int) -> DataLoader[dict[str, Tensor]]:
        ahead = 4 if workers else None
        return DataLoader(
            dataset, batch_size=None, num_workers=workers, pin_memory=pin, prefetch_factor=ahead
        )

    text = loader(Batches(args.tokenizer, args.seed, args.rows, args.row), args.workers)
    if not args.spoken_rows:
        yield from text
        return
    spoken = loader(
        SpokenBatches(args.tokenizer, args.seed + 1, args.spoken_rows, args.clips, args.row),
        args.speech_workers,
    )
    for heard, read in zip(spoken, text, strict=True):
        yield heard | {name: torch.cat((heard[name], read[name])) for name in read}


def schedule(step: int, progress: float, warm_up: int) -> float:
    """Learning rate over its peak: `warm_up` steps up, then straight down to zero at the end."""
    return min(1.0, (step + 1) / warm_up) * (1.0 - progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder with tokenizer and chat template"
    )
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--max-seconds", type=float, default=1e9)
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--audio-rate", type=float, default=2e-3, help="learning rate of the audio tower")
    parser.add_argument("--lessons", type=float, default=1.0, help="weight of the lessons at first")
    parser.add_argument(
        "--quiet", type=float, default=0.3, help="part of the steps until all rooms are noisy"
    )
    parser.add_argument(
        "--spoken-rows", type=int, default=0, help="rows of spoken dialogues in a batch; 0: no ears"
    )
    parser.add_argument("--clips", type=int, default=96, help="clips of a batch, at most")
    parser.add_argument("--speech-workers", type=int, default=0)
    parser.add_argument("--warm-up", type=int, default=300, help="steps")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--row", type=int, default=ROW)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--init", type=Path, help="go on from this checkpoint's weights")
    parser.add_argument(
        "--round-from", type=float, default=0.6, help="part of the steps before rounding starts"
    )
    parser.add_argument("--log-every", type=int, default=250)
    args = parser.parse_args()
    report = train(args)
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
