"""TernGrad: send sign and chance instead of the gradient, two bits an entry.

For each worker i and each tensor of the gradient g:

    sigma = sqrt(mean((g - mean(g))^2)),   g~ = min(max(g, -c sigma), c sigma)         (1)
    s_i   = max_k |g~_k|                                                               (2)
    s     = max_i s_i                                                                  (3)
    t_k   = sign(g_k) b_k,   P(b_k = 1) = |g~_k| / s                                   (4)
    G     = s/N sum_i t^(i)                                                            (5)

Symbols: c clipping factor (``clip``), sigma population standard deviation of the tensor, g~ clipped
gradient, s scaler of the tensor, shared by the N workers, t codes in {-1, 0, 1}, b coins, G what
every worker's optimizer gets. E[s t] = g~, and the noise of one worker has the power s |g~|_1 -
|g~|^2.
Reference: W. Wen, C. Xu, F. Yan, C. Wu, Y. Wang, Y. Chen, H. Li, "TernGrad: Ternary Gradients to
    Reduce Communication in Distributed Deep Learning", NIPS 2017, arXiv:1705.07878.
Differs from the paper: workers gather the codes and add them up themselves, where the paper's
    server sends the sum back (log2(2N + 1) bits). (1) is left out where sigma is 0: a constant
    tensor, such as one with a single element, would be clipped to nothing. The paper's code uses c
    sigma itself for (2) and so clips at the shared scaler; here each worker clips at its own, as in
    the paper. The coins are multiples of 2^-24: an entry's chance is off by 2^-24 at most.
    ``share_scalers=False`` skips (3).
Cost per step: 2 (``dense``: 1.6) bits an entry and 32 a tensor, and one maximum of 32 bits a tensor
    over the workers; about 25 operations an entry; a quarter of the entries' number in bytes. Hurts
    where a few entries dwarf the rest of their tensor (nearly all codes are 0, noise grows with s),
    with many workers (a gather costs more than a float all-reduce from N = 32), and on links that
    are not slow.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from sterna.codecs import kernels, packing, portable
from sterna.codecs.finite import refuse
from sterna.codecs.form import Form, empty, expect
from sterna.flat import Flat, Layout, Named
from sterna.seams import Comm, Message, State


class _Plan(NamedTuple):
    """Which segments of a layout are ternarised, and which elements travel as floats."""

    ternary: np.ndarray[tuple[int], np.dtype[np.int64]]
    starts: kernels.Bounds
    stops: kernels.Bounds
    kept: list[slice]
    num_codes: int
    num_floats: int


@lru_cache(maxsize=1024)
def _plan(layout: Layout, keep_float: tuple[str, ...]) -> _Plan:
    keep = [any(fnmatchcase(name, p) for p in keep_float) for name in layout.names]
    ternary = np.flatnonzero(~np.array(keep, dtype=bool))
    starts, stops = layout.bounds[:-1][ternary], layout.bounds[1:][ternary]
    kept = [slice(*map(int, layout.bounds[k : k + 2])) for k in np.flatnonzero(keep)]
    num_codes = int((stops - starts).sum())
    return _Plan(ternary, starts, stops, kept, num_codes, layout.num_elements - num_codes)


@dataclass(frozen=True, kw_only=True)
class TernGrad:
    """Ternary gradients with one scaler a tensor.

    Args:
        clip: c, clip each tensor at so many standard deviations before anything else; > 0, or None
            to leave it out, which is unbiased but two to four times as noisy.
        share_scalers: True takes the largest scaler of all workers, as the paper does; False keeps
            each worker's own, which is less noisy where workers differ and saves a round trip.
        dense: pack five codes a byte instead of four.
        keep_float: patterns (``fnmatch``) of parameter names that travel as float32, such as
            ``("fc.*",)``; the paper keeps the last layer.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> from sterna.comm.solo import Solo
        >>> codec, g = TernGrad(), {"w": torch.linspace(-1, 1, 100)}
        >>> message, _ = codec.encode(g, codec.init(g), Solo(), torch.Generator())
        >>> {name: x.nbytes for name, x in message.buffers.items()}
        {'scale': 4, 'code': 25}
        >>> codec.decode(message, g)["w"].unique()
        tensor([-1.,  0.,  1.])
    """

    clip: float | None = 2.5
    share_scalers: bool = True
    dense: bool = False
    keep_float: tuple[str, ...] = ()

    summable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(
                f"TernGrad: clip must be positive or None; got {self.clip!r}. "
                "The paper clips at 2.5 standard deviations; None leaves clipping out."
            )
        if not isinstance(self.keep_float, tuple):
            raise ValueError(
                f"TernGrad: keep_float must be a tuple of patterns; got {self.keep_float!r}. "
                'Write keep_float=("fc.*",).'
            )

    @property
    def unbiased(self) -> bool:
        """Without clipping; with it, the codes are unbiased towards the clipped gradient."""
        return self.clip is None

    def init(self, like: Named) -> State:
        """No state."""
        for pattern in self.keep_float:
            if like and not any(fnmatchcase(name, pattern) for name in like):
                found = f"keep_float pattern {pattern!r} matches none of {list(like)[:4]} ..."
                warnings.warn(f"TernGrad: {found}", stacklevel=2)
        return {}

    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        """Scalers and codes, Eq. (1) to (4).

        Raises:
            NotFinite: a gradient holds NaN or infinity; with shared scalers, on every worker.
        """
        flat = Flat.of(named)
        x = flat.buffer.float().contiguous()
        plan = _plan(flat.layout, self.keep_float)
        engine = kernels if x.device.type == "cpu" else portable
        bounds = flat.layout.bounds
        sigma, largest = engine.statistics(x, bounds[:-1], bounds[1:])
        local = largest
        if self.clip is not None:
            clipped = (self.clip * sigma).float()
            local = torch.where(clipped > 0, torch.minimum(largest, clipped), largest)
        local = torch.where(largest.isfinite(), local, torch.inf)
        scale = local
        if self.share_scalers and len(local):
            # Also with infinity in it: the others must hear of it, not wait for codes.
            scale = comm.max_(local.clone())
        if not bool(scale.isfinite().all()):
            k = int((~scale.isfinite()).nonzero()[0, 0])
            where = "" if local[k].isinf() else " on another worker"
            refuse(flat.layout.names[k], "TernGrad", where)
        index = torch.from_numpy(plan.ternary).to(x.device)
        local, scale = local[index], scale[index]
        key = portable.draw_key(rng, comm.rank, comm.size)
        code = engine.ternarise(x, plan.starts, plan.stops, local, scale, key, self.dense)
        buffers = {"scale": scale, "code": code}
        if self.keep_float:
            buffers["float"] = torch.cat([x[:0], *(x[piece] for piece in plan.kept)])
        return Message(buffers), state

    def decode(self, message: Message, like: Named) -> Flat:
        """s t, by tensor.

        Raises:
            ValueError: the message is not of these tensors.
        """
        return self.decode_mean([message], like)

    def decode_mean(self, messages: Sequence[Message], like: Named) -> Flat:
        """Mean of the messages in one pass, Eq. (5).

        Raises:
            ValueError: a message is not of these tensors.
        """
        form = Form.of(like)
        plan = _plan(form.layout, self.keep_float)
        num_bytes = packing.num_bytes(plan.num_codes, self.dense)
        for message in messages:
            expect("TernGrad", message, "scale", torch.float32, len(plan.ternary))
            expect("TernGrad", message, "code", torch.uint8, num_bytes)
            if self.keep_float:
                expect("TernGrad", message, "float", torch.float32, plan.num_floats)
        scale = torch.stack([message.buffers["scale"] for message in messages])
        if not bool(((scale >= 0) & scale.isfinite()).all()):
            raise ValueError("TernGrad: a scaler is negative or not finite: a corrupt message.")
        code = torch.stack([message.buffers["code"] for message in messages])
        out = empty(form.layout.num_elements, torch.float32, form.device)
        engine = kernels if out.device.type == "cpu" else portable
        engine.average(code, scale, plan.starts, plan.stops, self.dense, out)
        if plan.kept:
            mean = torch.stack([message.buffers["float"] for message in messages]).mean(0)
            sizes = [piece.stop - piece.start for piece in plan.kept]
            for piece, values in zip(plan.kept, torch.split(mean, sizes), strict=True):
                out[piece] = values
        return Flat(form.layout, out.to(form.dtype))


EXAMPLES = (TernGrad(), TernGrad(clip=None, dense=True), TernGrad(share_scalers=False))
