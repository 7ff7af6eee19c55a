"""`python -m gemma_edge.examples.sensor_summary CONFIG`: the application, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from pathlib import Path

from ...runtime.errors import GemmaEdgeError
from .app import App
from .config import load_config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gemma_edge.examples.sensor_summary",
        description="Summaries of sensor readings, written by a gemma-edge daemon and checked.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file; see greenhouse.yaml")
    parser.add_argument("--check", action="store_true", help="only check the file")
    parser.add_argument("-v", "--verbose", action="store_true", help="log debug messages")
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        config = load_config(args.config)
        if args.check:
            print(f"{args.config}: {len(config.summaries)} summaries, all well")
            return 0
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        App(config, stop).run()
    except GemmaEdgeError as error:
        print(f"sensor-summary: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
