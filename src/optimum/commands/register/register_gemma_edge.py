"""Plugs `optimum-cli export gemma-edge` in.

Optimum imports every file of this namespace folder at start-up, so nothing heavy is imported here; the
folders on the way must have no __init__.py (PEP 420).
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class GemmaEdgeExportCommand(BaseOptimumCLICommand):
    """`optimum-cli export gemma-edge --model PATH|HUB_ID --device NAME OUT`"""

    COMMAND = CommandInfo(
        name="gemma-edge", help="Export a Gemma 4 text model to a bundle for one edge device."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        from gemma_edge.export.arguments import add_export_arguments

        add_export_arguments(parser, out_is_positional=True)

    def run(self) -> None:
        from gemma_edge.export import optimum_plugin
        from gemma_edge.runtime.errors import GemmaEdgeError

        try:
            sys.exit(optimum_plugin.run(self.args))
        except GemmaEdgeError as error:
            sys.exit(f"optimum-cli export gemma-edge: {error}")


REGISTER_COMMANDS = [(GemmaEdgeExportCommand, ExportCommand)]
