"""Time of codecs on 10 million floats, one thread: encode, and decode with the mean of 4 messages.

    python benchmarks/codecs.py --rounds 21 --out benchmarks/results/codecs

The gradient is that of ten layers of 1000 x 1000. All arms take turns, one call each per round, so
that what else the machine does hits them alike; medians over the rounds. A memcpy of the gradient
is the floor; "GB/s" is bytes of gradient (40 MB) over time. Every call makes its result in fresh
memory, as a training step does, except the memcpy and PowerSGD, which write into buffers that are
there.

The path for other devices takes its turns after the others: it allocates and frees gigabytes, and
on a virtual machine the next arm then pays for getting memory back from the host.

PowerSGD is the arithmetic of torch's hook at rank 2 and nothing else: P = M Q, orthogonalise P
(torch's own function), Q = M^T P for the encoder, M = P Q^T for the decoder. Its sums travel by
all-reduce, so there is no mean of messages to decode; the decoder also counts the error feedback's
subtraction.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numba
import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _orthogonalize

from results import write
from sterna.codecs import portable, terngrad
from sterna.codecs.error_feedback import ErrorFeedback
from sterna.codecs.fp16 import Fp16
from sterna.codecs.identity import Identity
from sterna.codecs.terngrad import TernGrad
from sterna.comm.solo import Solo
from sterna.flat import Flat
from sterna.randomness import generator
from sterna.seams import Averaging, Codec, Message

NUM_LAYERS, SIDE, NUM_MESSAGES = 10, 1000, 4
GIGABYTES = NUM_LAYERS * SIDE * SIDE * 4 / 1e9


class Arm(NamedTuple):
    name: str
    encode: Callable[[], object]
    decode_mean: Callable[[], object] | None


def _gradient(seed: int) -> Flat:
    rng = generator(seed)
    return Flat.of({f"{k}": torch.randn(SIDE, SIDE, generator=rng) for k in range(NUM_LAYERS)})


def codec_arm(name: str, codec: Codec) -> Arm:
    comm, rng = Solo(), generator(0, "codec")
    gradients = [_gradient(k) for k in range(NUM_MESSAGES)]
    messages: list[Message] = []
    for k, g in enumerate(gradients):
        message, _ = codec.encode(g, codec.init(g), comm, rng)
        if k and isinstance(codec, TernGrad) and codec.share_scalers:  # as comm.max_ leaves it
            message = Message({**message.buffers, "scale": messages[0].buffers["scale"]})
        messages.append(message)
    state = codec.init(gradients[0])

    def encode() -> None:
        nonlocal state
        _, state = codec.encode(gradients[0], state, comm, rng)

    def decode_mean() -> object:
        assert isinstance(codec, Averaging)
        return codec.decode_mean(messages, gradients[0])

    if isinstance(codec, Averaging):
        return Arm(name, encode, decode_mean)
    return Arm(name, encode, lambda: codec.decode(messages[0], gradients[0]))


def plain_torch_arm() -> Arm:
    """The same codec on the path that other devices take."""
    arm = codec_arm("TernGrad on the path for other devices, here on the CPU", TernGrad())

    def patched(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with mock.patch.object(terngrad, "kernels", portable):
                return call()

        return run

    assert arm.decode_mean is not None
    return Arm(arm.name, patched(arm.encode), patched(arm.decode_mean))


def naive_arm() -> Arm:
    """What one writes first: a draw per entry, masks, shifts and ors."""
    gradient, rng = _gradient(0), generator(0, "naive")
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)

    def encode() -> tuple[list[torch.Tensor], torch.Tensor]:
        scales, codes = [], []
        for g in gradient.values():
            limit = 2.5 * g.std(correction=0)
            g = g.clamp(-limit, limit)
            s = g.abs().max()
            fires = torch.rand(g.shape, generator=rng) < g.abs() / s
            codes.append((g.sign() * fires + 1).to(torch.uint8).view(-1))
            scales.append(s)
        grouped = torch.cat(codes).view(-1, 4) << shifts
        packed = grouped[:, 0] | grouped[:, 1] | grouped[:, 2] | grouped[:, 3]
        return scales, packed

    messages = [encode() for _ in range(NUM_MESSAGES)]

    def decode_mean() -> torch.Tensor:
        total = torch.zeros(NUM_LAYERS, SIDE * SIDE)
        for scales, packed in messages:
            codes = ((packed[:, None] >> shifts) & 3).view(NUM_LAYERS, -1).float() - 1
            total += codes * torch.stack(scales)[:, None]
        return total / NUM_MESSAGES

    return Arm("TernGrad as one writes it in torch", encode, decode_mean)


def power_sgd_arm(rank: int = 2) -> Arm:
    m = _gradient(0).buffer.view(NUM_LAYERS, SIDE, SIDE)
    p, q = torch.empty(NUM_LAYERS, SIDE, rank), torch.randn(NUM_LAYERS, SIDE, rank)
    residual, result = torch.zeros_like(m), torch.empty_like(m)

    def encode() -> None:
        torch.add(m, residual, out=result)  # error feedback, as the hook has it by default
        _orthogonalize(q)
        torch.bmm(result, q, out=p)
        _orthogonalize(p)
        torch.bmm(result.transpose(1, 2), p, out=q)

    def decode() -> None:
        torch.bmm(p, q.transpose(1, 2), out=result)
        torch.sub(m, result, out=residual)

    return Arm(f"PowerSGD rank {rank}, arithmetic of torch's hook", encode, decode)


def memcpy_arm() -> Arm:
    source = _gradient(0).buffer
    target = torch.zeros_like(source)
    return Arm("memcpy", lambda: target.copy_(source), None)


def arms() -> list[Arm]:
    return [
        memcpy_arm(),
        codec_arm("Identity (check only)", Identity()),
        codec_arm("Fp16 (decode: one sum)", Fp16()),
        codec_arm("TernGrad, 2 bits", TernGrad()),
        codec_arm("TernGrad, 2 bits, a scaler per worker", TernGrad(share_scalers=False)),
        codec_arm("TernGrad, dense", TernGrad(dense=True)),
        codec_arm(
            "TernGrad, dense, a scaler per worker", TernGrad(dense=True, share_scalers=False)
        ),
        codec_arm("ErrorFeedback(TernGrad)", ErrorFeedback(inner=TernGrad())),
        naive_arm(),
        power_sgd_arm(),
    ]


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(rounds: int) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    competing, apart = arms(), [plain_torch_arm()]
    encode: dict[str, list[float]] = {arm.name: [] for arm in competing + apart}
    decode: dict[str, list[float]] = {arm.name: [] for arm in competing + apart}
    for group, num in ((competing, rounds), (apart, max(rounds // 4, 1))):
        for k in range(num + 1):
            for arm in group:
                spent = _seconds(arm.encode)
                if k > 0:  # the first round compiles and touches memory
                    encode[arm.name].append(spent)
                if arm.decode_mean is not None:
                    spent = _seconds(arm.decode_mean)
                    if k > 0:
                        decode[arm.name].append(spent)
    floor = statistics.median(encode["memcpy"])
    rows: list[dict[str, object]] = []
    for arm in competing + apart:
        row: dict[str, object] = {"arm": arm.name}
        for what, times in (("encode", encode[arm.name]), ("decode", decode[arm.name])):
            if times:
                middle = statistics.median(times)
                row |= {
                    f"{what}_ms": 1e3 * middle,
                    f"{what}_min_ms": 1e3 * min(times),
                    f"{what}_gb_per_s": GIGABYTES / middle,
                    f"{what}_over_memcpy": middle / floor,
                }
        rows.append(row)
    return rows


HEADER = (
    *("10 million floats", "encode, ms", "GB/s", "x memcpy"),
    *("decode + mean of 4, ms", "GB/s", "x memcpy"),
)


def cells(row: dict[str, object]) -> list[str]:
    found = [str(row["arm"])]
    for what in ("encode", "decode"):
        for figure in ("ms", "gb_per_s", "over_memcpy"):
            value = row.get(f"{what}_{figure}")
            found.append(f"{value:.1f}" if isinstance(value, float) else "")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.md")
    arguments = parser.parse_args()
    rows = measure(arguments.rounds)
    write(
        arguments.out,
        "Codecs: encode, and decode with the mean of 4 messages, one thread",
        HEADER,
        [cells(row) for row in rows],
        {"rounds": arguments.rounds, "numba": numba.__version__, "rows": rows},
    )


if __name__ == "__main__":
    main()
