"""Packs one graph's weights into a file, as a process: `python -m gemma_edge.runtime.pack GRAPH FOLDER`.

ONNX Runtime does it within one call that nothing interrupts, so it runs where it can be killed; what memory
it took is given back.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from pathlib import Path

import onnxruntime as ort

_PR_SET_PDEATHSIG = 1

# Of InferenceSession: what it writes, and that packed weights are part of it.
_SAVE = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}


def pack(graph: Path, folder: Path) -> None:
    """Write `graph`, optimized, and all its weights, packed for this CPU, into `folder`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # packing uses one
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / graph.name)
    for key, value in _SAVE.items():
        options.add_session_config_entry(key, value)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", graph.name + ".data"
    )
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # dies at once, in the middle of the call
    with contextlib.suppress(AttributeError, OSError):  # and with its parent, on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        pack(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as cause:  # onnxruntime raises many classes, all derived from Exception alone
        sys.exit(str(cause))


if __name__ == "__main__":
    main()
