"""What a run writes into its folder as it goes: rows of metrics and ledger, then model and summary."""

import contextlib
import datetime
import json
import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sterna.analysis.weight_entropy import WeightEntropy, weight_entropy
from sterna.data.merit import MERITS
from sterna.evaluation import Evaluation
from sterna.ledger import Spent
from sterna.runs.environment import environment
from sterna.runs.files import (
    StoreError,
    append_rows,
    keep_rows,
    read_json,
    read_rows,
    write_json,
    write_whole,
)
from sterna.runs.multiply_adds import multiply_adds
from sterna.runs.request import Request
from sterna.runs.run import Run
from sterna.runs.tensorboard import TensorBoard
from sterna.seams import NotFinite
from sterna.server.records import Landing

FORMAT = 1
_ROWS = ("metrics.jsonl", "ledger.jsonl", "updates.jsonl")


class Recorder:
    """The writer of a run folder.

    Args:
        request: for the folder and what was asked.
        run: the configuration.
        model: what is trained.
        workers: how many.
        engine: what carries it.
        leads: whether this worker writes the rows.
    """

    def __init__(
        self, request: Request, run: Run, model: nn.Module, workers: int, engine: str, leads: bool
    ) -> None:
        self.request, self.run, self.model = request, run, model
        self.workers, self.engine, self.leads = workers, engine, leads
        self.multiply_adds = multiply_adds(model, run.data.train.inputs[:1])
        self.board = TensorBoard(None)
        self.last_step = 0
        share = 1 if run.server is not None else workers
        self.batch_size = run.batch_size // share  # of one gradient
        self._entropy: WeightEntropy | None = None
        self._rows: list[dict[str, Any]] = []
        self._pushes: list[dict[str, Any]] = []

    def open(self, step: int, resumed: bool, version: int | None = None) -> None:
        """Describe the run; on resumption drop the rows that the checkpoint does not know of.

        Args:
            step: that the run goes on from; of a server, the pushes.
            resumed: whether it goes on.
            version: of a server, the updates.
        """
        folder = self.request.folder
        # One description per machine: what goes on from it need not share a file system.
        if self.leads or os.environ.get("LOCAL_RANK") == "0":
            self._describe(resumed)
        if not self.leads:
            return
        for name in _ROWS:
            if not resumed:
                (folder / name).unlink(missing_ok=True)
            elif name != "updates.jsonl" or (folder / name).exists():
                keep_rows(folder / name, lambda row: row.get("push", row["step"]) <= step)
        self.board = TensorBoard(
            folder, purge_step=(step if version is None else version) + 1 if resumed else None
        )

    def _describe(self, resumed: bool) -> None:
        """Write ``run.json``.

        Raises:
            StoreError: the run goes on, but with other methods than it was started with.
        """
        request, path, methods = self.request, self.request.folder / "run.json", self.run.methods()
        if resumed:
            before = read_json(path, "a run folder").get("methods")
            if before != methods:
                raise StoreError(
                    f"{path} says that the run was started with {before}, and now it is {methods}; "
                    "resume with the code and arguments that it was started with."
                )
        about = {
            "format": FORMAT,
            "experiment": request.experiment,
            "method": self.run.method,
            "methods": methods,
            "model": repr(self.model),
            "data": self.run.data.name,
            "source": request.source,
            "arguments": plain_arguments(request.arguments),
            "seed": request.seed,
            "workers": self.workers,
            "engine": self.engine,
            "checkpoint_every": request.checkpoint_every,
            "device": request.device,
            "threads": torch.get_num_threads() if self.engine in ("virtual", "solo") else 1,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **environment(),
        }
        if request.setting is not None:
            about["setting"] = request.setting.as_json()
        write_json(path, about)

    def step(
        self, step: int, epoch: int, loss: float, seconds: float, push: int | None = None
    ) -> None:
        """Note a step, and of a server the pushes so far; it is written with the next `flush`."""
        row: dict[str, Any] = {"kind": "step", "step": step}
        if push is not None:
            row["push"] = push
        self._rows.append({**row, "epoch": epoch, "loss": loss, "seconds": seconds})
        self.board.add(step, {"train/loss": loss})

    def push(self, number: int, landing: Landing, loss: float) -> None:
        """Note a push at a server, the ``number``-th; enough to do it again."""
        row: dict[str, Any] = {
            "push": number,
            **landing.place._asdict(),
            "outcome": landing.outcome,
            "step": landing.step,
            "epoch": landing.epoch,
            "loss": loss,
            "staleness": landing.staleness,
            "began_s": landing.began_s,
            "compute_s": landing.compute_s,
            "time_s": landing.time_s,
        }
        if landing.reason:
            row["reason"] = landing.reason
        self.last_step = landing.step
        self._pushes.append(row)

    def outcomes_so_far(self) -> list[str]:
        """What became of the pushes that were written, the last version noted; of a run that goes on."""
        rows = list(read_rows(self.request.folder / "updates.jsonl"))
        self.last_step = int(rows[-1]["step"]) if rows else 0
        return [str(row["outcome"]) for row in rows]

    def go_back(self, version: int) -> list[str]:
        """Drop what was noted of later versions of the weights; what became of the pushes before."""
        self.flush()
        folder = self.request.folder
        keep_rows(folder / "updates.jsonl", lambda row: int(row["step"]) <= version)
        outcomes = self.outcomes_so_far()
        pushes = len(outcomes)
        for name in ("metrics.jsonl", "ledger.jsonl"):
            keep_rows(folder / name, lambda row: int(row["push"]) <= pushes)
        return outcomes

    def flush(self) -> None:
        """Write what was noted."""
        folder = self.request.folder
        append_rows(folder / "metrics.jsonl", self._rows)
        self._rows.clear()
        if self._pushes:
            append_rows(folder / "updates.jsonl", self._pushes)
            self._pushes.clear()

    def look_at_weights(self) -> None:
        """Measure the entropy of the weights as they are, for the next evaluation that is written."""
        try:
            self._entropy = weight_entropy(self.model)
        except NotFinite:
            self._entropy = None

    def evaluated(
        self,
        step: int,
        epoch: int,
        reached: Evaluation,
        workers: Sequence[Spent],
        seconds: float,
        bits_sent: int,
        push: int | None = None,
    ) -> None:
        """Write an evaluation, with the weights' entropy where it is known, and every worker's ledger."""
        self.flush()
        merit = self.run.data.merit
        at: dict[str, Any] = {"step": step}
        if push is not None:
            at["push"] = push
        evaluation = {
            "kind": "eval",
            **at,
            "epoch": epoch,
            "loss": reached.loss,
            "accuracy": reached.accuracy,
            merit.name: reached.of(merit),
            "seconds": seconds,
            "bits_sent": bits_sent,
            "entropy": None if self._entropy is None else _plain_entropy(self._entropy),
        }
        append_rows(self.request.folder / "metrics.jsonl", [evaluation])
        append_rows(
            self.request.folder / "ledger.jsonl",
            [
                {**at, "epoch": epoch, "worker": rank, **asdict(spent)}
                for rank, spent in enumerate(workers)
            ],
        )
        scalars = {"test/loss": reached.loss, f"test/{merit.name}": reached.of(merit)}
        if self._entropy is not None:
            scalars["weights/bits_at_fixed_step"] = self._entropy.fixed_bits
            scalars["weights/bits_at_relative_step"] = self._entropy.relative_bits
        self.board.add(step, {**scalars, "ledger/bits_sent": bits_sent})

    def finish(
        self, reached: Evaluation, everyone: Spent, figures: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The summary, with the engine's own ``figures``; written beside the model by who leads."""
        merit = self.run.data.merit
        tensors = [*self.model.parameters(), *self.model.buffers()]
        summary = {
            "experiment": self.request.experiment,
            "method": self.run.method,
            "data": self.run.data.name,
            "engine": self.engine,
            "workers": self.workers,
            "seed": self.request.seed,
            "epochs": self.run.epochs,
            "batch_size": self.batch_size,
            "steps": everyone.steps,
            **{name: reached.of(merit) if name == merit.name else None for name in MERITS},
            "loss": reached.loss,
            "bits_sent": everyone.bits_sent,
            "bits_received": everyone.bits_received,
            "messages": everyone.messages,
            "compute_s": everyone.compute_s / self.workers,
            "wait_s": everyone.wait_s / self.workers,
            "wall_s": None,
            "staleness_mean": 0.0,
            "staleness_max": 0,
            "peak_memory_bytes": everyone.peak_memory_bytes,
            "peak_activation_bytes": everyone.peak_activation_bytes,
            "examples": everyone.examples,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "multiply_adds": self.multiply_adds,
            "model_bits": sum(8 * x.nbytes for x in tensors),
            "refused": None,
            "late": None,
            "lost": None,
            **figures,
        }
        if self.leads:
            folder = self.request.folder
            # Copies, because safetensors refuses tensors that share memory, as tied weights do.
            state = {k: v.cpu().contiguous().clone() for k, v in self.model.state_dict().items()}
            write_whole(folder / "model.safetensors", lambda beside: save_file(state, beside))
            write_json(folder / "summary.json", summary)
        return summary

    def close(self) -> None:
        """Write what was noted, also of a run that failed."""
        if self.leads and (self._rows or self._pushes):
            with contextlib.suppress(StoreError):  # then that is what it failed of
                self.flush()
        self.board.close()


def _plain_entropy(found: WeightEntropy) -> dict[str, Any]:
    """Bits a weight with five digits: of the model, and by layer at the fixed and the relative step."""
    return {
        "step": found.step,
        "relative_step": found.relative_step,
        "fixed_bits": _short(found.fixed_bits),
        "relative_bits": _short(found.relative_bits),
        "layers": {
            layer.name: [_short(layer.fixed_bits), _short(layer.relative_bits)]
            for layer in found.layers
        },
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def resident_bytes() -> int:
    """Largest resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's arguments as they stand in ``run.json``; paths are strings."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(arguments), default=str))
    return plain
