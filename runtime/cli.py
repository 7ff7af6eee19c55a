"""Device-side sub-commands: devices, ask, serve. Arguments in, exit status out; the work is elsewhere."""

from __future__ import annotations

import argparse


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add every device-side sub-command."""
