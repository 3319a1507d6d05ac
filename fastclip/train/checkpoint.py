"""Checkpoints of a run: written whole or not at all, checked before they are read, never unpickled.

    RUN/checkpoints/step-00000100/
        manifest.json        the step, what the bits depend on, and each file's size and SHA-256; written last
        counters.json        steps, samples, skips, loss scaling, and the configuration
        model.safetensors, config.json, tokenizer.json      the weights: a model folder, to load as any other
        state.safetensors    moments of the optimiser, average of the weights
        shard-00001-*        in place of the two .safetensors files, one a process, where the model is sharded
        process-0.pt ...     each process's random generators and its place in the data (torch.load, weights_only)

A checkpoint grows in a folder whose name begins with a dot, is flushed to the disk, and is renamed: a kill at any
moment leaves the previous ones as they were. All processes share the file system.
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as sharded
from torch.distributed.tensor import DTensor

import fastclip
from fastclip import clip
from fastclip.clip.model import Clip
from fastclip.clip.sources import WEIGHTS
from fastclip.clip.tokenizer import Tokenizer, load_tokenizer
from fastclip.env import processor
from fastclip.errors import UserError
from fastclip.evaluate.files import save_json
from fastclip.train.files import contiguous, digest, flush_folder, load_json, save_weights, seal
from fastclip.train.parallel import World
from fastclip.train.settings import differences
from fastclip.train.state import TrainState, random_state, set_random_state

FOLDER, MANIFEST, COUNTERS, STATE = "checkpoints", "manifest.json", "counters.json", "state.safetensors"
FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint that is damaged, or that belongs to another model; the message names it and what is wrong."""


def write(
    run: Path,
    state: TrainState,
    loader: Any,
    world: World,
    config: dict[str, Any],
    describe: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write RUN/checkpoints/step-N and remove all but the newest `keep`. Every process calls it.

    `describe` writes config.json and tokenizer.json into the folder it is given; `config` is the run's
    configuration. UserError when the disk is full or not writable.
    """
    final = run / FOLDER / f"step-{state.step:08d}"
    growing = final.with_name(f".{final.name}")
    with explained(growing):
        if world.first:
            shutil.rmtree(growing, ignore_errors=True)
            growing.mkdir(parents=True)
            save_json(growing / COUNTERS, {"counters": state.counters(), "config": config})
            describe(growing)
        world.barrier()

        world.share(state.model.buffers())
        save_state(growing, state, world)
        own = {"random": random_state(world.device), "loader": loader.state_dict()}
        # Through memory: torch.save to a full disk raises an error about its own bookkeeping.
        data = io.BytesIO()
        torch.save(own, data)
        (growing / f"process-{world.rank}.pt").write_bytes(data.getbuffer())
        world.barrier()

        # The hashing is shared out: a large model's is minutes for one process.
        files = sorted(path for path in growing.iterdir())
        parts = world.gather({path.name: seal(path) for path in files[world.rank :: world.size]})
        if world.first:
            listed = {name: entry for part in parts for name, entry in part.items()}
            manifest = {"format": FORMAT, "step": state.step, **conditions(world), "files": listed}
            save_json(growing / MANIFEST, manifest)
            flush_folder(growing)
            os.rename(growing, final)
            flush_folder(final.parent)
            prune(run, keep)
        world.barrier()
    return final


def conditions(world: World) -> dict[str, int | str]:
    """What the bits of a run depend on besides its settings and its data. A GPU's kernels promise none."""
    named: dict[str, int | str] = {"processes": world.size, "device": world.device.type}
    if world.device.type == "cpu":
        # Sums are shared out over the threads, and are rounded in the order of the shares.
        named |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "fastclip": fastclip.__version__}
        # The libraries choose their kernels by model, and torch's by what ATEN_CPU_CAPABILITY allows.
        named |= {"processor": processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return named


def read(folder: Path, state: TrainState, loader: Any, world: World) -> list[str]:
    """Put `state`, `loader` and the random generators back to where `write` found them. Every process calls it.

    Returns the conditions that have changed, such as "threads 2 -> 4"; with none the run goes on exactly. Else
    weights, moments, counters and the place in the data are those of the checkpoint, rounding is not, nor are random
    numbers with another number of processes. CheckpointError when it does not fit.
    """
    manifest, now = load_json(folder / MANIFEST), conditions(world)
    tensors = {**state.weights(), **state.moments()}
    stored = sharded.HuggingFaceStorageReader(str(folder))
    check_names(folder, tensors, stored)
    with warnings.catch_warnings():
        # It says that a process alone loads alone.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        sharded.load(tensors, storage_reader=stored, no_dist=world.group is None)
    state.load_counters(load_json(folder / COUNTERS)["counters"])
    same = manifest["processes"] == world.size
    own = torch.load(folder / f"process-{world.rank if same else 0}.pt", weights_only=True)
    loader.load_state_dict(own["loader"])
    if same:
        set_random_state(own["random"], world.device)
    # What an older version did not write down counts as unchanged.
    return differences({name: manifest.get(name, value) for name, value in now.items()}, now)


def newest(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest sound checkpoint of `run`, None if it has none at all.

    Damaged ones are named and passed over. CheckpointError if all are damaged.
    """
    found = sorted((run / FOLDER).glob("step-*"), reverse=True)
    for folder in found:
        try:
            verify(folder)
        except CheckpointError as error:
            say(f"warning: {error}; trying the one before it")
        else:
            return folder
    if found:
        raise CheckpointError(f"no sound checkpoint in {run / FOLDER}: all {len(found)} are damaged")
    return None


def only_up_to(run: Path, folder: Path) -> Path:
    """`folder`, after the checkpoints of `run` that are later than it have been set aside, as superseded-step-N.

    Else they would be taken for the newest, damaged or from a course that the run has left.
    """
    for later in sorted((run / FOLDER).glob("step-*")):
        if later.name > folder.name:
            aside = later.with_name(f"superseded-{later.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(later, aside)
    return folder


def verify(folder: Path) -> None:
    """CheckpointError unless every file is there, of the size and with the SHA-256 that the manifest names."""
    try:
        manifest = load_json(folder / MANIFEST)
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"checkpoint {folder}: format {manifest['format']}, this version reads {FORMAT}")
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"checkpoint {folder}: {name} has {size} bytes, {entry['bytes']} were written")
        for name, entry in files.items():
            if digest(folder / name) != entry["sha256"]:
                raise CheckpointError(f"checkpoint {folder}: {name} is not what was written (SHA-256)")
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {folder}: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from error


def save_state(folder: Path, state: TrainState, world: World) -> None:
    """The tensors: one file a process where they are sharded, else two files by the first process."""
    weights, moments = state.weights(), state.moments()
    if any(isinstance(tensor, DTensor) for tensor in weights.values()):
        writer = sharded.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        sharded.save(contiguous({**weights, **moments}), storage_writer=writer)
    elif world.first:
        save_weights(folder / WEIGHTS, weights)
        save_weights(folder / STATE, moments)


def check_names(folder: Path, tensors: dict[str, torch.Tensor], stored: sharded.HuggingFaceStorageReader) -> None:
    """CheckpointError unless the stored tensors are `tensors`, by name and shape."""
    there = {name: tuple(entry.size) for name, entry in stored.read_metadata().state_dict_metadata.items()}
    here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if missing := sorted(here.keys() - there.keys()):
        raise CheckpointError(f"checkpoint {folder} belongs to another model or optimiser: it has no {missing[0]}")
    if extra := sorted(there.keys() - here.keys()):
        raise CheckpointError(f"checkpoint {folder} belongs to another model or optimiser: it has {extra[0]}")
    for name, shape in here.items():
        if there[name] != shape:
            raise CheckpointError(
                f"checkpoint {folder} belongs to another model: {name} has shape {there[name]}, expected {shape}"
            )


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what kills have left behind."""
    old = sorted((run / FOLDER).glob("step-*"))[:-keep]
    for folder in old:
        # First out of sight, so that a kill in between leaves no half checkpoint that looks whole.
        os.rename(folder, folder.with_name(f".{folder.name}"))
    for leftover in (run / FOLDER).glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What the libraries raise when a disk is full or not writable becomes a UserError, and the half folder goes."""
    try:
        yield
    except (OSError, sharded.CheckpointException) as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
        raise UserError(f"cannot write a checkpoint into {folder.parent}: {reason}; earlier ones are whole") from error


def stored_settings(folder: Path) -> dict[str, Any]:
    """The configuration of the run that wrote the checkpoint."""
    return load_json(folder / COUNTERS)["config"]


def load_model(folder: Path) -> tuple[Clip, Tokenizer]:
    """The model in evaluation mode, and its tokenizer. UserError when there is none, or it cannot be read."""
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"no checkpoint in {folder}: {WEIGHTS} is missing; make one with `fastclip demo --out {folder}`"
        )
    try:
        model = clip.load(folder)
        return model, load_tokenizer(folder, model.config.text.context)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the checkpoint in {folder} cannot be read: {reason}") from error
