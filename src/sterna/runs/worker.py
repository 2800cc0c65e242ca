"""One worker of one synchronous run: train, evaluate, save, account. The same whatever started it."""

import json
from dataclasses import asdict
from typing import Any

import torch

from sterna.comm.agreement import agree
from sterna.evaluation import average_buffers, evaluate
from sterna.exchange.weights import agreed
from sterna.flat import Layout
from sterna.ledger import Spent, total
from sterna.loop import Streams, fit
from sterna.randomness import isolated
from sterna.replica import Replica
from sterna.runs import checkpoint, survivors
from sterna.runs.progress import Progress
from sterna.runs.recorder import Recorder, resident_bytes
from sterna.runs.rehearsal import rehearse
from sterna.runs.request import Request, build
from sterna.runs.run import Run
from sterna.samplers.shuffle import Shuffle
from sterna.seams import Comm, Message


def work(comm: Comm, request: Request, run: Run | None = None) -> dict[str, Any]:
    """Run one worker to the end; the summary, as it stands in ``summary.json`` of rank 0's folder.

    Raises:
        ValueError: the configuration does not fit, or a gradient was not finite.
        StoreError: the folder cannot be written.
        PeerLost: another worker failed.
    """
    run = run or build(request)
    rehearse(run.exchange)
    with isolated(request.seed, "global", comm.rank):
        worker = _Worker(comm, request, run)
        try:
            return worker.train()
        finally:
            worker.recorder.close()


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
        optimizer = run.optimizer(p for p in self.model.parameters() if p.requires_grad)
        self.sampler = Shuffle(
            len(run.data.train),
            batch_size=run.batch_size // comm.size,
            rank=comm.rank,
            size=comm.size,
            seed=request.seed,
        )
        steps = run.epochs * len(self.sampler)
        every = getattr(run.exchange, "every", 1)  # of exchanges that meet in rounds
        if every > steps:
            raise ValueError(
                f"{request.experiment}: every must be at most the {steps} steps of the run; got {every}. "
                "The workers would never meet, and the weights they agreed on stay as they began: meet "
                "more often, or train for more epochs."
            )
        self.replica = Replica(
            self.model, optimizer, lambda step: run.schedule(step / steps), run.clip_norm
        )
        agree(comm, "the model", repr(Layout.of(dict(self.model.named_parameters()))))
        self.streams = Streams.start(self.replica, run.exchange, request.seed, comm.rank)
        self.comm, self.request, self.run, self.steps = comm, request, run, steps
        self.leads = comm.rank == 0
        self.recorder = Recorder(request, run, self.model, comm.size, comm.engine, self.leads)

    def train(self) -> dict[str, Any]:
        """All epochs, then the summary."""
        comm, replica, request = self.comm, self.replica, self.request
        saved = request.folder / "checkpoint"
        own = replica, self.sampler, self.streams
        recalled = survivors.recall(comm, *own)
        resumed = recalled or checkpoint.restore(saved, *own, comm)
        checkpoint.forget(saved, comm.rank, beyond=replica.step if resumed else -1)
        self.recorder.open(replica.step, resumed)
        with Progress(
            request.experiment,
            self.steps,
            lambda: comm.ledger.spent().bits_sent,
            self.data.merit,
            quiet=request.quiet or not self.leads,
        ) as progress:
            progress.show(replica.step)
            if not resumed:
                self._share_start()
                self._evaluate(progress, epoch=0)
            elif replica.step == self.steps:  # it was finished; only the summary may be missing
                with agreed(replica, self.streams.state):
                    self.reached = evaluate(self.model, self.data.test, comm)
            if not recalled:
                survivors.keep(comm, *own)
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
                    spent = comm.ledger.spent()
                    seconds = spent.compute_s + spent.wait_s
                    self.recorder.step(record.step, record.epoch, float(record.loss), seconds)
                    progress.show(record.step, loss=float(record.loss))
                ends_epoch = record.step % len(self.sampler) == 0
                if ends_epoch:
                    self._evaluate(progress, epoch=record.epoch + 1)
                every = request.checkpoint_every or len(self.sampler)
                saves = record.step % every == 0
                if saves:
                    self.recorder.flush()
                    with comm.ledger.paused():  # no worker is ahead of the others when it saves
                        comm.max_(torch.zeros(1))
                    checkpoint.save(saved, *own, comm)
                # Never older than the newest checkpoint, which a worker that goes back would forget.
                if saves or survivors.is_due(comm, replica):
                    self.recorder.flush()  # what is kept is not done again, so its rows are written
                    survivors.keep(comm, *own)
        return self._finish()

    def _share_start(self) -> None:
        """Rank 0's start weights for all, so that builds which differ between machines do not matter."""
        with self.comm.ledger.paused(), torch.no_grad():
            for x in self.model.state_dict().values():
                self.comm.broadcast_(x)
        self.streams.state = self.run.exchange.init(self.replica)  # it may keep the weights

    def _evaluate(self, progress: Progress, epoch: int) -> None:
        """What was reached on the test part, and every worker's ledger."""
        if self.replica.step:
            average_buffers(self.model, self.comm)
        with agreed(self.replica, self.streams.state):
            self.reached = evaluate(self.model, self.data.test, self.comm)
            if self.leads:
                self.recorder.look_at_weights()  # before the workers meet: nobody waits for it later
        self.comm.ledger.add(peak_memory_bytes=resident_bytes())
        workers = self._ledgers()
        if not self.leads:
            return
        seconds = workers[0].compute_s + workers[0].wait_s
        everyone = total(workers)
        self.recorder.evaluated(
            self.replica.step, epoch, self.reached, workers, seconds, everyone.bits_sent
        )
        score = self.reached.of(self.data.merit)
        progress.evaluated(epoch, self.reached.loss, score, everyone.bits_sent)

    def _ledgers(self) -> list[Spent]:
        own = torch.frombuffer(
            bytearray(json.dumps(asdict(self.comm.ledger.spent())).encode()), dtype=torch.uint8
        )
        with self.comm.ledger.paused():
            messages = self.comm.gather(Message({"ledger": own}, ragged=True))
        return [Spent(**json.loads(bytes(m.buffers["ledger"].tolist()))) for m in messages]

    def _finish(self) -> dict[str, Any]:
        workers = self._ledgers()
        figures: dict[str, Any] = {"wall_s": max(w.compute_s + w.wait_s for w in workers)}
        if self.comm.size == 1:
            figures["wait_s"] = 0.0
        elif self.comm.engine == "in_process":
            figures["wait_s"] = None
        with agreed(self.replica, self.streams.state):
            return self.recorder.finish(self.reached, total(workers), figures)
