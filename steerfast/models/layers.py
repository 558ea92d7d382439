"""Where a model's residual stream can be read and written, found by structure in any architecture.

`find_layers(model)` returns the decoder blocks; `layers.point(layer, site)` says which module carries a site and how.

Rules, in the order in which they are applied:

1. **Blocks.** Below the text decoder (`model.get_decoder()`), the list of modules whose length is the text config's
   number of hidden layers and whose items are blocks (they hold modules of their own); a list inside another such
   list is not one.
2. **Attention and MLP.** The children of a block that hold weight matrices. There must be two: the one with query,
   key or value projections (or, in hybrids, a mixer by name) is the attention, the other the MLP. A block that keeps
   its MLP's two projections itself (OPT) has its MLP at the second of them.
3. **What is added to the stream.** The module's output; or the post-norm's output, where one follows (Gemma 2 and 3,
   OLMo 2); or output − residual, where the module's forward takes a parameter called `residual` (BLOOM, MPT's MLP);
   times `residual_multiplier`, where the block has one (Granite).
4. **Anything else is refused**, not guessed: further children with weights (cross-attention, per-layer inputs), an
   unknown post-norm, an unknown scale, a norm on the stream itself. `resid_pre` and `resid_post` need none of this
   and always work.
5. **Names cannot show everything.** `verify_sites` proves the sites of a given model with one short forward.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

IDS = ((5, 6, 7), (5, 6, 8))
"""What a short forward reads: two rows of three tokens, so that axes tell each other apart; the rows differ in the last."""
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_out")

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
        """Return the site's tensor, given what the module was called with and, if kind is "post", what it returned."""
        if self.kind == "pre":
            return args[0] if args else kwargs[_first_parameter(self.module)]
        raw = output[0] if isinstance(output, (tuple, list)) else output
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
            raw = output[0] if isinstance(output, (tuple, list)) else output
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
                new = fn(output[0])
                return None if new is None else self.write(new, args, {}, output)

            return self.module.register_forward_hook(after, prepend=prepend)

        def after_with_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            new = fn(self.read(args, kwargs, output))
            return None if new is None else self.write(new, args, kwargs, output)

        return self.module.register_forward_hook(after_with_arguments, prepend=prepend, with_kwargs=True)


@dataclass(frozen=True, eq=False)
class Layers:
    """The decoder blocks of one model.

    Attributes:
        blocks: the modules, first to last.
        path: dotted name of their list inside the model, such as "model.layers".
        d: width of the residual stream.
        name: class name of the model, for messages and files.
    """

    blocks: tuple[nn.Module, ...] = field(repr=False)
    path: str
    d: int
    name: str

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def count(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    def resolve(self, layer: SupportsIndex, caller: str = "steer") -> int:
        """Return the 0-based index of `layer`, which may count from the end.

        Raises:
            TypeError: `layer` is not an integer.
            ValueError: there is no such layer; the text begins with `caller`.
        """
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise TypeError(f"{caller}: a layer is an integer, 0 to {self.count - 1}, got {layer!r}")
        index = layer.__index__()
        if not -self.count <= index < self.count:
            raise ValueError(
                f"{caller}: layer {index} is out of range; "
                f"this model ({self.name}) has {self.count} layers, 0 to {self.count - 1}"
            )
        return index % self.count

    def point(self, layer: SupportsIndex, site: str = "resid_post", caller: str = "steer") -> Point:
        """Return where `site` of `layer` is read and written.

        Args:
            layer: 0-based, negative from the end.
            site: "resid_pre", "resid_post", "attn_out", "mlp_out" or "head_out".
            caller: the public function that asks, for its messages.

        Raises:
            ValueError: no such layer or site, or the block's structure does not show where the site is.
        """
        index = self.resolve(layer, caller)
        block, path = self.blocks[index], f"{self.path}.{index}"
        if site == "resid_pre":
            return Point(block, "pre", path, self.d)
        if site == "resid_post":
            return Point(block, "post", path, self.d)
        if site not in SITES:
            raise ValueError(f"{caller}: unknown site {site!r}; the sites are {', '.join(SITES)}")
        try:
            if site == "head_out":
                return _head_point(block, path, self.d)
            return _added_point(block, path, self.d, mlp=site == "mlp_out")
        except Unresolved as reason:
            raise ValueError(
                f"{caller}: cannot locate site {site!r} of layer {index} in a {type(block).__name__} ({self.name}): "
                f"{reason}; use resid_pre or resid_post, which every block has"
            ) from None


def find_layers(model: nn.Module, caller: str = "steer") -> Layers:
    """Return the decoder blocks of a `transformers` model, found by structure and never by class name.

    Args:
        model: a causal language model, its base model, or a multimodal model with a nested text decoder.
        caller: the public function that asks, for its messages.

    Raises:
        TypeError: `model` is not a module with a `transformers` config.
        ValueError: no list of blocks, or more than one, has the length the config says.

    Example:
        >>> layers = find_layers(model)
        >>> layers.path, layers.count, layers.d
        ('model.layers', 30, 576)
    """
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "get_text_config"):
        inside = next(
            (name for name in ("module", "original_model") if isinstance(_within(model, name), nn.Module)), None
        )
        hint = f"; it wraps one: pass its .{inside}" if inside else ""
        raise TypeError(
            f"{caller}: model must be a transformers model (a torch module with a config), got {type(model).__name__}{hint}"
        )
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    whole: Any = model.config
    config, name = whole.get_text_config(decoder=True), type(model).__name__
    if getattr(whole, "is_encoder_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"{caller}: {name} is an encoder-decoder; only decoders can be steered or read")
    count = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    if count is None:
        raise ValueError(f"{caller}: the config of {name} does not say how many blocks it has (num_hidden_layers)")
    for root in _decoder_roots(model):
        lists = _block_lists(root, count)
        if len(lists) == 1:
            path = next(path for path, module in model.named_modules() if module is lists[0])
            return Layers(tuple(lists[0]), path, config.hidden_size, name)
        if lists:
            paths = [path for path, module in model.named_modules() if any(module is found for found in lists)]
            raise ValueError(
                f"{caller}: {name} has {len(lists)} lists of {count} blocks ({', '.join(paths)}); "
                f"cannot tell which is the decoder"
            )
    calls = _most_calls(model)
    if calls > 1:
        raise ValueError(
            f"{caller}: {name} is looped: it runs a block {calls} times in one pass, and an edit would act each time"
        )
    raise ValueError(
        f"{caller}: {name} holds no list of {count} decoder blocks (its config's num_hidden_layers); is it a decoder?"
    )


def read_ids(model: nn.Module, *modules: Any) -> bool:
    """Run the first of some modules that takes plain token ids, (2, 3) of them; whether one did."""
    device = next(model.parameters()).device
    ids = torch.tensor(IDS, device=torch.device("cpu") if device.type == "meta" else device)
    for module in modules:
        try:
            with evaluating(model):
                module(input_ids=ids, use_cache=False)
        except Exception:
            continue
        return True
    return False


def _within(model: Any, name: str) -> Any:
    """What a wrapper (DistributedDataParallel, a TransformerLens bridge) holds under a name."""
    return getattr(model, name, None) if isinstance(model, nn.Module) else None


def _most_calls(model: nn.Module) -> int:
    """How often one pass runs the block that it runs most, in lists of any length."""
    calls: dict[nn.Module, int] = {}

    def count(module: nn.Module, args: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    blocks = {item for items in lists for item in items if _is_block(item)}
    handles = [block.register_forward_hook(count) for block in blocks]
    try:
        read_ids(model, model)
    finally:
        for handle in handles:
            handle.remove()
    return max(calls.values(), default=0)


def verify_sites(
    model: nn.Module, input_ids: Tensor, layers: Iterable[int] | None = None, caller: str = "check"
) -> None:
    """Run one forward and check that the sites are what they are said to be.

        attn_out + mlp_out = resid_post − resid_pre

    The rules read names and structure; what a block computes beyond them (a norm on the stream, as in the first GPT, or
    a bias added in passing) only a forward shows. Call it once for a family that the tests do not list.

    Args:
        model: a `transformers` causal language model, not steered.
        input_ids: int64 (batch, tokens); a handful of tokens will do.
        layers: which layers, all by default.
        caller: the public function that asks, for its messages.

    Raises:
        ValueError: a site cannot be located, or the sum differs by more than the rounding of its terms.

    Example:
        >>> verify_sites(model, tokenizer("A few words", return_tensors="pt").input_ids)
    """
    found = find_layers(model, caller)
    sites = ("attn_out", "mlp_out", "resid_pre", "resid_post")
    seen: dict[tuple[int, str], Tensor] = {}
    handles = []
    try:
        for layer in range(len(found)) if layers is None else [found.resolve(layer, caller) for layer in layers]:
            for site in sites:
                keep = partial(_keep, seen, (layer, site))
                handles.append(found.point(layer, site, caller).attach(keep))
        with evaluating(model):
            model(input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer in sorted({layer for layer, _ in seen}):
        attn, mlp, pre, post = (seen[layer, site].reshape(seen[layer, "resid_post"].shape) for site in sites)
        rounding = 16 * torch.finfo(post.dtype).eps * (attn.abs() + mlp.abs() + pre.abs() + post.abs()).float()
        error = (attn.float() + mlp.float() - (post.float() - pre.float())).abs()
        if not bool((error <= rounding).all()):
            raise ValueError(
                f"{caller}: attn_out + mlp_out differs from resid_post - resid_pre by {float(error.max()):.3g} in "
                f"layer {layer}, a {type(found.blocks[layer]).__name__} ({found.name}); "
                f"use resid_pre or resid_post in this model"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; each module's own training flag comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def stream_storage(block: nn.Module, model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """dtype and device of the stream at a block."""
    for parameter in block.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            device: Any = parameter.device
            if device.type == "meta":  # accelerate keeps the weights elsewhere until the block runs
                device = getattr(getattr(block, "_hf_hook", None), "execution_device", None)
                if device is None:
                    raise ValueError(f"steer: {type(model).__name__} has weights on the meta device; load them first")
            return parameter.dtype, torch.device(device)
    raise ValueError(
        f"steer: {type(block).__name__} of {type(model).__name__} holds no floating parameter that shows the stream's dtype"
    )


def _keep(seen: dict[tuple[int, str], Tensor], key: tuple[int, str], x: Tensor) -> None:
    seen[key] = x.clone()


class Unresolved(Exception):
    """Why a block's structure does not show a site."""


def _decoder_roots(model: Any) -> Iterator[nn.Module]:
    """The modules to search, from the most specific to the whole."""
    if hasattr(model, "get_decoder"):
        decoder = model.get_decoder()
        if isinstance(decoder, nn.Module):
            yield decoder
    yield getattr(model, "base_model", model)
    yield model


def _block_lists(root: nn.Module, count: int) -> list[nn.ModuleList]:
    """Outermost lists of `count` blocks below `root`; a block holds modules, and matrices, of its own."""
    found: list[nn.ModuleList] = []

    def search(module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList) and len(module) == count and all(_is_block(item) for item in module):
            found.append(module)
            return
        for child in module.children():
            search(child)

    search(root)
    return found


def _is_block(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and _has_matrix(module)


def _has_matrix(module: nn.Module) -> bool:
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


def _parts(block: nn.Module) -> tuple[str | None, str | None, list[str]]:
    """Names of the attention, the MLP (None where there is none, but not both) and the norms among the block's children."""
    norms: list[str] = []
    sublayers: list[str] = []
    linears: list[str] = []
    for name, child in block.named_children():
        if _has_matrix(child):
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


def _added_point(block: nn.Module, path: str, d: int, *, mlp: bool) -> Point:
    """The point whose tensor is what the attention, or the MLP, adds to the stream."""
    attention_name, mlp_name, norms = _parts(block)
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


def _head_point(block: nn.Module, path: str, d: int) -> Point:
    """The point before the attention's output projection: its last map to width d that makes no query, key or value."""
    attention_name, _, _ = _parts(block)
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
