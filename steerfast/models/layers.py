"""The decoder blocks of a model, found by structure in any architecture.

`find_layers(model)` returns them: below the text decoder (`model.get_decoder()`), the list of modules whose length is the text
config's number of hidden layers and whose items are blocks (they hold modules of their own); a list inside another such
list is not one. `layers.point(layer, site)` says which module carries a site and how (see `steerfast.models.points`).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from traceback import walk_tb
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from steerfast.place import SITES

from .points import Point, Unresolved, added_point, has_matrix, head_point

IDS = ((5, 6, 7), (5, 6, 8))
"""What a short forward reads: two rows of three tokens, so that axes tell each other apart; the rows differ in the last."""
_STREAMS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_UNFIT = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of a model that is given token ids and wants something else."""
_MACHINE = re.compile(
    r"out of memory|not enough memory|allocate memory|(cuda|hip|nccl|cublas|cudnn) error", re.IGNORECASE
)
_looking = threading.local()


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
                return head_point(block, path, self.d)
            return added_point(block, path, self.d, mlp=site == "mlp_out")
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
    inside = next((name for name in ("module", "original_model") if isinstance(_within(model, name), nn.Module)), None)
    has_config = isinstance(model, nn.Module) and hasattr(getattr(model, "config", None), "get_text_config")
    if not has_config or inside == "original_model":  # a bridge shows the config of what it wraps, and another forward
        hint = f"; it wraps one: pass its .{inside}" if inside else ""
        raise TypeError(
            f"{caller}: model must be a transformers model (a torch module with a config), got {type(model).__name__}{hint}"
        )
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    whole: Any = model.config
    config, name = whole.get_text_config(decoder=True), class_name(model)
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
    calls = _most_calls(model, caller)
    if calls > 1:
        raise ValueError(
            f"{caller}: {name} is looped: it runs a block {calls} times in one pass, and an edit would act each time"
        )
    raise ValueError(
        f"{caller}: {name} holds no list of {count} decoder blocks (its config's num_hidden_layers); is it a decoder?"
    )


def class_name(model: nn.Module) -> str:
    """The name of a model's class, which `fully_shard` does not change: it puts a class of its own in front."""
    kind = type(model)
    return kind.__bases__[-1].__name__ if "unshard" in vars(kind.__bases__[0]) else kind.__name__


def read_ids(model: nn.Module, modules: Sequence[Any], caller: str) -> bool:
    """Run the first of some modules that takes plain token ids, (2, 3) of them; whether one did.

    Raises:
        RuntimeError: hooks of steerfast stand on them already, and refuse this pass.
        Exception: an error that does not say that they take none: no memory, a device's own, a run that a hook stopped.
    """
    ids = torch.tensor(IDS, device=home(model))
    for module in modules:
        try:
            with evaluating(model), _look():
                module(input_ids=ids, use_cache=False)
        except _UNFIT as error:
            if may_pass(error):
                raise
            if is_ours(error):
                raise RuntimeError(
                    f"{caller}: the short forward that shows what {class_name(model)} does was refused ({error}); remove "
                    "the handle that steers it first"
                ) from error
            continue
        return True
    return False


@contextmanager
def _look() -> Iterator[None]:
    before, _looking.on = is_looking(), True
    try:
        yield
    finally:
        _looking.on = before


def is_looking() -> bool:
    """Whether this thread runs a short forward: it shows a model as it is, whoever steers the same blocks by another name."""
    return getattr(_looking, "on", False)


def may_pass(error: BaseException) -> bool:
    """Whether an error is the machine's and no fault of what was run: another time it may not come."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _MACHINE.search(str(error)) is not None
    )


def is_ours(error: BaseException) -> bool:
    """Whether a hook of steerfast raised an error, and not the module that it stands on."""
    for frame, _ in reversed(list(walk_tb(error.__traceback__))):
        name = str(frame.f_globals.get("__name__"))
        if name == nn.Module.__module__:
            return False
        if name.partition(".")[0] == "steerfast":
            return True
    return False


def refuse_unloaded(model: nn.Module, layers: Layers, caller: str) -> None:
    """Refuse blocks without weights, unless accelerate brings those before a block runs.

    Raises:
        ValueError: weights are on the meta device.
    """
    meta = any(parameter.is_meta for block in layers.blocks for parameter in block.parameters())
    if meta and not any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(f"{caller}: {layers.name} has weights on the meta device; load them first")


def is_distributed(tensor: Any) -> bool:
    """Whether something is a tensor of `torch.distributed.tensor`, which holds a part of its values in each process."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def gathers_weights(model: nn.Module) -> bool:
    """Whether FSDP keeps a model's weights in parts and gathers them for each pass: `fully_shard`, or FSDP1 before it."""
    return any(
        hasattr(type(module), "unshard") or "_is_fsdp_managed_module" in vars(module) for module in model.modules()
    )


def refuse_flat(model: nn.Module, caller: str) -> None:
    """Refuse FSDP1, whose wrapper shows flat weights and has no `generate` that gathers them.

    Raises:
        TypeError: the model is such a wrapper.
    """
    if "_fsdp_wrapped_module" in model._modules:
        raise TypeError(
            f"{caller}: {type(model).__name__} (FSDP1) keeps flat weights, and its generate does not gather them; use FSDP2, "
            "torch.distributed.fsdp.fully_shard"
        )


def _within(model: Any, name: str) -> Any:
    """What a wrapper (DistributedDataParallel, a TransformerLens bridge) holds under a name."""
    return getattr(model, name, None) if isinstance(model, nn.Module) else None


def _most_calls(model: nn.Module, caller: str) -> int:
    """How often one pass runs the block that it runs most, in lists of any length."""
    calls: dict[nn.Module, int] = {}

    def count(module: nn.Module, args: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    blocks = {item for items in lists for item in items if _is_block(item)}
    handles = [block.register_forward_hook(count) for block in blocks]
    try:
        read_ids(model, [model], caller)
    finally:
        for handle in handles:
            handle.remove()
    return max(calls.values(), default=0)


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
    parameters, name, _ = telling_weight(block, model)
    parameter = parameters[name]
    device = _brought_to(block) if parameter.is_meta else parameter.device
    if device is None:
        raise ValueError(f"steer: {type(model).__name__} has weights on the meta device; load them first")
    return parameter.dtype, device


def telling_weight(block: nn.Module, model: nn.Module) -> tuple[dict[str, nn.Parameter], str, str]:
    """Where the parameter of a block lies that shows the stream's dtype: its module's parameters, its name, its module's path."""
    for path, module in block.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype in _STREAMS:
                return module._parameters, name, path
    raise ValueError(
        f"steer: {type(block).__name__} of {type(model).__name__} holds no floating parameter that shows the stream's dtype"
    )


def home(module: nn.Module) -> torch.device:
    """Where a module, such as a whole model, takes its inputs."""
    first = next(module.parameters())
    return (_brought_to(module) or torch.device("cpu")) if first.is_meta else first.device


def _brought_to(module: nn.Module) -> torch.device | None:
    """Where accelerate brings weights that it keeps elsewhere until a part of a module runs; None: nowhere."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device: Any = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def steered_by_row(model: Any) -> bool:
    """Whether the rows of a batch have plans, positions or lengths of their own, or are read: their order then counts."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(getattr(getattr(hook, "__self__", None), "by_row", False) for hook in hooks)


def refuse_rows(model: Any, caller: str) -> None:
    """Refuse a model whose rows have plans of their own, where texts are put into batches here.

    Raises:
        ValueError: it is such a model.
    """
    if steered_by_row(model):
        raise ValueError(
            f"{caller}: the model is steered or read row by row (a plan, a mask or a prompt_length for each row), and here texts "
            "are put into batches of their own; remove that handle first"
        )


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
    return any(True for _ in module.children()) and has_matrix(module)
