"""Device-side sub-commands: devices, prepare, ask, serve. Arguments in, status out; the work is elsewhere."""

from __future__ import annotations

import argparse

from . import ask, detect, serve, start


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add every device-side sub-command. Importing these modules is cheap: they load the engine when run."""
    devices = commands.add_parser("devices", help="list device profiles, or find the one of this machine")
    detect.add_devices_arguments(devices)
    devices.set_defaults(run=detect.run_devices)

    prepare = commands.add_parser("prepare", help="pack a bundle's weights for this CPU, once")
    start.add_prepare_arguments(prepare)
    prepare.set_defaults(run=start.run_prepare)

    one = commands.add_parser("ask", help="ask a bundle one question and stream the answer")
    ask.add_ask_arguments(one)
    one.set_defaults(run=ask.run_ask)

    daemon = commands.add_parser("serve", help="run the daemon: HTTP on a unix socket, MQTT")
    serve.add_serve_arguments(daemon)
    daemon.set_defaults(run=serve.run_serve)
