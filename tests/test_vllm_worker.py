"""What stands in front of a model runner's methods, on a runner without an engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import steerfast as sf
from steerfast.place import Place
from steerfast.sae.growing import contexts_of
from steerfast.vllm import edits, plans
from steerfast.vllm.capture import CaptureSettings, read_capture
from steerfast.vllm.probes import load_probes
from steerfast.vllm.scores import read_probes
from steerfast.vllm.wire import read
from steerfast.vllm.worker_seams import Follower

D, LAYERS = 8, 3


class Block(nn.Module):
    """It leaves the stream as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(D, D)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.clone()


class Model(nn.Module):
    """Blocks, and a config that says how wide they are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.config: Any = SimpleNamespace(get_text_config=lambda: SimpleNamespace(hidden_size=D))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            stream = block(stream)
        return stream


class Runner:
    """The methods that steering wraps, of generation V1, and steps that run them as vLLM does."""

    max_num_tokens, model_memory_usage = 16, 0
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.model = Model()
        self.input_ids = SimpleNamespace(gpu=torch.arange(16))
        self.query_start_loc = SimpleNamespace(gpu=torch.zeros(17, dtype=torch.int32))
        self.positions = torch.zeros(16, dtype=torch.int64)
        self.input_batch = SimpleNamespace(req_ids=[])

    def _update_states(self, scheduler_output: Any) -> None: ...

    def _prepare_inputs(self, scheduler_output: Any) -> None:
        counts = [*scheduler_output.num_scheduled_tokens.values()]
        self.input_batch.req_ids = [*scheduler_output.num_scheduled_tokens]
        self.query_start_loc.gpu[1 : len(counts) + 1] = torch.tensor(counts).cumsum(0)
        firsts = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        firsts |= zip(
            scheduler_output.scheduled_cached_reqs.req_ids,
            scheduler_output.scheduled_cached_reqs.num_computed_tokens,
            strict=True,
        )
        where = [firsts[name] + i for name, n in scheduler_output.num_scheduled_tokens.items() for i in range(n)]
        self.positions[: len(where)] = torch.tensor(where)

    def sample_tokens(self, grammar_output: Any) -> Any: ...

    def _dummy_run(self, num_tokens: int) -> torch.Tensor:
        return self.model(torch.full((num_tokens, D), 100.0))

    def execute(self, stream: torch.Tensor, *new: Any, ended: tuple[str, ...] = (), **others: int) -> torch.Tensor:
        """A step of new requests with all of their prompts, and of others at a position."""
        counts = {one.req_id: one.prompt_len for one in new} | dict.fromkeys(others, 1)
        cached = SimpleNamespace(req_ids=[*others], num_computed_tokens=[*others.values()])
        self._update_states(
            output := SimpleNamespace(
                scheduled_new_reqs=list(new),
                scheduled_cached_reqs=cached,
                num_scheduled_tokens=counts,
                total_num_scheduled_tokens=sum(counts.values()),
                finished_req_ids=set(ended),
            )
        )
        if not counts:
            return stream
        self._prepare_inputs(output)
        found = self.model(stream)
        self.sample_tokens(None)
        return found


def request(name: str, prompt: int, **fields: Any) -> Any:
    params = SimpleNamespace(extra_args=fields)
    return SimpleNamespace(
        req_id=name,
        prompt_len=prompt,
        num_computed_tokens=0,
        prompt_token_ids=[*range(prompt)],
        sampling_params=params,
    )


def loaded(folder: Path, reached: Callable[[dict[str, Any]], object]) -> Runner:
    """A runner that is followed, its model loaded, with a plan, a plan with a condition, and rows that may be captured."""
    sf.Plan({0: sf.Add(torch.ones(D))}).save(folder / "plans" / "add")
    high = sf.Condition(sf.probes.LinearProbe(torch.ones(D), place=0), 400.0, release=100.0)
    sf.Plan({1: sf.WhenToken(high, sf.Add(torch.ones(D)))}).save(folder / "plans" / "held")
    sf.probes.LinearProbe(torch.ones(D), place=0).save(folder / "probes" / "sum")
    library, chains = plans.load(folder / "plans", D, LAYERS)
    probes, all_probes = load_probes(folder / "probes", D, LAYERS, library)
    places = frozenset([Place("resid_post", 2)])
    settings = CaptureSettings(folder / "captured", places, LAYERS, D, 4, 64, 16, 1 << 20, 1 << 16, 1 << 20)

    def reading(params: Any) -> Any:
        return read_probes(params.extra_args, probes, None)

    served: Any = SimpleNamespace(
        library=library, chains=chains, probes=probes, loaded=all_probes, layers=LAYERS, slots=4, captures=settings,
        parts=lambda params: read(params.extra_args, library, ()), reading=reading,
        capture=lambda params: read_capture(params.extra_args, settings),
        counters=SimpleNamespace(add=lambda *_: None),
    )  # fmt: skip
    runner, context = Runner(), dict[str, Any]()
    config = SimpleNamespace(
        additional_config={},
        speculative_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_index=0),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=None, static_forward_context=context),
    )
    worker = SimpleNamespace(model_runner=runner, rank=0, load_model=lambda: None)
    Follower(worker, config, served).attach()
    reached(context)
    worker.load_model()
    return runner


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("steerfast.vllm.worker_seams.logger", lambda: SimpleNamespace(warning=print))
    made: Any = loaded(tmp_path, lambda context: monkeypatch.setattr(edits, "_context", lambda: context))
    made.folder = tmp_path / "captured" / "resid_post.2.before.float32"
    yield made
    made.steerfast_taker.close()


@torch.inference_mode()
def test_a_pass_of_nobodys_tokens_is_not_edited_read_or_captured(runner: Any) -> None:
    """An engine without work runs such a pass beside others that have some; it may have fewer tokens than its last step."""
    capture = {"steer_capture": 2, "steer_capture_dtype": "float32"}
    stream = torch.arange(7.0)[:, None].expand(7, D).clone()
    asked = {"steer": "add", "steer_read": "sum", **capture}
    go, collector = runner.steerfast_taker.collector.put, []
    runner.steerfast_taker.collector.put = collector.append  # the thread comes later
    found = runner.execute(stream, request("a", 4, **asked), request("b", 3))
    assert torch.equal(found, stream + (torch.arange(7) < 4)[:, None])
    for tokens in (1, 6):
        assert torch.equal(runner._dummy_run(tokens), torch.full((tokens, D), 100.0))
    assert torch.equal(runner.execute(stream[:1], a=4), stream[:1] + 1)
    runner._dummy_run(1)
    runner.execute(stream, ended=("a",))
    runner._dummy_run(2)
    for message in collector:
        go(message)
    assert runner.steerfast_taker.collector.drain()
    cache = sf.sae.ActivationCache.open(runner.folder)
    assert contexts_of(runner.folder, 0) == [("a", 0)]
    assert torch.equal(cache.read(0), torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0])[:, None].expand(5, D))


@torch.inference_mode()
def test_a_pass_of_nobodys_tokens_decides_nothing(runner: Any) -> None:
    """A condition that a request holds open is as open behind it."""
    high, between, low = (torch.full((1, D), value) for value in (60.0, 20.0, 10.0))
    runner.execute(torch.cat([low, high]), request("a", 2, steer="held"))
    assert torch.equal(runner.execute(between, a=2), between + 1)
    runner.model.blocks[0].forward = lambda hidden_states: hidden_states * 0  # what would release it
    assert torch.equal(runner._dummy_run(1), torch.zeros(1, D))
    del runner.model.blocks[0].forward
    assert torch.equal(runner.execute(between, a=3), between + 1)
    assert torch.equal(runner.execute(low, a=4), low)


@torch.inference_mode()
def test_the_clock_of_the_cost_run_is_around_what_stands_before_the_runners_methods(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import vllm_clock

    packet = torch.ops.steerfast.engine_edit_
    monkeypatch.setattr(packet, "default", packet.default)
    at = iter(range(2, 100))
    core = SimpleNamespace(
        model_executor=SimpleNamespace(driver_worker=SimpleNamespace(worker=SimpleNamespace(model_runner=runner)))
    )
    engine: Any = SimpleNamespace(engine_core=SimpleNamespace(engine_core=core))
    engine.step = lambda: runner.execute(torch.zeros(1, D), a=next(at)) is not None
    runner.execute(torch.zeros(2, D), request("a", 2, steer="add"))
    clock = vllm_clock.Clock()
    vllm_clock.around_engine(clock, SimpleNamespace(llm_engine=engine), lambda: [engine.step() for _ in range(6)])
    engine.step()
    assert len(clock._spent[vllm_clock.HOST]) == 3, "_update_states, _prepare_inputs, sample_tokens"
    assert len(clock.steps) == 1


ENDS = {
    "by itself": "capture_seams._ended['a'] = (4, 9)",
    "behind a fork of it": """
import os
from steerfast.files.claim import Claim
if not os.fork():
    sys.exit()
os.wait()
try:
    Claim(runner.folder)
except BlockingIOError:
    capture_seams._ended['a'] = (4, 9)
""",
    "by a signal while it writes": """
import os, signal
runner.steerfast_taker.end(SimpleNamespace(finished_req_ids={'a'}))
signal.signal(signal.SIGTERM, signal.SIG_DFL)
close = runner.steerfast_taker.close
runner.steerfast_taker.close = lambda: (os.kill(os.getpid(), signal.SIGTERM), close())
wrapper = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
capture_seams._shutdown(lambda wrapper: None, wrapper)
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
""",
}


@pytest.mark.parametrize("ends", ENDS)
def test_a_process_that_ends_has_written_what_has_ended(tmp_path: Path, ends: str) -> None:
    """An engine inside a script is shut down by nobody, and its last request was told to no step; one of a server is hurried."""
    code = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
sys.path[:0] = {sys.path!r}
from test_vllm_worker import D, edits, loaded, request
from steerfast.vllm import capture_seams, worker_seams
worker_seams.logger = lambda: SimpleNamespace(warning=print)
def reached(context):
    edits._context = lambda: context
runner = loaded(Path({str(tmp_path)!r}), reached)
runner.folder = Path({str(tmp_path / "captured")!r})
with torch.inference_mode():
    runner.execute(torch.ones(3, D), request("a", 3, steer_capture=2, steer_capture_dtype="float32"))
{ENDS[ends]}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    folder = tmp_path / "captured" / "resid_post.2.before.float32"
    assert contexts_of(folder, 0) == [("a", 0)]
    assert torch.equal(sf.sae.ActivationCache.open(folder).read(0), torch.ones(3, D))
