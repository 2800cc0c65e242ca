"""The DDP hook against plain DDP: two real Gloo processes on the loopback interface.

Both processes run this file as a script and take scenarios by name, the functions so marked:
starting them is what takes the time. Each returns what JSON can say; the tests compare.
"""

import contextlib
import gc
import hashlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sterna.codecs.error_feedback import ErrorFeedback
from sterna.codecs.identity import Identity
from sterna.codecs.terngrad import TernGrad
from sterna.comm.agreement import Disagreement
from sterna.comm.distributed import Distributed
from sterna.exchange.ddp_hook import DdpHook, register
from sterna.flat import Flat, Named
from sterna.randomness import generator, isolated
from sterna.seams import Comm, Message, NotFinite, PeerLost, State

SCENARIO_TIMEOUT_S = 60.0


# Codecs small enough to check by eye.


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Everything as it is."""

    summable: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True

    def init(self, like: Named) -> State:
        return {}

    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        for name, x in named.items():
            if not x.isfinite().all():
                raise NotFinite(f"{name} is not finite")
        return Message({"values": Flat.of(named).buffer}), state

    def decode(self, message: Message, like: Named) -> Named:
        return Flat(Flat.of(like).layout, message.buffers["values"])


@dataclass(frozen=True, kw_only=True)
class Coins:
    """Ternary with one scale that the workers agree on first: two collectives a bucket."""

    summable: ClassVar[bool] = False
    unbiased: ClassVar[bool] = True

    def init(self, like: Named) -> State:
        return {}

    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        x = Flat.of(named).buffer
        scale = comm.max_(x.abs().max().reshape(1))
        coins = torch.rand(x.shape, generator=rng) < x.abs() / scale.clamp(min=1e-30)
        return Message({"trits": (x.sign() * coins).to(torch.int8), "scale": scale}), state

    def decode(self, message: Message, like: Named) -> Named:
        flat = Flat.of(like)
        trits, scale = message.buffers["trits"], message.buffers["scale"]
        return Flat(flat.layout, (trits * scale).to(flat.buffer.dtype))


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What was lost goes into the next message. Sends the largest element of each tensor only."""

    summable: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False

    def init(self, like: Named) -> State:
        return {"residual": Flat.zeros_like(like)}

    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        assert tuple(state["residual"]) == tuple(named), "the state is another bucket's"
        wanted = Flat.of({name: x + state["residual"][name] for name, x in named.items()})
        sent = Flat.zeros_like(wanted)
        for name, x in wanted.items():
            noisy = x.flatten().abs() * torch.rand(x.numel(), generator=rng)
            k = int(noisy.argmax())
            sent[name].view(-1)[k] = x.reshape(-1)[k]
        residual = Flat(wanted.layout, wanted.buffer - sent.buffer)
        return Message({"values": sent.buffer}), {"residual": residual}

    def decode(self, message: Message, like: Named) -> Named:
        return Flat(Flat.of(like).layout, message.buffers["values"])


@dataclass(frozen=True, kw_only=True)
class Weighted(Whole):
    """Another codec than `Whole`, to disagree about."""

    weight: int = 0


CODECS = {
    "whole": Whole(),
    "coins": Coins(),
    "feedback": Feedback(),
    "identity": Identity(),
    "terngrad": TernGrad(),
    "terngrad with feedback": ErrorFeedback(inner=TernGrad()),
}


# What both processes run.


class Net(nn.Module):
    """Twelve parameters; ``side`` is used only when asked for."""

    def __init__(self, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(24, 24, dtype=dtypes[k % len(dtypes)]) for k in range(5)
        )
        self.side = nn.Linear(24, 24)
        self.scale = nn.Parameter(torch.ones(24))

    def forward(self, x: Tensor, with_side: bool = True) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        x = x.float()
        if with_side:
            x = x + self.side(x)
        return x * self.scale


def make(codec: str | None, seed: int = 0, **options: Any) -> tuple[Any, DdpHook | None]:
    dtypes = options.pop("dtypes", (torch.float32,))
    with isolated(0, "model"):
        model = Net(dtypes)
    ddp = DistributedDataParallel(model, **options)
    return ddp, None if codec is None else register(ddp, CODECS[codec], seed=seed)


def batch(step: int, rank: int | None = None) -> Tensor:
    rng = generator(7, step, dist.get_rank() if rank is None else rank)
    return torch.randn(8, 24, generator=rng)


def digest(module: nn.Module) -> str:
    parts = hashlib.sha256()
    for name, p in module.named_parameters():
        parts.update(name.encode() + p.detach().numpy().tobytes())
        parts.update(b"none" if p.grad is None else p.grad.numpy().tobytes())
    return parts.hexdigest()[:16]


def descend(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad


def train(ddp: Any, steps: Sequence[int], micro: int = 1, unused: bool = False) -> list[str]:
    digests = []
    for step in steps:
        ddp.zero_grad()
        for k in range(micro):
            with_side = not unused or step % 2 == 1
            with ddp.no_sync() if k < micro - 1 else contextlib.nullcontext():
                ddp(batch(step * micro + k), with_side).square().mean().backward()
        digests.append(digest(ddp.module))
        descend(ddp.module)
    return digests


MANY = {"bucket_cap_mb": 0.001}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "many buckets": (MANY, {}),
    "unused parameters": ({**MANY, "find_unused_parameters": True}, {"unused": True}),
    "accumulation": (MANY, {"micro": 3}),
    "static graph": ({**MANY, "static_graph": True}, {}),
    "gradients as views": ({**MANY, "gradient_as_bucket_view": True}, {}),
    "two dtypes": ({**MANY, "dtypes": (torch.float32, torch.float64)}, {}),
}

SCENARIOS: dict[str, Callable[..., Any]] = {}


def scenario(function: Callable[..., Any]) -> Callable[..., Any]:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def trained(setting: str, codec: str | None) -> dict[str, Any]:
    options, how = SETTINGS[setting]
    ddp, hook = make(codec, **options)
    digests = train(ddp, range(5), **how)
    result: dict[str, Any] = {"digests": digests}
    if hook is not None:
        result |= {
            "steps": hook.ledger.spent().steps,
            "bits_sent": hook.ledger.spent().bits_sent,
            "buckets": len(hook.state_dict()["buckets.sizes"]),
            "numel": sum(p.numel() * 8 * p.itemsize for p in ddp.parameters()),
        }
        hook.close()
    return result


@scenario
def own_collectives() -> list[str]:
    """The loop's own collectives, in the middle of backward, with buckets in flight."""
    ddp, hook = make("coins", **MANY)
    sums = []

    def own(gradient: Tensor) -> None:
        total = gradient.abs().sum()
        dist.all_reduce(total)
        sums.append(total.item())

    for layer in ddp.module.layers:
        layer.weight.register_hook(own)
    with hook:
        digests = train(ddp, range(4))
    return [*digests, json.dumps(sums)]


@scenario
def same_batch() -> list[float]:
    """Every rank has the same gradient: what differs then are the coins."""
    ddp, hook = make("coins")
    with hook:
        ddp(batch(0, rank=0)).square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in ddp.parameters()])
    return sorted((gradient.abs() / gradient.abs().max()).unique().tolist())


@scenario
def by_hand() -> bool:
    """The hook's mean is that of the messages that the codec makes with the documented coins."""
    ddp, hook = make("coins", seed=5, find_unused_parameters=True)
    with hook:
        with ddp.no_sync():
            ddp(batch(0)).square().mean().backward()
        local = [p.grad for p in ddp.parameters()]
        ddp.zero_grad()
        ddp(batch(0)).square().mean().backward()
        order = hook.state_dict()["buckets.order"].tolist()
        names = [name for name, _ in ddp.module.named_parameters()]
        local = Flat.of({names[k]: local[k] for k in order})
        gathered = [torch.empty_like(local.buffer) for _ in range(2)]
        dist.all_gather(gathered, local.buffer)
        scale = max(x.abs().max() for x in gathered)
        total = torch.zeros_like(local.buffer)
        for rank, x in enumerate(gathered):
            coins = torch.rand(x.shape, generator=generator(5, "ddp", rank)) < x.abs() / scale
            total += (x.sign() * coins).to(torch.int8) * scale
        mean = Flat(local.layout, total / 2)
        return all(torch.equal(p.grad, mean[name]) for name, p in ddp.module.named_parameters())


@scenario
def resumed(setting: str, codec: str) -> dict[str, list[str]]:
    options, how = SETTINGS[setting]
    ddp, hook = make(codec, **options)
    settled = 3 if "static_graph" in options else 2
    before = train(ddp, range(settled), **how)
    weights = {name: x.clone() for name, x in ddp.module.state_dict().items()}
    saved = safetensors.torch.save(hook.state_dict())
    straight = train(ddp, range(settled, settled + 4), **how)

    # The same DDP object, rewound.
    ddp.module.load_state_dict(weights)
    hook.load_state_dict(safetensors.torch.load(saved))
    rewound = train(ddp, range(settled, settled + 4), **how)
    step = int(hook.state_dict()["step"])
    hook.close()

    # A new one, which starts with one bucket again.
    results = {}
    for name in ("restored", "forgotten"):
        ddp, hook = make(codec, **options)
        ddp.module.load_state_dict(weights)
        if name == "restored":
            hook.load_state_dict(safetensors.torch.load(saved))
            assert safetensors.torch.save(hook.state_dict()) == saved
        results[name] = train(ddp, range(settled, settled + 4), **how)
        hook.close()
    assert step == settled + 4
    return {"before": before, "straight": straight, "rewound": rewound, **results}


@scenario
def poisoned() -> dict[str, Any]:
    """Rank 1 has a NaN in one of many buckets at step 2."""
    ddp, hook = make("whole", **MANY)
    train(ddp, range(2))

    def poison(gradient: Tensor) -> Tensor:
        return gradient * float("nan") if dist.get_rank() == 1 else gradient

    ddp.module.layers[2].weight.register_hook(poison)
    errors, start = [], time.perf_counter()
    for step in (2, 3):
        try:
            train(ddp, [step])
        except (NotFinite, PeerLost, RuntimeError) as error:
            errors.append([type(error).__name__, str(error)])
    seconds = time.perf_counter() - start
    total = torch.ones(1)
    dist.all_reduce(total)  # the default group is none the worse; and nobody closed a hook so far
    hook.close()
    return {"errors": errors, "seconds": seconds, "threads": threads(), "sum": total.item()}


@scenario
def refused() -> list[str]:
    """What is said about wrong uses; each one must raise."""
    said = []

    def note(kind: type[Exception], call: Callable[[], object]) -> None:
        try:
            call()
        except kind as error:
            said.append(str(error))
        else:
            said.append(f"nothing was raised instead of {kind.__name__}")

    ddp, hook = make("feedback")
    train(ddp, [0])
    note(TypeError, lambda: register(ddp.module, Whole()))
    note(TypeError, lambda: register(ddp, Whole))
    note(TypeError, lambda: register(ddp, "terngrad"))
    note(RuntimeError, lambda: register(ddp, Whole()))
    fresh = DistributedDataParallel(nn.Linear(2, 2))
    fresh._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    note(RuntimeError, lambda: register(fresh, Whole()))
    fresh = DistributedDataParallel(nn.Linear(2, 2))
    note(Disagreement, lambda: register(fresh, Weighted(weight=dist.get_rank())))
    state = hook.state_dict()
    note(ValueError, lambda: hook.load_state_dict({**state, "rank": 1 - state["rank"]}))
    wrong = {key: x for key, x in state.items() if key != "codec.residual.side.bias"}
    note(ValueError, lambda: hook.load_state_dict(wrong))
    wrong = {**state, "codec.residual.side.bias": torch.zeros(3)}
    note(ValueError, lambda: hook.load_state_dict(wrong))
    hook.close()
    hook.close()
    note(RuntimeError, lambda: train(ddp, [1]))
    fresh = DistributedDataParallel(nn.Embedding(5, 2, sparse=True))
    with register(fresh, Whole()):
        note(TypeError, lambda: fresh(torch.tensor([1])).sum().backward())
    return said


@scenario
def subgroup() -> bool:
    """DDP over a group of one rank each: nothing is exchanged."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    ddp = DistributedDataParallel(nn.Linear(3, 1), process_group=groups[dist.get_rank()])
    for _ in range(2):
        with register(ddp, Whole()) as hook:
            ddp(torch.full((1, 3), 1.0 + dist.get_rank())).sum().backward()
            exact = torch.equal(ddp.module.weight.grad, torch.full((1, 3), 1.0 + dist.get_rank()))
            if not exact or hook.ledger.spent().bits_sent:
                return False
        ddp = DistributedDataParallel(nn.Linear(3, 1), process_group=groups[dist.get_rank()])
    return True


@scenario
def uneven() -> list[str]:
    """DDP's own join(): rank 1 runs out of batches first, and then contributes zeros."""
    digests = []
    for codec in (None, "whole"):
        ddp, hook = make(codec, **MANY)
        with ddp.join():
            train(ddp, range(3 + 2 * (dist.get_rank() == 0)))
        digests.append(digest(ddp.module) if dist.get_rank() == 0 else "")
        if hook is not None:
            hook.close()
    return digests


@scenario
def collected() -> list[str]:
    """A hook that is dropped, not closed, ends its thread."""
    ddp, hook = make("whole")
    train(ddp, range(2))
    assert threads()
    del ddp, hook
    gc.collect()
    deadline = time.monotonic() + 5.0  # the thread itself may be the last to let go
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return threads()


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t is not threading.main_thread()]


@scenario
def left_open() -> int:
    """Keeps a hook until the process ends."""
    ddp, hook = make("whole", **MANY)
    train(ddp, range(2))
    SCENARIOS["kept"] = lambda: (ddp, hook)
    return len(threads())


def serve(rank: int, size: int, store: Path) -> None:
    torch.set_num_threads(1)
    comm = Distributed.connect(rank, size, store, timeout_s=SCENARIO_TIMEOUT_S)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": SCENARIOS[name](*arguments)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
    comm.close()


# The tests.


class Workers:
    """``size`` processes that serve scenarios."""

    def __init__(self, size: int, folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(size):
            command = [
                sys.executable,
                "-W",
                "error",
                "-W",
                "ignore::FutureWarning",
                __file__,
                str(rank),
                str(size),
            ]
            with (folder / f"stderr-{rank}").open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        [*command, str(folder / "store")],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        text=True,
                        env=environment,
                    )
                )

    def __call__(self, name: str, *arguments: object) -> list[Any]:
        """The scenario's value on each rank."""
        for process in self.processes:
            process.stdin.write(json.dumps([name, arguments]) + "\n")
            process.stdin.flush()
        deadline, answers = time.monotonic() + SCENARIO_TIMEOUT_S, []
        for rank, process in enumerate(self.processes):
            patience = max(deadline - time.monotonic(), 0.0)
            ready, _, _ = select.select([process.stdout], [], [], patience)
            line = process.stdout.readline() if ready else ""
            if not line:
                self.kill()
                stderr = (self.folder / f"stderr-{rank}").read_text()
                pytest.fail(f"rank {rank} {'died' if ready else 'hangs'} in {name}\n{stderr}")
            answers.append(json.loads(line))
        errors = [f"rank {k}\n{x['error']}" for k, x in enumerate(answers) if "error" in x]
        assert not errors, "\n".join(errors)
        return [answer["value"] for answer in answers]

    def end(self) -> list[int]:
        """Let them end by themselves; the exit codes."""
        try:
            for process in self.processes:
                process.stdin.close()
            return [process.wait(20.0) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(2, tmp_path_factory.mktemp("pair"))
    try:
        yield workers
    finally:
        workers.kill()


@pytest.mark.parametrize("setting", SETTINGS)
def test_identity_is_plain_ddp_to_the_bit(pair: Workers, setting: str) -> None:
    plain = pair("trained", setting, None)
    ours = pair("trained", setting, "identity")
    assert [x["digests"] for x in ours] == [x["digests"] for x in plain]
    assert len(set(plain[0]["digests"])) == 5
    for x in ours:
        assert x["steps"] == 5
        assert x["bits_sent"] == 5 * x["numel"], "2 (N-1)/N of 32 bits an element, N = 2"
        assert x["buckets"] == 1 if setting == "default" else x["buckets"] >= 4


@pytest.mark.parametrize(
    "setting", ["default", "many buckets", "unused parameters", "static graph"]
)
@pytest.mark.parametrize("codec", ["coins", "feedback", "terngrad"])
def test_replicas_stay_equal_to_the_bit(pair: Workers, setting: str, codec: str) -> None:
    first, second = pair("trained", setting, codec)
    assert first["digests"] == second["digests"]
    assert first["digests"] != pair("trained", setting, "whole")[0]["digests"]


def test_the_loops_own_collectives_do_not_interfere(pair: Workers) -> None:
    first, second = pair("own_collectives")
    assert first == second


def test_coins_differ_between_ranks(pair: Workers) -> None:
    for values in pair("same_batch"):
        assert values == [0.0, 0.5, 1.0]


def test_the_mean_by_hand(pair: Workers) -> None:
    assert pair("by_hand") == [True, True]


@pytest.mark.parametrize(
    "setting", ["default", "many buckets", "unused parameters", "static graph"]
)
@pytest.mark.parametrize("codec", ["coins", "feedback", "terngrad with feedback"])
def test_state_survives_save_and_load(pair: Workers, setting: str, codec: str) -> None:
    first, second = pair("resumed", setting, codec)
    assert first == second
    assert first["rewound"] == first["straight"]
    assert first["restored"] == first["straight"]
    assert first["forgotten"] != first["straight"]


def test_errors_surface_from_backward(pair: Workers) -> None:
    first, second = pair("poisoned")
    assert second["errors"][0] == ["NotFinite", "layers.2.weight is not finite"]
    assert first["errors"][0][0] == "PeerLost"
    for x in (first, second):
        assert x["errors"][1][0] == "RuntimeError"
        assert "failed in an earlier step" in x["errors"][1][1]
        assert x["seconds"] < 10.0, "the peer must hear at once, not after the time-out"
        assert x["threads"] == []
        assert x["sum"] == 2.0


def test_wrong_uses_are_refused(pair: Workers) -> None:
    for rank, said in enumerate(pair("refused")):
        expected = [
            "ddp_model must be a torch.nn.parallel.DistributedDataParallel; got Net",
            "codec must be an instance of a codec, such as TernGrad(); got the class Whole",
            "got str",
            "has a communication hook already",
            "has a communication hook already",
            "The workers disagree about the codec or the model: rank 1 differs from rank 0",
            f"was saved by rank {1 - rank}, this is rank {rank}",
            "'codec.residual.side.bias' is missing, too many",
            "'codec.residual.side.bias' is missing, too many",
            "has been closed",
            "The gradient of 'weight' is sparse",
        ]
        assert len(said) == len(expected)
        for sentence, part in zip(said, expected, strict=True):
            assert part in sentence


def test_a_group_of_one(pair: Workers) -> None:
    assert pair("subgroup") == [True, True]


def test_uneven_inputs(pair: Workers) -> None:
    (plain, ours), _ = pair("uneven")
    assert plain == ours


def test_a_dropped_hook_ends_its_thread(pair: Workers) -> None:
    assert pair("collected") == [[], []]


def test_an_open_hook_does_not_keep_the_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        workers = Workers(1, Path(folder))
        try:
            assert workers("left_open") == [1]
        finally:
            codes = workers.end()
        assert codes == [0], (Path(folder) / "stderr-0").read_text()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
