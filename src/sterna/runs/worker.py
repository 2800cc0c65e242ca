"""One worker of one run: train, evaluate, save, account. The same code whatever started it."""

import datetime
import json
import os
import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sterna.comm.agreement import agree
from sterna.flat import Layout
from sterna.ledger import Spent, total
from sterna.loop import Streams, fit
from sterna.randomness import isolated
from sterna.replica import Replica
from sterna.runs import checkpoint
from sterna.runs.environment import environment
from sterna.runs.evaluate import average_buffers, evaluate
from sterna.runs.experiment import resolve
from sterna.runs.files import StoreError, append_rows, keep_rows, read_json, write_json, write_whole
from sterna.runs.progress import Progress
from sterna.runs.run import Run
from sterna.runs.tensorboard import TensorBoard
from sterna.samplers.shuffle import Shuffle
from sterna.seams import Comm, Message

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be run, as it travels to the worker processes.

    Args:
        experiment: its name, as typed.
        source: what `sterna.runs.experiment.resolve` finds it by: the name, or the absolute path of a
            user's file and the function; default: the name.
        arguments: the experiment function's keyword arguments.
        folder: the run folder. Where it holds checkpoints, the run goes on from the newest.
        seed: seeds initialisation, data order and every coin.
        checkpoint_every: steps between checkpoints; 0 saves at the end of each epoch.
        device: where the model lives, such as ``cpu`` or ``cuda``.
        quiet: show no progress.
    """

    experiment: str
    arguments: Mapping[str, Any]
    folder: Path
    source: str = ""
    seed: int = 0
    checkpoint_every: int = 0
    device: str = "cpu"
    quiet: bool = False


def work(comm: Comm, request: Request, run: Run | None = None) -> dict[str, Any]:
    """Run one worker to the end; the summary, as it stands in ``summary.json`` of rank 0's folder.

    Raises:
        ValueError: the configuration does not fit, or a gradient was not finite.
        StoreError: the folder cannot be written.
        PeerLost: another worker failed.
    """
    run = run or build(request)
    with isolated(request.seed, "global", comm.rank):
        return _Worker(comm, request, run).train()


def build(request: Request) -> Run:
    """Call the experiment; what it draws at random is the same on every worker."""
    with isolated(request.seed, "experiment"):
        return resolve(request.source or request.experiment)(**request.arguments)


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's arguments as they stand in ``run.json``; paths are strings."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(arguments), default=str))
    return plain


class _Worker:
    def __init__(self, comm: Comm, request: Request, run: Run) -> None:
        if run.batch_size % comm.size:
            raise ValueError(
                f"{request.experiment}: batch_size must be a multiple of the {comm.size} workers; got "
                f"{run.batch_size}."
            )
        agree(comm, "the method", repr({**run.methods(), "seed": request.seed}))
        agree(comm, "the data", f"{run.data.name}, {len(run.data.train)}, {len(run.data.test)}")
        agree(comm, "when to save", repr(request.checkpoint_every))
        self.data = run.data.to(request.device)
        with isolated(request.seed, "model"):
            self.model = run.model().to(request.device)
        self.multiply_adds = multiply_adds(self.model, run.data.train.inputs[:1])
        optimizer = run.optimizer(p for p in self.model.parameters() if p.requires_grad)
        self.sampler = Shuffle(
            len(run.data.train),
            batch_size=run.batch_size // comm.size,
            rank=comm.rank,
            size=comm.size,
            seed=request.seed,
        )
        steps = run.epochs * len(self.sampler)
        self.replica = Replica(self.model, optimizer, lambda step: run.schedule(step / steps))
        agree(comm, "the model", repr(Layout.of(dict(self.model.named_parameters()))))
        self.streams = Streams.start(self.replica, run.exchange, request.seed, comm.rank)
        self.comm, self.request, self.run, self.steps = comm, request, run, steps
        self.leads = comm.rank == 0
        self.metrics = request.folder / "metrics.jsonl"
        self.rows: list[dict[str, Any]] = []

    def train(self) -> dict[str, Any]:
        """All epochs, then the summary."""
        comm, replica, request = self.comm, self.replica, self.request
        saved = request.folder / "checkpoint"
        resumed = checkpoint.restore(saved, replica, self.sampler, self.streams, comm)
        checkpoint.forget(saved, comm.rank, beyond=replica.step if resumed else -1)
        self._open(resumed)
        with Progress(request.experiment, self.steps, comm, quiet=request.quiet) as progress:
            progress.show(replica.step)
            if not resumed:
                self._share_start()
                self._evaluate(progress, epoch=0)
            elif replica.step == self.steps:  # it was finished; only the summary may be missing
                self.loss, self.accuracy = evaluate(self.model, self.data.test, comm)
            for record in fit(
                replica,
                self.data.train,
                self.sampler,
                self.run.objective,
                exchange=self.run.exchange,
                comm=comm,
                epochs=self.run.epochs,
                streams=self.streams,
            ):
                if self.leads:
                    self._note(record.step, record.epoch, float(record.loss))
                    progress.show(record.step, loss=float(record.loss))
                ends_epoch = record.step % len(self.sampler) == 0
                if ends_epoch:
                    self._evaluate(progress, epoch=record.epoch + 1)
                every = request.checkpoint_every or len(self.sampler)
                if record.step % every == 0:
                    self._flush()
                    with comm.ledger.paused():  # no worker is ahead of the others when it saves
                        comm.max_(torch.zeros(1))
                    checkpoint.save(saved, replica, self.sampler, self.streams, comm)
        return self._finish()

    def _open(self, resumed: bool) -> None:
        """Describe the run; on resumption drop the rows that the checkpoint does not know of."""
        folder, step = self.request.folder, self.replica.step
        # One description per machine: what goes on from it need not share a file system.
        if self.leads or os.environ.get("LOCAL_RANK") == "0":
            self._describe(resumed)
        if not self.leads:
            self.board = TensorBoard(None)
            return
        if resumed:
            for name in ("metrics.jsonl", "ledger.jsonl"):
                keep_rows(folder / name, lambda row: row["step"] <= step)
        else:
            for name in ("metrics.jsonl", "ledger.jsonl"):
                (folder / name).unlink(missing_ok=True)
        self.board = TensorBoard(folder, purge_step=step + 1 if resumed else None)

    def _describe(self, resumed: bool) -> None:
        """Write ``run.json``.

        Raises:
            StoreError: the run goes on, but with other methods than it was started with.
        """
        path, methods = self.request.folder / "run.json", self.run.methods()
        if resumed:
            before = read_json(path, "a run folder").get("methods")
            if before != methods:
                raise StoreError(
                    f"{path} says that the run was started with {before}, and now it is {methods}; "
                    "resume with the code and arguments that it was started with."
                )
        write_json(
            path,
            {
                "format": FORMAT,
                "experiment": self.request.experiment,
                "method": repr(self.run.exchange),
                "methods": methods,
                "model": repr(self.model),
                "data": self.run.data.name,
                "source": self.request.source,
                "arguments": plain_arguments(self.request.arguments),
                "seed": self.request.seed,
                "workers": self.comm.size,
                "engine": self.comm.engine,
                "checkpoint_every": self.request.checkpoint_every,
                "device": self.request.device,
                "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                **environment(),
            },
        )

    def _share_start(self) -> None:
        """Rank 0's start weights for all, so that builds which differ between machines do not matter."""
        with self.comm.ledger.paused(), torch.no_grad():
            for x in self.model.state_dict().values():
                self.comm.broadcast_(x)
        self.streams.state = self.run.exchange.init(self.replica)  # it may keep the weights

    def _note(self, step: int, epoch: int, loss: float) -> None:
        spent = self.comm.ledger.spent()
        seconds = spent.compute_s + spent.wait_s
        self.rows.append(
            {"kind": "step", "step": step, "epoch": epoch, "loss": loss, "seconds": seconds}
        )
        self.board.add(step, {"train/loss": loss, "ledger/bits_sent_by_rank_0": spent.bits_sent})

    def _flush(self) -> None:
        append_rows(self.metrics, self.rows)
        self.rows.clear()

    def _evaluate(self, progress: Progress, epoch: int) -> None:
        """Test loss and accuracy, and every worker's ledger."""
        if self.replica.step:
            average_buffers(self.model, self.comm)
        loss, accuracy = evaluate(self.model, self.data.test, self.comm)
        self.loss, self.accuracy = loss, accuracy
        self._measure_memory()
        workers = self._ledgers()
        if not self.leads:
            return
        everyone, step = total(workers), self.replica.step
        self._flush()
        evaluation = {
            "kind": "eval",
            "step": step,
            "epoch": epoch,
            "loss": loss,
            "accuracy": accuracy,
            "seconds": workers[0].compute_s + workers[0].wait_s,
            "bits_sent": everyone.bits_sent,
        }
        append_rows(self.metrics, [evaluation])
        append_rows(
            self.request.folder / "ledger.jsonl",
            [
                {"step": step, "epoch": epoch, "worker": rank, **asdict(spent)}
                for rank, spent in enumerate(workers)
            ],
        )
        self.board.add(
            step,
            {"test/loss": loss, "test/accuracy": accuracy, "ledger/bits_sent": everyone.bits_sent},
        )
        progress.evaluated(epoch, loss, accuracy, everyone.bits_sent)

    def _measure_memory(self) -> None:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.comm.ledger.add(peak_memory_bytes=resident)

    def _ledgers(self) -> list[Spent]:
        own = torch.frombuffer(
            bytearray(json.dumps(asdict(self.comm.ledger.spent())).encode()), dtype=torch.uint8
        )
        with self.comm.ledger.paused():
            messages = self.comm.gather(Message({"ledger": own}, ragged=True))
        return [Spent(**json.loads(bytes(m.buffers["ledger"].tolist()))) for m in messages]

    def _finish(self) -> dict[str, Any]:
        workers = self._ledgers()
        everyone = total(workers)
        solo = self.comm.size == 1
        processes = self.comm.engine != "in_process"
        tensors = [*self.model.parameters(), *self.model.buffers()]
        summary = {
            "experiment": self.request.experiment,
            "method": repr(self.run.exchange),
            "data": self.run.data.name,
            "engine": self.comm.engine,
            "workers": self.comm.size,
            "seed": self.request.seed,
            "epochs": self.run.epochs,
            "steps": everyone.steps,
            "accuracy": self.accuracy,
            "perplexity": None,
            "return": None,
            "loss": self.loss,
            "bits_sent": everyone.bits_sent,
            "bits_received": everyone.bits_received,
            "messages": everyone.messages,
            "compute_s": everyone.compute_s / self.comm.size,
            "wait_s": everyone.wait_s / self.comm.size if processes else None,
            "wall_s": max(w.compute_s + w.wait_s for w in workers),
            "staleness_mean": 0.0,
            "staleness_max": 0,
            "peak_memory_bytes": everyone.peak_memory_bytes,
            "peak_activation_bytes": everyone.peak_activation_bytes,
            "examples": everyone.examples,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "multiply_adds": self.multiply_adds,
            "model_bits": sum(8 * x.nbytes for x in tensors),
        }
        if solo:
            summary["wait_s"] = 0.0
        if self.leads:
            folder = self.request.folder
            # Copies, because safetensors refuses tensors that share memory, as tied weights do.
            state = {k: v.cpu().contiguous().clone() for k, v in self.model.state_dict().items()}
            write_whole(folder / "model.safetensors", lambda beside: save_file(state, beside))
            write_json(folder / "summary.json", summary)
            self.board.close()
        return summary


def multiply_adds(model: nn.Module, example: torch.Tensor) -> int:
    """Multiply-adds of one forward pass on ``example``, shape (1, ...), counted on the operators run.

    Raises:
        ValueError: the model does not take such an example.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(example.to(device))
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} does not take inputs of shape {tuple(example.shape)} and type "
            f"{example.dtype}: {error}"
        ) from error
    model.train(was_training)
    return int(counter.get_total_flops()) // 2
