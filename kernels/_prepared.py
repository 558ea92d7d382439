"""Launches without what Triton does anew each time: its own key of a launch leads straight to the kernel compiled for it.

`kernel[grid](...)` of Triton binds the arguments, finds what each is specialised on (a dtype, the alignment of a pointer, a
size of 1 or a multiple of 16, None, the value of a constant), finds the compiled kernel by that and by the options, and besides
reads settings from the environment, compares globals one by one and builds records for profilers. Here binding and key are
Triton's own functions, so that a key means what it means to Triton; the rest is left out. What Triton has not compiled yet goes
its public way, and so does every launch while something watches, changes or replaces launches.

Private to Triton, and the same in 3.6 and 3.9: the lines of `JITFunction.run` below with the names in them, `used_global_vals`
and `pre_run_hooks`. Where one of them has another form, kernels are left as `triton.jit` makes them.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

LINES = (
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

SETTINGS = ("debug", "add_stages_inspection_hook", "launch_enter_hook", "launch_exit_hook")

_public_run = JITFunction.run
_driver, _runtime, _compilation = triton.runtime.driver, triton.knobs.runtime, triton.knobs.compilation


def kernel(**how: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` with these arguments, for a kernel that a launcher starts; Triton's interpreter gets what it always gets."""

    def made(function: Callable[..., Any]) -> Any:
        jitted = triton.jit(**how)(function)
        return Kernel(jitted) if type(jitted) is JITFunction and is_known(JITFunction.run) else jitted

    return made


def is_known(run: Callable[..., Any]) -> bool:
    """Whether this `JITFunction.run` launches as the one that was read."""
    try:
        text = " ".join(inspect.getsource(run).split())
    except (OSError, TypeError):
        return False
    return all(line in text for line in LINES) and all(hasattr(_runtime, name) for name in SETTINGS)


class Kernel:
    """A kernel that is launched as Triton's are, `kernel[grid](...)`, and has their attributes. It keeps no tensor."""

    def __init__(self, jitted: JITFunction[Any]) -> None:
        self._jitted = jitted
        self._on: dict[int, _OnDevice] = {}
        self._globals: list[tuple[Callable[[Any], Any], dict[str, Any], Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "_jitted":  # of a copy that is not made yet
            raise AttributeError(name)
        return getattr(self._jitted, name)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return partial(self._launch, grid)

    def _launch(self, grid: Any, /, *args: Any, **kwargs: Any) -> Any:
        jitted = self._jitted
        if type(grid) is not tuple or jitted.pre_run_hooks or _watched():
            return jitted.run(*args, grid=grid, warmup=False, **kwargs)
        driver = _driver.active
        device = driver.get_current_device()
        caches, on = jitted.device_caches[device], self._on.get(device)
        if on is None or on.caches is not caches:
            on = self._on[device] = _OnDevice(caches, {})
        bound, special, options = caches[-1](*args, **kwargs)
        key = (tuple(special), str(options))
        found = on.compiled.get(key)
        if found is None or not self._as_compiled():
            return self._by_triton(on.compiled, key, grid, args, kwargs)
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.get_current_stream(device)
        found.run(x, y, z, stream, found.function, found.packed_metadata, None, None, None, *bound.values())
        return found

    def _by_triton(self, compiled: dict[Any, Any], key: Any, grid: Any, args: Any, kwargs: Any) -> Any:
        """A launch of Triton's own, whose kernel is kept for the next one; not while it is still being compiled."""
        found = self._jitted.run(*args, grid=grid, warmup=False, **kwargs)
        if isinstance(found, CompiledKernel):
            self._globals = _globals_of(self._jitted)
            compiled[key] = found
        return found

    def _as_compiled(self) -> bool:
        """Whether the globals that a kernel uses are what they were; Triton itself tells what has changed."""
        return not any(map(_has_changed, self._globals))


class _OnDevice(NamedTuple):
    """What was launched on a device: good as long as Triton's own caches are these."""

    caches: tuple[Any, ...]
    compiled: dict[Any, CompiledKernel]


def _globals_of(jitted: JITFunction[Any]) -> list[tuple[Callable[[Any], Any], dict[str, Any], Any]]:
    """(how to read, where, what was read) of the globals that a kernel and the functions in it use."""
    scopes: dict[int, dict[str, Any]] = {}
    names: dict[int, list[str]] = defaultdict(list)
    for (name, _), (_, scope) in jitted.used_global_vals.items():
        scopes[id(scope)] = scope
        names[id(scope)].append(name)
    # the first name twice: of one name alone an itemgetter makes no tuple, whose comparison begins with identity
    readers = [(itemgetter(*names[place], names[place][0]), scope) for place, scope in scopes.items()]
    return [(of, scope, of(scope)) for of, scope in readers]


def _has_changed(read: tuple[Callable[[Any], Any], dict[str, Any], Any]) -> bool:
    of, scope, values = read
    return bool(of(scope) != values)


def _watched() -> bool:
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
