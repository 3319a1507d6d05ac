"""The example of docs/distributed.md runs as it stands there, under the environment that torchrun sets."""

import os
import re
import socket
from pathlib import Path

from pool import CONTEXT

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def run(rank: int, port: int, code: str, told) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said: list[str] = []
    exec(compile(code, "docs/distributed.md", "exec"), {"print": said.append})
    told.send(said)


def test_the_example_runs_on_two_ranks():
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(2):
        here, there = CONTEXT.Pipe()
        processes.append(CONTEXT.Process(target=run, args=(rank, port, code, there)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    said = [pipe.recv() if pipe.poll(60) else None for pipe in pipes]
    for process in processes:
        process.join(10)
        process.kill()
    losses = [float(re.fullmatch(r"step \d: loss ([\d.]+) over 16 pairs", line)[1]) for line in said[0]]
    assert len(losses) == 3 and all(0.5 < loss < 20 for loss in losses) and said[1] == []
