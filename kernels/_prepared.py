"""Launches without what Triton does anew each time: its own key of a launch leads straight to the kernel compiled for it.

`kernel[grid](...)` of Triton binds the arguments, finds what each is specialised on (a dtype, the alignment of a pointer, a
size of 1 or a multiple of 16, None, the value of a constant), finds the compiled kernel by that and by the options, and besides
reads settings from the environment, compares globals one by one and builds records for profilers. Here an argument is
specialised by Triton's own function, so that a key means what it means to Triton; the binding is one function without a
dictionary, and the rest is left out. What Triton has not compiled yet goes its public way, and so does every launch while
something watches, changes or replaces launches.
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
from triton.runtime import jit
from triton.runtime.jit import JITFunction

from ._private import is_known, watched

_driver = triton.runtime.driver


def kernel(**how: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` with these arguments, for a kernel that a launcher starts; Triton's interpreter gets what it always gets."""

    def made(function: Callable[..., Any]) -> Any:
        jitted = triton.jit(**how)(function)
        known = type(jitted) is JITFunction and is_known(JITFunction.run) and _is_plain(jitted)
        return Kernel(jitted) if known else jitted

    return made


def _is_plain(jitted: JITFunction[Any]) -> bool:
    """Whether every parameter has a name and no declared type."""
    kinds = {parameter.kind for parameter in jitted.signature.parameters.values()}
    return kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD} and not any(p.annotation_type for p in jitted.params)


class Kernel:
    """A kernel that is launched as Triton's are, `kernel[grid](...)`, and has their attributes. It keeps no tensor."""

    def __init__(self, jitted: JITFunction[Any]) -> None:
        self._jitted = jitted
        self._on: dict[int, _OnDevice] = {}
        self._globals: list[tuple[Callable[[Any], Any], dict[str, Any], Any]] = []
        self._start = _starter(jitted, self._here, self._launch, self._publicly)

    def __getattr__(self, name: str) -> Any:
        if name == "_jitted":  # of a copy that is not made yet
            raise AttributeError(name)
        return getattr(self._jitted, name)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return partial(self._start, grid)

    def _here(self) -> _OnDevice | None:
        """What is known of the current device; None where launches are Triton's business alone."""
        if self._jitted.pre_run_hooks or watched():
            return None
        device = _driver.active.get_current_device()
        caches, on = self._jitted.device_caches[device], self._on.get(device)
        if on is None or on.caches is not caches:
            on = self._on[device] = _OnDevice(device, caches, caches[3], {})
        return on

    def _launch(self, on: _OnDevice, grid: Any, special: tuple[Any, ...], options: dict[str, Any], values: Any) -> Any:
        key = (special, str(options))
        found = on.compiled.get(key)
        if found is None or type(grid) is not tuple or any(map(_has_changed, self._globals)):
            return self._by_triton(on, key, grid, options, values)
        x, y, z = (*grid, 1, 1)[:3]
        stream = _driver.active.get_current_stream(on.device)
        found.run(x, y, z, stream, found.function, found.packed_metadata, None, None, None, *values)
        return found

    def _by_triton(self, on: _OnDevice, key: tuple[Any, str], grid: Any, options: dict[str, Any], values: Any) -> Any:
        """A launch of Triton's own, whose kernel is kept for the next one; not while it is still being compiled."""
        found = self._publicly(grid, options, values)
        if isinstance(found, CompiledKernel) and tuple(on.caches[-1](*values, **options)[1]) == key[0]:
            self._globals = _globals_of(self._jitted)
            on.compiled[key] = found
        return found

    def _publicly(self, grid: Any, options: dict[str, Any], values: Any) -> Any:
        arguments = dict(zip(self._jitted.arg_names, values, strict=True))  # by name, as launchers give them
        return self._jitted.run(grid=grid, warmup=False, **arguments, **options)


class _OnDevice(NamedTuple):
    """What was launched on a device: good as long as Triton's own caches are these."""

    device: int
    caches: tuple[Any, ...]
    backend: Any
    compiled: dict[Any, CompiledKernel]


def _starter(jitted: JITFunction[Any], here: Any, launch: Any, publicly: Any) -> Callable[..., Any]:
    """A function of a grid, the kernel's parameters and options, which binds as a call of Python does.

    Triton writes such a function for each kernel, too; this one makes neither a dictionary of the arguments nor one of those
    that were given by name.
    """
    parameters, special, names = [], [], []
    for one, declared in zip(jitted.params, jitted.signature.parameters.values(), strict=True):
        has_default = declared.default is not inspect.Parameter.empty
        names.append(one.name)
        parameters.append(f"{one.name}=_defaults['{one.name}']" if has_default else one.name)
        how = f"{bool(one.is_const)}, {not one.do_not_specialize}, {not one.do_not_specialize_on_alignment}"
        by_value = f"_specialise(_on.backend, {one.name}, {how})"
        special.append(f"('constexpr', {one.name})" if one.is_constexpr else by_value)
    values = f"({', '.join(names)},)"
    source = (
        f"def start(_grid, {', '.join(parameters)}, **_options):\n"
        f"    _on = _here()\n"
        f"    if _on is None:\n"
        f"        return _publicly(_grid, _options, {values})\n"
        f"    return _launch(_on, _grid, ({', '.join(special)},), _options, {values})\n"
    )
    scope: dict[str, Any] = {
        "_here": here, "_launch": launch, "_publicly": publicly, "_specialise": jit.native_specialize_impl,
        "_defaults": {name: declared.default for name, declared in jitted.signature.parameters.items()},
    }  # fmt: skip
    exec(source, scope)
    started: Callable[..., Any] = scope["start"]
    return started


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
