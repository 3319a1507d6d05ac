"""Fixtures of the trainer's tests."""

import multiprocessing
import socket

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("pyarrow")

from tiny import as_torchrun, main_quietly, make_data, make_start, tiny_config


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(out, **changes) -> TrainConfig on a small table, from the same initial weights each time."""
    data = make_data(tmp_path_factory.mktemp("data"))
    start = make_start(tmp_path_factory.mktemp("start"))
    return lambda out, **changes: tiny_config(start, data, out, **changes)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products on several threads wait for each other most of the time.

    Of the module, so that the runs its fixtures make, before any test's own, have as many: bits depend on it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """fork(config) runs `fastclip train` in a process of its own that has all imports behind it.

    What it says is in the file `process.said`. Further arguments: its environment. Processes that a failed test leaves
    are killed.
    """
    started = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastclip.cli", "fastclip.train.trainer", "fastclip.data.tables", "pyarrow.csv"])

    def begin(config, main=main_quietly, **environment):
        folder = tmp_path_factory.mktemp("fork")
        process = context.Process(target=main, args=(config, folder), kwargs=environment)
        process.start()
        process.said = folder / "said.txt"
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def fork_two(fork):
    """fork_two(config) runs it in two such processes that train together, as if torchrun had started them."""

    def begin(config):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [fork(config, **as_torchrun(rank, 2, port)) for rank in range(2)]

    return begin
