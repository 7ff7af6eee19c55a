#!/bin/sh
# Install the CPU build of torch into a virtual environment, once. Usage: install_torch.sh PYTHON VERSION
#
# On Linux the build that PyPI serves for x86-64 brings CUDA along, several gigabytes of it, which export does not
# need. So, in this order: TORCH_INDEX if it is set; a CPU wheel from wherever pip is configured to look; the CPU
# wheels of pytorch.org; and only then PyPI's build, with a warning.
set -eu

python=$1
version=$2
pip() { "$python" -m pip --disable-pip-version-check install --quiet --quiet "$@"; }

if "$python" -c "import torch" 2>/dev/null; then
    exit 0
fi
if [ -n "${TORCH_INDEX:-}" ]; then
    pip --index-url "$TORCH_INDEX" "torch==$version"
elif [ "$(uname -s)" != Linux ]; then
    pip "torch==$version" # elsewhere PyPI's builds are small
elif pip "torch==$version+cpu" 2>/dev/null; then
    :
elif pip --retries 1 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu" 2>/dev/null; then
    :
else
    echo "warning: no CPU build of torch $version could be had; installing PyPI's, which may take several GB" >&2
    echo "         (to use another index: make setup TORCH_INDEX=https://...)" >&2
    pip "torch==$version"
fi
