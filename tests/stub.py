"""A device without hardware: Triton compiles for it, loads nothing and hands every launch to a function of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

_LOADED = count(1)
Launched = Callable[[tuple[Any, ...]], object]


class _Utils:
    """What Triton asks of a driver beside launches."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[object, int, int, int, int]:
        return object(), next(_LOADED), 32, 0, 1024

    @staticmethod
    def unload_module(module: object) -> None:
        pass


class StubDriver:
    """A driver of one kind of GPU; the device and the stream are numbers that a test may change."""

    utils = _Utils

    def __init__(self, launched: Launched, target: GPUTarget | None = None) -> None:
        self.target = target or GPUTarget("cuda", 90, 32)
        self.device, self.stream = 0, 7

        class Launcher:
            """Stands where the C code of a launch stands."""

            def __init__(self, source: object, metadata: Any) -> None:
                pass

            def __call__(self, *launch: Any) -> None:
                launched(launch)

        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def stub_driver(launched: Launched) -> Iterator[StubDriver]:
    """Launches go to `launched`: x, y, z, stream, function, packed metadata, launch metadata, two hooks, arguments."""
    config = triton.runtime.driver
    before, made = config._active, StubDriver(launched)
    config.set_active(made)
    try:
        yield made
    finally:
        config._active = before
