"""Checkpoints: all that a worker needs to end where the uninterrupted run would have ended.

Every worker writes its own file, whole or not at all: ``checkpoint/step-00000120/rank-0.safetensors``.
So no file system need be shared between machines. The two newest steps are kept; the workers go on from
the newest step that all of them can read.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sterna.ledger import Spent
from sterna.loop import Streams
from sterna.replica import Replica
from sterna.runs import tree
from sterna.runs.files import StoreError, write_whole
from sterna.seams import Comm, Message, Sampler

FORMAT = 2
_KEEP = 2


def save(folder: Path, replica: Replica, sampler: Sampler, streams: Streams, comm: Comm) -> Path:
    """Write this worker's checkpoint of the current step, and drop the third newest.

    Raises:
        StoreError: the disk is full or not writable; older checkpoints are untouched.
    """
    return store(folder, replica.step, values_of(replica, sampler, streams, comm), comm.rank)


def values_of(replica: Replica, sampler: Sampler, streams: Streams, comm: Comm) -> dict[str, Any]:
    """All of a worker's state, as nested values; the tensors are not copied."""
    return {
        "step": replica.step,
        "model": dict(replica.model.state_dict()),
        "optimizer": replica.optimizer.state_dict(),
        "sampler": sampler.state_dict(),
        "state": {slot: dict(named) for slot, named in streams.state.items()},
        "objective_rng": streams.objective.get_state(),
        "exchange_rng": streams.exchange.get_state(),
        "global_rng": torch.get_rng_state(),
        "ledger": asdict(comm.ledger.spent()),
    }


def store(folder: Path, step: int, values: Mapping[str, Any], rank: int = 0) -> Path:
    """Write a checkpoint of any values, and drop the third newest.

    Raises:
        StoreError: the disk is full or not writable; older checkpoints are untouched.
    """
    path = _path(folder, step, rank)
    write_tree(path, values)
    for old in _steps(folder, rank)[:-_KEEP]:
        _remove(folder, old, rank)
    return path


def write_tree(path: Path, values: Mapping[str, Any]) -> None:
    """Write nested values into one file, whole or not at all.

    Raises:
        StoreError: the disk is full or not writable.
    """
    tensors, rest = tree.split(dict(values))
    header = {"format": str(FORMAT), "tree": json.dumps(rest)}
    write_whole(path, lambda beside: save_file(tensors, beside, metadata=header))


def read_tree(path: Path) -> dict[str, Any]:
    """What `write_tree` wrote.

    Raises:
        StoreError: the file is damaged, or another version wrote it.
    """
    if not _readable(path):
        raise StoreError(f"{path} is damaged. Remove it to start anew, or bring back a whole one.")
    return _load(path)


def newest(folder: Path) -> dict[str, Any] | None:
    """The values of the newest checkpoint of one writer that is whole, or None.

    Raises:
        StoreError: it was written by another version.
    """
    for step in reversed(_steps(folder, 0)):
        path = _path(folder, step, 0)
        if _readable(path):
            return _load(path)
    return None


def _load(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        rest = json.loads(file.metadata()["tree"])
        values: dict[str, Any] = tree.join(
            {key: file.get_tensor(key) for key in file.keys()},  # noqa: SIM118
            rest,
        )
    return values


def load_replica(path: Path | str, replica: Replica, values: Mapping[str, Any]) -> None:
    """Bring model, optimizer and step back.

    Raises:
        StoreError: they do not fit.
    """
    try:
        replica.model.load_state_dict(values["model"])
        replica.optimizer.load_state_dict(values["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise StoreError(
            f"{path} does not fit the model: {' '.join(str(error).split())[:300]} Resume with the "
            "code and arguments that wrote it, or start a new run."
        ) from error
    replica.step = values["step"]


def forget(folder: Path, rank: int, beyond: int) -> None:
    """Remove this worker's checkpoints of later steps than ``beyond``: of a run that is no more."""
    for step in _steps(folder, rank):
        if step > beyond:
            _remove(folder, step, rank)
    for partial in folder.glob(f"step-*/.rank-{rank}.safetensors.*.partial"):
        partial.unlink(missing_ok=True)  # its writer was killed


def _remove(folder: Path, step: int, rank: int) -> None:
    path = _path(folder, step, rank)
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty yet, or another rank was quicker
        path.parent.rmdir()


def restore(folder: Path, replica: Replica, sampler: Sampler, streams: Streams, comm: Comm) -> bool:
    """Go back to the newest step that every worker can read; False where there is none.

    Raises:
        StoreError: the file was written by another version, or does not fit the model; or some workers
            hold checkpoints, but no step is held by all.
    """
    step = _agree_on_step(folder, comm)
    if step is None:
        return False
    path = _path(folder, step, comm.rank)
    values = _load(path)
    load_replica(path, replica, values)
    load_streams(values, replica, sampler, streams, comm)
    return True


def load_streams(
    values: Mapping[str, Any], replica: Replica, sampler: Sampler, streams: Streams, comm: Comm
) -> None:
    """Bring back what is not the replica's: sampler, generators, exchange state and ledger."""
    sampler.load_state_dict(values["sampler"])
    device = replica.gradients.buffer.device
    streams.state = {
        slot: {name: x.to(device) for name, x in named.items()}
        for slot, named in values["state"].items()
    }
    streams.objective.set_state(values["objective_rng"])
    streams.exchange.set_state(values["exchange_rng"])
    torch.set_rng_state(values["global_rng"])
    comm.ledger.reset(Spent(**values["ledger"]))


def _path(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step-{step:08d}" / f"rank-{rank}.safetensors"


def _steps(folder: Path, rank: int) -> list[int]:
    return sorted(
        int(path.parent.name.removeprefix("step-"))
        for path in folder.glob(f"step-{'[0-9]' * 8}/rank-{rank}.safetensors")
    )


def _readable(path: Path) -> bool:
    """Whether the file is whole (a safetensors header says how long it must be).

    Raises:
        StoreError: it is whole but of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found: Any = (file.metadata() or {}).get("format")
    except (SafetensorError, OSError):
        return False
    if found != str(FORMAT):
        raise StoreError(
            f"{path} has checkpoint format {found}; this version of Sterna reads format {FORMAT}. "
            "Resume with the version that wrote it (run.json names it), or start a new run."
        )
    return True


def _agree_on_step(folder: Path, comm: Comm) -> int | None:
    """The newest step that every worker holds whole, or None."""
    steps = [s for s in _steps(folder, comm.rank) if _readable(_path(folder, s, comm.rank))]
    offer = torch.tensor([-1, -1, *steps][-_KEEP - 1 :], dtype=torch.int64)
    offer = torch.cat([offer.new_full((_KEEP + 1 - len(offer),), -1), offer])
    with comm.ledger.paused():
        offers = [m.buffers["steps"].tolist() for m in comm.gather(Message({"steps": offer}))]
    held = [sorted(set(offer) - {-1}) for offer in offers]
    common = set(held[0]).intersection(*held[1:])
    if any(held) and not common:
        raise StoreError(
            f"{folder}: no step is held whole by every worker (steps by rank: {held}); a worker's files "
            "are missing, or the number of workers has changed. Bring the files back, or start a new run."
        )
    return max(common) if common else None
