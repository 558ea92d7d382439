"""Where a block's sites are, found by its structure: which module carries one, and how its tensor is read and written.

Rules, in the order in which they are applied:

1. **Attention and MLP.** The children of a block that hold weight matrices. There must be two: the one with query,
   key or value projections (or, in hybrids, a mixer by name) is the attention, the other the MLP. A block that keeps
   its MLP's two projections itself (OPT) has its MLP at the second of them.
2. **What is added to the stream.** The module's output; or the post-norm's output, where one follows (Gemma 2 and 3,
   OLMo 2); or output − residual, where the module's forward takes a parameter called `residual` (BLOOM, MPT's MLP);
   times `residual_multiplier`, where the block has one (Granite).
3. **Anything else is refused**, not guessed: further children with weights (cross-attention, per-layer inputs), an
   unknown post-norm, an unknown scale, a norm on the stream itself. `resid_pre` and `resid_post` need none of this
   and always work.
4. **Names cannot show everything.** `steerfast.models.proof` looks at a model once, with one short forward.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_QKV = re.compile(r"^(q|k|v|qkv|kv)(_|$)|^(query|key|value)(_|$)|qkv|^c_attn$", re.IGNORECASE)
MIXER = re.compile(r"attn|attention|mixer|mamba|ssm|conv|temporal", re.IGNORECASE)
_RECURRENT = re.compile(
    r"(^|[._])(conv|conv1d|A_log|dt|dt_bias|dt_proj|x_proj|in_proj|time|lambda|rg_lru|a_param)", re.IGNORECASE
)
_OUTPUT = re.compile(r"^(o|out|output|wo|dense|[oc]_proj|out_proj|out_lin)$")
NORM = re.compile(r"norm|^ln(_|$)|(_|^)ln\d*$", re.IGNORECASE)
_POST_MLP = re.compile(r"^post_(feedforward|feed_forward|mlp|ffn|ff)_(layernorm|layer_norm|norm)$")
_POST_ATTENTION = re.compile(r"^post_(self_attn|self_attention|operator|mixer)_(layernorm|layer_norm|norm)$")
_AMBIGUOUS = re.compile(
    r"^post_attention_(layernorm|layer_norm|norm)$"
)  # Llama: before the MLP; Gemma 2: after the attention
SCALE = re.compile(r"alpha|beta|scale|multiplier|factor")

# A block attribute with this value: a norm acts on the stream itself, so no module's output is what was added to it.
_STREAM_NORMS = {"do_layer_norm_before": False, "apply_residual_connection_post_layernorm": True}


@dataclass(frozen=True, eq=False)
class Point:
    """One place where the stream is read and written: a module, the side of it, and how its tensor is reached.

    Reading gives the site's tensor, (batch, tokens, width), except OPT's `mlp_out`, whose module sees (batch·tokens,
    width). A tensor that is read is the model's own: copy it before the hook returns (Falcon adds to its MLP's
    output in place).

    Attributes:
        module: the module that carries the hook.
        kind: "pre", the tensor is the module's first argument; "post", its output or the first item of its output.
        path: the module's dotted name inside the model.
        width: the size of the last dimension: d, or the attention's inner width for `head_out`.
        residual: index of the argument `residual` that the output contains and the site does not; None if there is
            none.
        scale: what the block multiplies the output with before it adds it to the stream.
    """

    module: nn.Module
    kind: Literal["pre", "post"]
    path: str
    width: int
    residual: int | None = None
    scale: float = 1.0

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Tensor:
        """Return the site's tensor, given what the module was called with and, if kind is "post", what it returned.

        Raises:
            NoStream: there is no tensor.
        """
        if self.kind == "pre":
            given = args[0] if args else kwargs.get(_first_parameter(self.module))
            return given if isinstance(given, Tensor) else self._refuse("is given", given)
        raw = self._first(output)
        if self.residual is not None:
            raw = raw - (args[self.residual] if self.residual < len(args) else kwargs["residual"])
        return raw if self.scale == 1.0 else raw * self.scale

    def write(self, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
        """Return the arguments `(args, kwargs)` or the output with the site's tensor replaced by `new`.

        Where the output is more than the site's tensor (a residual, a scale), the *difference* to the old value is
        added to it, so that a row which is not edited keeps its bits.
        """
        if self.kind == "pre":
            if args:
                return (new, *args[1:]), kwargs
            return args, {**kwargs, _first_parameter(self.module): new}
        if self.residual is not None or self.scale != 1.0:
            raw = self._first(output)
            delta = new - self.read(args, kwargs, output)
            new = raw + (delta if self.scale == 1.0 else delta / self.scale)
        if hasattr(output, "_fields"):  # a named tuple takes its fields one by one
            return type(output)(new, *output[1:])
        if isinstance(output, (tuple, list)):
            return type(output)((new, *output[1:]))
        return new

    def attach(self, fn: Callable[[Tensor], Tensor | None], *, prepend: bool = False) -> RemovableHandle:
        """Call `fn` with the site's tensor on every forward; what it returns, unless None, replaces the tensor.

        Args:
            fn: maps the site's tensor, (..., width), to its replacement of the same shape, or to None to leave it.
            prepend: run before the hooks that are already there, such as the capture of hidden states.
        """
        if self.kind == "pre":

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                new = fn(self.read(args, kwargs))
                return None if new is None else self.write(new, args, kwargs)

            return self.module.register_forward_pre_hook(before, prepend=prepend, with_kwargs=True)

        if self.residual is None and self.scale == 1.0:  # the common case: no arguments to look at, half the host time

            def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                if isinstance(output, Tensor):
                    return fn(output)
                new = fn(self._first(output))
                return None if new is None else self.write(new, args, {}, output)

            return self.module.register_forward_hook(after, prepend=prepend)

        def after_with_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            new = fn(self.read(args, kwargs, output))
            return None if new is None else self.write(new, args, kwargs, output)

        return self.module.register_forward_hook(after_with_arguments, prepend=prepend, with_kwargs=True)

    def _first(self, output: Any) -> Tensor:
        """What a module returned, or the first item of it."""
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        return first if isinstance(first, Tensor) else self._refuse("returns", first)

    def _refuse(self, what: str, found: Any) -> NoReturn:
        raise NoStream(self.path, what, f"a {type(found).__name__}")


class NoStream(TypeError):
    """A module passes on something else where a tensor is needed, such as an object that carries two streams.

    Attributes:
        kind: What it is.
    """

    def __init__(self, path: str, what: str, kind: str) -> None:
        super().__init__(
            f"{path} {what} {kind}; a tensor, or a tuple that begins with one, is needed to steer or read it"
        )
        self.kind = kind


class Unresolved(Exception):
    """Why a block's structure does not show a site."""


def has_matrix(module: nn.Module) -> bool:
    """Whether a module holds a matrix, a quantised or an offloaded one, too."""
    return any(p.ndim > 1 for p in module.parameters()) or any(_out_width(m) is not None for m in module.modules())


def _out_width(module: nn.Module) -> int | None:
    """Output width of a linear map (Linear, Conv1D, a quantised or adapted one), None for anything else."""
    for attribute in ("out_features", "outfeatures", "nf"):
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    return None


def _in_width(module: nn.Module) -> int | None:
    for attribute in ("in_features", "infeatures", "nx"):
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    weight = getattr(module, "weight", None)  # Conv1D names no input width; it keeps its weight as (in, out)
    return weight.shape[0] if isinstance(weight, Tensor) and hasattr(module, "nf") else None


def _first_parameter(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters))


def parts_of(block: nn.Module) -> tuple[str | None, str | None, list[str]]:
    """Names of the attention, the MLP (None where there is none, but not both) and the norms among the block's children."""
    norms: list[str] = []
    sublayers: list[str] = []
    linears: list[str] = []
    for name, child in block.named_children():
        if has_matrix(child):
            (linears if _out_width(child) is not None else sublayers).append(name)
        elif NORM.search(name):
            norms.append(name)
        elif any(True for _ in child.parameters()):
            raise Unresolved(f"the child {name!r} ({type(child).__name__}) is neither attention, MLP nor norm")
    attentions = [
        name
        for name in sublayers
        if any(_QKV.search(leaf.rpartition(".")[2]) for leaf, _ in block.get_submodule(name).named_modules())
    ]
    attentions = attentions or [name for name in sublayers if MIXER.search(name)]
    if len(sublayers) == 1 and not linears and attentions and not _attends(block.get_submodule(attentions[0])):
        return None, attentions[0], norms  # hybrids with one part a block (Nemotron-H): an MLP under a mixer's name
    mlps = [name for name in sublayers if name not in attentions]
    if not mlps and len(linears) == 2:
        mlps, linears = linears[1:], []
    if len(attentions) != 1 or len(mlps) > 1 or linears:
        raise Unresolved(
            f"expected one attention and one MLP among its children, found {', '.join(sublayers + linears) or 'none'}"
        )
    return attentions[0], mlps[0] if mlps else None, norms


def _attends(part: nn.Module) -> bool:
    """Whether a part has queries, or what a recurrence or a convolution over tokens has; an MLP has none of it."""
    names = [name for name, _ in part.named_parameters()]
    return any(_QKV.search(leaf) for name in names for leaf in name.split(".")) or any(map(_RECURRENT.search, names))


def post_norm(norms: list[str], *, mlp: bool) -> str | None:
    """Name of the norm between the attention (or the MLP) and the addition to the stream, None in pre-norm blocks."""
    after_mlp = [name for name in norms if _POST_MLP.match(name)]
    after_attention = [name for name in norms if _POST_ATTENTION.match(name)]
    ambiguous = [name for name in norms if _AMBIGUOUS.match(name)]
    unknown = [
        name for name in norms if name.startswith("post") and name not in after_mlp + after_attention + ambiguous
    ]
    if not after_attention and after_mlp:
        after_attention = ambiguous
    chosen = after_mlp if mlp else after_attention
    if unknown or len(chosen) > 1 or bool(after_mlp) != bool(after_attention):
        raise Unresolved(f"its norms ({', '.join(norms)}) follow no known order")
    return chosen[0] if chosen else None


def added_point(block: nn.Module, path: str, d: int, *, mlp: bool) -> Point:
    """The point whose tensor is what the attention, or the MLP, adds to the stream."""
    attention_name, mlp_name, norms = parts_of(block)
    name = mlp_name if mlp else attention_name
    if name is None:
        raise Unresolved(f"it has no {'MLP' if mlp else 'attention'} of its own")
    if extra := [key for key, value in (*block._parameters.items(), *block._buffers.items()) if value is not None]:
        raise Unresolved(f"it holds tensors of its own ({', '.join(extra)})")
    for attribute, value in vars(block).items():
        if _STREAM_NORMS.get(attribute) is value and isinstance(value, bool):
            raise Unresolved(f"{attribute}={value}: a norm acts on the stream itself")
        if isinstance(value, (int, float)) and SCALE.search(attribute) and attribute != "residual_multiplier":
            raise Unresolved(f"it scales by {attribute}={value}")
    scale = float(getattr(block, "residual_multiplier", 1.0))
    if post := post_norm(norms, mlp=mlp):
        return Point(block.get_submodule(post), "post", f"{path}.{post}", d, scale=scale)
    module = block.get_submodule(name)
    parameters = list(inspect.signature(module.forward).parameters)
    residual = parameters.index("residual") if "residual" in parameters else None
    return Point(module, "post", f"{path}.{name}", d, residual=residual, scale=scale)


def head_point(block: nn.Module, path: str, d: int) -> Point:
    """The point before the attention's output projection: its last map to width d that makes no query, key or value."""
    attention_name, _, _ = parts_of(block)
    if attention_name is None:
        raise Unresolved("it has no attention of its own")
    maps = [
        (name, module)
        for name, module in block.get_submodule(attention_name).named_modules()
        if _out_width(module) == d and not _QKV.search(name.rpartition(".")[2])
    ]
    named = [pair for pair in maps if _OUTPUT.match(pair[0].rpartition(".")[2])]
    if not named and len(maps) != 1:
        raise Unresolved(f"its attention ({attention_name}) shows {len(maps)} possible output projections of width {d}")
    name, module = (named or maps)[-1]
    width = _in_width(module)
    if width is None:
        raise Unresolved(f"the output projection {name!r} ({type(module).__name__}) does not tell its input width")
    return Point(module, "pre", f"{path}.{attention_name}.{name}", width)
