"""The table that closes an export: files, bytes per token, memory against the device's budget, worst
errors.
"""

from __future__ import annotations

from pathlib import Path

from ..runtime.bundle import MANIFEST, Manifest
from .bundle import Prepared
from .plan import total_bytes, wants_prefill_graph

WORST = 3


def report(out: Path, prepared: Prepared, manifest: Manifest) -> str:
    """Several lines of text."""
    memory, caches = manifest.memory, manifest.caches
    sizes = {name: entry.size_bytes for name, entry in manifest.files.items()}
    sizes[MANIFEST] = (out / MANIFEST).stat().st_size
    lines = [f"{out}: {manifest.source.model} for {manifest.device}, recipe {manifest.recipe}", "", "files"]
    lines += [_row(name, size) for name, size in sorted(sizes.items(), key=lambda item: -item[1])]
    lines.append(_row("total", sum(sizes.values())))
    budget = manifest.runtime.memory_budget_mib << 20
    needed = total_bytes(memory)
    lines += [
        "",
        "memory on the device",
        _row("weights", memory.weights_bytes),
        *([_row("  of these the prefill graph's", prepared.plan.prefill_bytes)] if manifest.prefill else []),
        _row(f"caches, {caches.context} tokens, {caches.dtype}", memory.kv_bytes),
        _row("process and activations", memory.overhead_bytes),
        *([_row("audio encoder, while it is open", memory.audio_bytes)] if memory.audio_bytes else []),
        *([_row("drafter", memory.drafter_bytes)] if memory.drafter_bytes else []),
        _row(f"together, {needed / budget:.0%} of the budget", needed),
        _row("budget", budget),
        _row("mapped from disk besides", memory.mapped_bytes),
        "",
        _row("weights read for each token", memory.read_per_token_bytes),
    ]
    if not manifest.prefill and wants_prefill_graph(prepared.job.profile, prepared.job.recipe):
        lines += [
            "",
            "no prefill graph, which the device wants: it would not fit the budget (docs/performance.md)",
        ]
    worst = sorted(manifest.quantization, key=lambda entry: -entry.relative_error)[:WORST]
    if worst:
        lines += ["", "largest quantization errors, |W - Wq| / |W|"]
        lines += [f"  {entry.tensor:<44} {entry.bits} bits  {entry.relative_error:.4f}" for entry in worst]
    narrow = [weight for weight in prepared.plan.weights if weight.storage.reduced_from]
    if narrow:
        lines += ["", "blocks smaller than asked for, because rows are not a multiple of them"]
        lines += [f"  {w.name:<44} {w.storage.reduced_from} -> {w.storage.block}" for w in narrow[:WORST]]
        if len(narrow) > WORST:
            lines.append(f"  and {len(narrow) - WORST} more")
    return "\n".join(lines)


def _row(name: str, size_bytes: int) -> str:
    if size_bytes >= 1 << 20:
        return f"  {name:<44} {size_bytes / (1 << 20):>10.1f} MiB"
    return f"  {name:<44} {size_bytes / (1 << 10):>10.1f} KiB"
