"""Where in a model something is read or steered: a site of a layer."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ._checks import one_of, whole_number

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_out")
HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "head_out",
}
"""TransformerLens's names of the sites; its hook_z, all heads side by side, is what the output projection reads."""


class Place(NamedTuple):
    """A site of a layer.

    Attributes:
        site: "resid_pre", "resid_post", "attn_out", "mlp_out" or "head_out".
        layer: Decoder block, 0-based; negative ones count from the end.
    """

    site: str
    layer: int

    def __str__(self) -> str:
        return f"{self.site} {self.layer}"

    @property
    def hook_name(self) -> str:
        """The place as TransformerLens names it, such as blocks.5.hook_resid_pre."""
        return f"blocks.{self.layer}.{next(hook for hook, site in HOOKS.items() if site == self.site)}"

    def same_stream(self, other: Place) -> bool:
        """Whether both show the same tensor: the output of a block is the input of the next."""
        return _counted_from_outputs(self) == _counted_from_outputs(other)


def place_of(owner: str, key: Any) -> Place:
    """The place that a key names.

    Args:
        owner: Who asks, for the messages.
        key: A layer L, whose site is then "resid_post"; (site, L); or a name of TransformerLens, "blocks.L.hook_resid_post".

    Raises:
        TypeError, ValueError: none of these, or an unknown site.
    """
    if isinstance(key, str):
        found = place_of_hook(key)
        if found is None:
            raise ValueError(
                f"{owner}: key {key!r} is no place; expected a layer number, (site, layer), or a name such as "
                f"{', '.join(f'blocks.8.{hook}' for hook in HOOKS)}"
            )
        return found
    site, layer = key if isinstance(key, tuple) and len(key) == 2 else ("resid_post", key)
    try:
        number = whole_number(owner, "layer", layer)
    except TypeError:
        raise TypeError(f"{owner}: key {key!r}; expected a layer number or (site, layer)") from None
    return Place(one_of(owner, "site", site, SITES), number)


def place_of_hook(name: str) -> Place | None:
    """The place of a TransformerLens name such as blocks.5.hook_resid_pre; None if no site of ours is that place."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    site = None if found is None else HOOKS.get(found[2])
    return None if found is None or site is None else Place(site, int(found[1]))


def _counted_from_outputs(place: Place) -> Place:
    return Place("resid_post", place.layer - 1) if place.site == "resid_pre" and place.layer > 0 else place
