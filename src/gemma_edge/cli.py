"""The `gemma-edge` command: finds the sub-command; knows nothing of what it does.

Device-side commands come from `runtime.cli`. `export` lives in its own package, which needs the `export`
extra, so it is imported only when it is asked for.
"""

from __future__ import annotations

import argparse
import logging
import sys

from . import __version__
from .runtime.errors import GemmaEdgeError


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Sub-commands set `run`: parsed arguments in, exit status out."""
    from .runtime import cli as runtime_cli

    parser = argparse.ArgumentParser(prog="gemma-edge", description="Gemma 4 on edge devices.")
    parser.add_argument("--version", action="version", version=f"gemma-edge {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log debug messages to stderr")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    runtime_cli.add_commands(commands)
    _add_export(commands)
    _add_verify(commands)
    return parser


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    # The arguments are declared without importing torch: `--help` and the device stay light.
    from .export import arguments

    export = commands.add_parser("export", help="turn a checkpoint into a bundle for one device")
    arguments.add_export_arguments(export)

    def run(args: argparse.Namespace) -> int:
        try:
            from .export import cli as export_cli
        except ImportError as error:
            raise _missing("export", error) from error
        return export_cli.run_export(args)

    export.set_defaults(run=run)


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from .export.verify import arguments

    verify = commands.add_parser("verify", help="measure a bundle against its checkpoint")
    arguments.add_verify_arguments(verify)

    def run(args: argparse.Namespace) -> int:
        try:
            from .export.verify import cli as verify_cli
        except ImportError as error:
            raise _missing("verify", error) from error
        return verify_cli.run_verify(args)

    verify.set_defaults(run=run)


def _missing(command: str, error: ImportError) -> GemmaEdgeError:
    return GemmaEdgeError(
        f"{command} needs a missing package ({error.name}): pip install 'gemma-edge[export]'"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command. Results go to stdout, logs and errors to stderr; the exit status is 0, 1 or 2."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        return args.run(args)
    except GemmaEdgeError as error:
        print(f"gemma-edge: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        print(
            "gemma-edge: onnxruntime is not installed: pip install 'gemma-edge[cpu]', or 'gemma-edge[cuda]' "
            "for an NVIDIA GPU (a Jetson: docs/install.md)",
            file=sys.stderr,
        )
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("gemma-edge: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
