"""Every pair of the zoo in a process of its own, with limits.

transformers takes seconds to import, so one process imports it and forks: a model that hangs, crashes or eats memory ends its
own process, and none sees what another left behind.

    python tests/zoo_runner.py PAIRS.json RESULTS.jsonl     [[type, class], …] → a line for each, in the order of finishing
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SECONDS, PATIENCE = 60, 300
"""Of a processor, and of a clock: a busy machine is no hang."""
BYTES = 8 << 30  # of address space; torch alone maps 3
HERE = Path(__file__).parent


def run_all(
    pairs: Iterable[tuple[str, str]], jobs: int = 1, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """What `zoo_checks.examine` says of each (type, class), by "type class"."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answers = Path(folder, "pairs.json"), Path(folder, "results.jsonl")
        asked.write_text(json.dumps(list(pairs)))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, str(Path(__file__)), str(asked), str(answers), str(jobs)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if progress is not None:
                    progress(line.rstrip("\n"))
        if process.returncode:
            raise RuntimeError(f"the zoo ended with exit code {process.returncode}")
        return {f"{one['kind']} {one['class']}": one for one in map(json.loads, answers.read_text().splitlines())}


def start(kind: str, class_name: str, answer: Path) -> int:
    """A child that examines one model and writes what it found; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        signal.alarm(PATIENCE)  # the default of both signals is to end the process, whatever runs
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        import zoo_checks

        started = time.perf_counter()
        found = zoo_checks.examine(kind, class_name)
        found |= {"seconds": round(time.perf_counter() - started, 1)}
        answer.write_text(json.dumps(found))
        code = 0
    finally:
        os._exit(code)


def finish(kind: str, class_name: str, status: int, answer: Path) -> dict[str, Any]:
    """What a child found, or how it ended: `status` as `os.wait` gives it."""
    if answer.exists():
        found: dict[str, Any] = json.loads(answer.read_text())
        answer.unlink()
    else:
        import zoo_checks

        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        how = f"exit code {os.waitstatus_to_exitcode(status)}" if number is None else signal.Signals(number).name
        late = number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
        why = f"it took more than {SECONDS} s" if late else f"its process ended with {how}"
        found = {"outcomes": dict.fromkeys(zoo_checks.CHECKS, f"raised: {why}"), "seconds": SECONDS}
    return {"kind": kind, "class": class_name, **found}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _serve(asked: Path, answers: Path, jobs: int) -> None:
    import torch
    import transformers
    import zoo_checks

    import steerfast

    zoo_checks.examine("llama", "LlamaForCausalLM")  # imports, before the forks, what every model needs: seconds
    say(f"transformers {transformers.__version__}, torch {torch.__version__}, steerfast {steerfast.__file__}")
    waiting = [tuple(pair) for pair in json.loads(asked.read_text())]
    waiting.reverse()
    running: dict[int, tuple[str, str, Path]] = {}
    with answers.open("w") as out:
        while waiting or running:
            while waiting and len(running) < jobs:
                kind, class_name = waiting.pop()
                answer = answers.with_name(f"{kind}-{class_name}.json")
                running[start(kind, class_name, answer)] = (kind, class_name, answer)
            child, status = os.wait()
            kind, class_name, answer = running.pop(child)
            found = finish(kind, class_name, status, answer)
            out.write(json.dumps(found) + "\n")
            out.flush()
            unlike = {name: one for name, one in found["outcomes"].items() if not one.startswith(("right", "refused"))}
            say(f"{kind} {class_name} {found['seconds']} s {unlike or 'right or refused'}")


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
