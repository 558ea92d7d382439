"""Functions that numba compiles when their module is imported, and keeps in a folder for later processes."""

from __future__ import annotations

import hashlib
import linecache
import warnings
from collections.abc import Callable
from typing import Any

from llvmlite import binding
from numba import config, njit
from numba.core.errors import NumbaError

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

_PROCESSOR = (
    config.CPU_NAME,
    config.CPU_FEATURES,
    binding.get_host_cpu_name(),
    binding.get_host_cpu_features().flatten(),
)


def compiled(
    signatures: list[Any], constants: tuple[float, ...], sources: tuple[str, ...], **options: Any
) -> Callable[[Any], Any]:
    """Compile a function for these signatures, or read what was compiled.

    Its files have a name of their own for each processor, for each text of its module and of the sources beside it, and for the
    constants that these take from others. Of two processes that write to one name at once, numba may file the code of one
    under the other, or show a third one what was there before.
    """

    def compile_now(function: Any) -> Any:
        text = [linecache.getlines(source) for source in (function.__code__.co_filename, *sources)]
        name = hashlib.sha256(repr((_PROCESSOR, text, constants)).encode()).hexdigest()[:16]
        function.__qualname__ = f"{function.__qualname__}_{name}"
        try:
            return njit(signatures, cache=True, **options)(function)
        except (RuntimeError, NumbaError):  # no folder can be written; what does not compile says so once more
            pass
        except Exception as error:  # whatever a damaged file or a full disk does
            warnings.warn(
                f"steerfast: numba cannot use its folder of compiled code ({type(error).__name__}: {error}); until it can, every "
                f"process compiles anew, which takes seconds. Delete the files *{name}* in NUMBA_CACHE_DIR, in __pycache__ "
                f"beside {function.__code__.co_filename} or in numba's folder of the user",
                RuntimeWarning,
                stacklevel=2,
            )
        return njit(signatures, **options)(function)

    return compile_now
