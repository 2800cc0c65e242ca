"""One asynchronous run: a server and its workers, virtual or real; train, evaluate, save, account.

A step of such a run is an update of the server. Every push has a row in ``updates.jsonl``, and
`sterna.runs.replayed` can do them again. Rows of metrics also say how many pushes there had been, and
checkpoints are named by that number.
"""

from collections import Counter
from typing import Any

import torch

from sterna.comm.solo import Solo
from sterna.evaluation import evaluate, reestimate
from sterna.ledger import Spent, total
from sterna.randomness import isolated
from sterna.runs import checkpoint
from sterna.runs.drivers import Driver, driver
from sterna.runs.parts import asynchronous, parts
from sterna.runs.progress import Progress
from sterna.runs.recorder import Recorder, resident_bytes
from sterna.runs.request import Request, build
from sterna.runs.run import Run
from sterna.runs.setting import Setting
from sterna.seams import NotFinite
from sterna.server.records import Account, Landing

_REMOTE = ("ray", "torchrun")
_TOLD = 3


def serve(request: Request, run: Run | None = None) -> dict[str, Any]:
    """Run a server and its workers to the end; the summary, as it stands in ``summary.json``.

    Under torchrun, where only rank 0 has one, the others' is empty.

    Raises:
        ValueError: the configuration does not fit.
        StoreError: the folder cannot be written.
        PeerLost: all workers are lost.
        WorkerFailed: a worker raised an error of its own.
    """
    run = asynchronous(run or build(request), request)
    with isolated(request.seed, "global", 0):
        return _Served(request, run).train()


class _Served:
    def __init__(self, request: Request, run: Run) -> None:
        self.request, self.run = request, run
        self.setting = request.setting or Setting()
        self.parts = parts(request, run)
        self.replica, self.sampler = self.parts.replica, self.parts.sampler
        self.account = Account.start(self.setting.workers)
        self.remote = self.setting.engine in _REMOTE
        self.recorder = Recorder(
            request,
            run,
            self.replica.model,
            self.setting.workers,
            self.setting.engine,
            leads=True,
        )
        self.pushes, self.time_s, self.told, self.lost = 0, 0.0, 0, 0
        self.outcomes: Counter[str] = Counter()
        self.total = run.epochs * len(self.sampler)
        self.saved_in = request.folder / "checkpoint"

    def train(self) -> dict[str, Any]:
        """All epochs, then the summary."""
        saved = self._restore()
        inner = None if saved is None else saved["driver"]
        with driver(self.request, self.run, self.parts, self.account, inner) as found:
            if found is None:  # this process has worked, and another leads
                return {}
            try:
                return self._lead(found, saved is not None)
            finally:
                self.recorder.close()

    def _restore(self) -> dict[str, Any] | None:
        if self.remote:  # the servers go on from their own snapshots
            return None
        saved = checkpoint.newest(self.saved_in)
        if saved is not None:
            checkpoint.load_replica(self.saved_in, self.replica, saved)
            self.pushes, self.time_s = saved["pushes"], saved["time_s"]
            self.outcomes, self.lost = Counter(saved["outcomes"]), saved["lost"]
            ledgers = [*self.account.workers, self.account.server]
            for ledger, spent in zip(ledgers, saved["ledgers"], strict=True):
                ledger.reset(Spent(**spent))
            torch.set_rng_state(saved["global_rng"])
        checkpoint.forget(self.saved_in, 0, beyond=self.pushes if saved else -1)
        return saved

    def _lead(self, found: Driver, resumed: bool) -> dict[str, Any]:
        if self.remote:
            resumed = (self.request.folder / "updates.jsonl").exists()
            if resumed:
                self._recount(self.recorder.outcomes_so_far())
        self.recorder.open(self.pushes, resumed, self.replica.step)
        with Progress(
            self.request.experiment,
            self.total,
            lambda: self.account.total().bits_sent,
            self.run.data.merit,
            quiet=self.request.quiet,
        ) as progress:
            progress.show(self.pushes)
            if self.setting.engine == "ray":
                from sterna.server.ray import NOTICE

                progress.tell(NOTICE)
            if self.remote and self.pushes == self.total:
                found.refresh()
            if not resumed or self.pushes == self.total:
                self._evaluate(progress, epoch=self.pushes // len(self.sampler), note=not resumed)
            if self.pushes < self.total:
                self._work(found, progress)
            return self._finish(found)

    def _work(self, found: Driver, progress: Progress) -> None:
        per_epoch = len(self.sampler)
        every = self.request.checkpoint_every or per_epoch
        for landing in found.run():
            if self.remote:
                self._go_back(landing)
            self.pushes += 1
            self.time_s = landing.time_s
            self.outcomes[landing.outcome] += 1
            loss = float(landing.loss)
            self.recorder.push(self.pushes, landing, loss)
            if landing.outcome == "applied":
                self.recorder.step(
                    landing.step, landing.epoch, loss, landing.time_s, push=self.pushes
                )
            progress.show(self.pushes, loss=loss)
            self._tell(found, landing, progress)
            if self.pushes % per_epoch == 0:
                found.refresh()
                self._evaluate(progress, epoch=self.pushes // per_epoch)
            if self.pushes % every == 0:
                self.recorder.flush()
                self._save(found)

    def _go_back(self, landing: Landing) -> None:
        """A server that was lost goes on from a snapshot: drop the rows of what it has forgotten."""
        expected = landing.step - (1 if landing.outcome == "applied" else 0)
        if self.recorder.last_step > expected:
            self._recount(self.recorder.go_back(expected))

    def _recount(self, outcomes: list[str]) -> None:
        self.pushes, self.outcomes = len(outcomes), Counter(outcomes)

    def _tell(self, found: Driver, landing: Landing, progress: Progress) -> None:
        while self.told < len(found.reasons):
            progress.tell(f"lost {found.reasons[self.told]}; going on")
            self.told += 1
        if landing.reason and self.outcomes["refused"] <= _TOLD:
            progress.tell(f"refused a gradient of worker {landing.worker}: {landing.reason}")
            if self.outcomes["refused"] == _TOLD:
                progress.tell("further ones are counted only, in the summary")

    def _save(self, found: Driver) -> None:
        state = found.state_dict()
        if state is None:
            return
        values = {
            "step": self.replica.step,
            "pushes": self.pushes,
            "time_s": self.time_s,
            "outcomes": dict(self.outcomes),
            "lost": self.lost + len(found.reasons),
            "model": dict(self.replica.model.state_dict()),
            "optimizer": self.replica.optimizer.state_dict(),
            "driver": state,
            "ledgers": [
                vars(ledger.spent()) for ledger in (*self.account.workers, self.account.server)
            ],
            "global_rng": torch.get_rng_state(),
        }
        checkpoint.store(self.saved_in, self.pushes, values)

    def _evaluate(self, progress: Progress, epoch: int, note: bool = True) -> None:
        model, data = self.replica.model, self.run.data
        if self.pushes:
            reestimate(model, data.train)
        self.reached = evaluate(model, data.test, Solo())
        if not note:
            return
        self.recorder.look_at_weights()
        workers = [ledger.spent() for ledger in self.account.workers]
        bits_sent = self.account.total().bits_sent
        self.recorder.evaluated(
            self.replica.step,
            epoch,
            self.reached,
            workers,
            self.time_s,
            bits_sent,
            push=self.pushes,
        )
        score = self.reached.of(data.merit)
        progress.evaluated(epoch, self.reached.loss, score, bits_sent)

    def _finish(self, found: Driver) -> dict[str, Any]:
        self.account.server.add(peak_memory_bytes=resident_bytes())
        everyone = self.account.total()
        if self.outcomes["refused"] == self.pushes:
            raise NotFinite("no gradient of the whole run was finite; lower the learning rate")
        workers = total([ledger.spent() for ledger in self.account.workers])
        figures = {
            "steps": self.replica.step,
            "compute_s": workers.compute_s / self.setting.workers,
            "wait_s": workers.wait_s / self.setting.workers,
            "wall_s": self.time_s,
            "staleness_mean": everyone.staleness_sum / max(self.pushes, 1),
            "staleness_max": everyone.staleness_max,
            "refused": self.outcomes["refused"],
            "late": self.outcomes["late"],
            "lost": self.lost + len(found.reasons),
        }
        return self.recorder.finish(self.reached, everyone, figures)
