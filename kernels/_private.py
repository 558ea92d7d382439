"""What `_prepared.py` takes of Triton that is private to it, and whether this Triton has it.

Private to Triton, and the same in 3.6 and 3.9: the lines below with the names in them, `used_global_vals`, `pre_run_hooks` and
`native_specialize_impl`. Where one of them has another form, kernels are left as `triton.jit` makes them; and a key is used only
where Triton's own binder agrees with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
from triton.runtime import jit
from triton.runtime.jit import JITFunction

RUN = (
    "kernel_cache, kernel_key_cache, target, backend, binder = self.device_caches[device]",
    "bound_args, specialization, options = binder(*args, **kwargs)",
    "key = compute_cache_key(kernel_key_cache, specialization, options)",
    "in self.used_global_vals.items()",
    "knobs.compilation.instrumentation_mode",
    "for hook in self.pre_run_hooks",
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())",
)
"""What `JITFunction.run` must read like, whatever its line breaks, for a launch here to be a launch there."""

BIND = (
    "specialization.append(f'(\"constexpr\", {name})')",
    "specialize = 'False' if kp.do_not_specialize else 'True'",
    "align = 'False' if kp.do_not_specialize_on_alignment else 'True'",
    'ret = f"specialize_impl(backend, {name}, {is_const}, {specialize}, {align})"',
    "specialize_impl = native_specialize_impl",
)
"""The same of the function that makes binders."""

SETTINGS = ("debug", "add_stages_inspection_hook", "launch_enter_hook", "launch_exit_hook")

_public_run = JITFunction.run
_runtime, _compilation = triton.knobs.runtime, triton.knobs.compilation


def is_known(run: Callable[..., Any]) -> bool:
    """Whether this `JITFunction.run`, and what makes its binders, work as those that were read."""
    try:
        texts = [" ".join(inspect.getsource(one).split()) for one in (run, jit.create_function_from_signature)]
    except (OSError, TypeError, AttributeError):
        return False
    read = all(line in text for text, lines in zip(texts, (RUN, BIND), strict=True) for line in lines)
    return read and all(hasattr(_runtime, name) for name in SETTINGS)


def watched() -> bool:
    """Whether launches are more than launches now: a profiler, a debugger, or a test that records them."""
    return bool(
        JITFunction.run is not _public_run
        or _runtime.debug
        or _compilation.instrumentation_mode
        or _runtime.add_stages_inspection_hook is not None
        or _has_calls(_runtime.launch_enter_hook)
        or _has_calls(_runtime.launch_exit_hook)
    )


def _has_calls(hook: Any) -> bool:
    return bool(getattr(hook, "calls", hook))
