"""What the processes of one engine know: its plans, its probes, its default, its captures; and what of a request they refuse."""

from __future__ import annotations

import functools
import json
import os
from typing import Any

from steerfast.files.shelf import Shelf
from steerfast.probes.probe import Probe

from . import counters
from .capture import Capture, CaptureSettings, check_capture, read_capture
from .fields import CAPTURES, short, steer_fields
from .plans import Chains, Library, load, with_columns
from .probes import ProbeLibrary, load_probes
from .scores import Reading, check_read, read_probes
from .sink import ScoreSink
from .wire import Part, check_prompt, read


class Served:
    """What the processes of one engine know: its plans, its probes, its default, its counters."""

    def __init__(self, config: Any) -> None:
        model, directory = config.model_config, os.environ.get("STEERFAST_PLANS")
        self.layers = model.get_total_num_hidden_layers()
        self.library = Library()
        self.chains: dict[str, Chains] = {}
        width, heads = model.get_hidden_size(), _head_width(config)
        saes = Shelf("Plan.load or Probe.load")  # one for both, so that who reads and who edits share an encode
        if directory:
            self.library, self.chains = load(directory, width, self.layers, model.dtype, heads=heads, saes=saes)
            self.library = with_columns(self.library, os.environ.get("STEERFAST_COLUMNS"))
        self.probes = ProbeLibrary()
        self.loaded: dict[str, Probe] = {}
        if probes := os.environ.get("STEERFAST_PROBES"):
            self.probes, self.loaded = load_probes(probes, width, self.layers, self.library, heads=heads, saes=saes)
        edited = {place for chains in self.chains.values() for place in chains}
        batch = config.scheduler_config.max_num_batched_tokens
        self.captures: CaptureSettings | None = CaptureSettings.read(
            (self.layers, width, model.dtype.itemsize), batch, edited, self.library.entered
        )
        self.longest = model.max_model_len
        self.unread = _unread(config)
        self.sink: ScoreSink | None = None
        """Where the front end writes scores."""
        single = [name for name, one in self.probes.probes.items() if one.names is None and not one.pairs]
        self.counters = counters.Counters(sorted([*self.library.plans, *self.library.refused]), single)
        text = os.environ.get("STEERFAST_DEFAULT")
        self.default: tuple[Part, ...] = ()
        self.default_reading: Reading | None = None
        if text:
            try:
                given = json.loads(text)
                self.default = read(given, self.library)
                if any(name in CAPTURES for name in steer_fields(given)):
                    raise ValueError("steer: steer_capture is asked for by each request")
                self.default_reading = self._reading(given)
            except ValueError as error:
                raise ValueError(f"STEERFAST_DEFAULT: {text!r} is no JSON of a request's fields: {error}") from None

    @property
    def slots(self) -> int:
        """How many slots every bank has."""
        given = os.environ.get("STEERFAST_SLOTS")
        if given is None:
            return max(self.library.slots, self.library.least)
        if not given.isdecimal() or int(given) < self.library.least:
            raise ValueError(
                f"STEERFAST_SLOTS is {given!r}; expected a whole number of at least {self.library.least}, so that any request "
                "finds room (a row for each of a prompt's first tokens takes one each)"
            )
        return int(given)

    def parts(self, sampling_params: Any) -> tuple[Part, ...]:
        """What a request that the front end has accepted asks for."""
        return () if sampling_params is None else read(sampling_params.extra_args, self.library, self.default)

    def reading(self, sampling_params: Any) -> Reading | None:
        """What a request that the front end has accepted reads."""
        return None if sampling_params is None else self._reading(sampling_params.extra_args)

    def capture(self, sampling_params: Any) -> Capture | None:
        """What a request that the front end has accepted has captured."""
        return None if sampling_params is None else self._capture(sampling_params.extra_args)

    def _capture(self, given: Any) -> Capture | None:
        capture = read_capture(given, self.captures)
        if capture is not None and self.unread:
            raise ValueError(f"steer: nothing can be captured with {self.unread}; leave steer_capture out")
        return capture

    def _reading(self, given: Any) -> Reading | None:
        reading = read_probes(given, self.probes, self.default_reading)
        if reading is not None and self.unread:
            raise ValueError(f"steer: probes cannot be read with {self.unread}; leave steer_read out")
        return reading

    def _followed(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        told = next((part.positions for part in parts if part.selector.remembers), None)
        if told is not None and self.unread:
            raise ValueError(
                f"steer: {short(told)} must know the tokens before each one, and not all of them are seen with {self.unread}; "
                "leave after: and between: out"
            )
        return parts

    def accept(self, given: Any) -> tuple[tuple[Part, ...], Reading | None, Capture | None]:
        """What a request asks for: plans, what it reads, and what it has captured.

        Raises:
            VLLMValidationError: it cannot be followed; also a ValueError.
        """
        try:
            return self._followed(read(given, self.library, self.default)), self._reading(given), self._capture(given)
        except ValueError as error:
            raise self.refusal(str(error), given) from None

    def check(self, asked: Any, ids: Any, length: int, params: Any) -> None:
        """Refuse what only a request's prompt shows.

        Args:
            asked: What `accept` has returned.
            ids: The prompt; None if it is given as embeddings.
            length: Its tokens.
            params: The request's sampling parameters.

        Raises:
            VLLMValidationError: it cannot be followed; also a ValueError.
        """
        parts, reading, capture = asked
        try:
            check_prompt(parts, ids, length)
            if reading is not None:
                check_read(reading, ids, length)
            if capture is not None and self.captures is not None:
                most = length + (params.max_tokens or self.longest - length)
                check_capture(capture, self.captures, ids, (length, most), params.n)
        except ValueError as error:
            raise self.refusal(str(error), params.extra_args) from None

    def check_beams(self) -> None:
        """Refuse a beam search where the default would steer other tokens than it says: each step sends a beam as a prompt.

        Raises:
            VLLMValidationError: as of `accept`.
        """
        for part in self.default:
            where = "each of a prompt's first tokens" if part.served.by_token else short(part.positions)
            if part.served.by_token or part.selector.needs_end:
                raise self.refusal(
                    f"steer: beam search sends its beams as prompts, so what STEERFAST_DEFAULT does to {where} would be done to "
                    "other tokens; sample instead, or let it act on all",
                    None,
                )

    def refusal(self, text: str, given: Any) -> Exception:
        """The exception that becomes HTTP 400 in the server and is a ValueError in Python."""
        named = steer_fields(given).get("steer")
        first = named if isinstance(named, str) else named[0] if isinstance(named, (list, tuple)) and named else ""
        self.counters.add("refused", first if isinstance(first, str) else "")
        return _refused_type()(text, parameter="steer")


def _head_width(config: Any) -> int:
    """What the attention's output projection reads; 0 where each of several devices has some of the heads."""
    model, parallel = config.model_config, config.parallel_config
    if parallel.tensor_parallel_size > 1:
        return 0
    size = getattr(model.hf_text_config, "v_head_dim", None) or model.get_head_size()
    return int(model.get_num_attention_heads(parallel) * size)


def _unread(config: Any) -> str:
    """What keeps an engine from reading: tokens that have no activations here."""
    return "keys and values from elsewhere (kv_transfer_config)" if config.kv_transfer_config is not None else ""


@functools.cache
def _refused_type() -> Any:
    from vllm.exceptions import VLLMValidationError

    return type("Refused", (VLLMValidationError, ValueError), {"__doc__": "A request that steering cannot follow."})
