"""Quantise: every entry is rounded to a whole number of steps.

    D_j = c       or, relative,   D_j = min(c sqrt(mean_k x_jk^2), max_k |x_jk|)       (1)
    q   = rint(x / D_j)                                                                (2)
    x'  = D_j q  where |q| <= 127,  else x                                             (3)

Symbols: x entry of tensor j, D_j step of the tensor, c ``step``, q code, x' what arrives. An entry
beyond 127 steps travels as the float that it is, so |x' - x| <= D_j / 2 for all. A relative step is no
wider than the largest entry, which therefore travels: of a tensor of one value a wider step would send
nothing for ever, for what error feedback adds widens it too. For small c the mean squared error is
D_j^2 / 12, and the entropy of q is h - log2(c) bits with a relative step, where h belongs to the shape
of the distribution alone: 2.05 for a Gaussian, 1.94 Laplace, 1.79 uniform. With a fixed step the root
mean square comes in too, h - log2(c) + log2(rms): it falls as the tensor shrinks.
Reference: A. Øland, B. Raj, "Reducing Communication Overhead in Distributed Learning by an Order of
    Magnitude (Almost)", ICASSP 2015; T. M. Cover, J. A. Thomas, "Elements of Information Theory", 2nd
    ed., Wiley 2006, Theorem 8.3.1 (the entropy of what is quantised).
Differs from the paper: the paper's text was not to be had; steps, escape and defaults are ours.
Cost per step: 8 bits an entry, 32 more for one beyond 127 steps, 32 a tensor if relative; three passes.
    By itself no fewer bits than a byte; made to stand in `Entropy`. Hurts without `ErrorFeedback`
    (decay 1) where entries are below half a step for long: they never travel. Batch-normalisation
    variances rounded to 0 break inference; use a small step for weights.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from sterna.codecs import quantise_kernels
from sterna.codecs.finite import largest
from sterna.codecs.form import Form, empty, expect
from sterna.flat import Flat, Named
from sterna.seams import Comm, Message, State

_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Quantise:
    """Rounding to the nearest multiple of a step, one byte an entry.

    Args:
        step: c, above 0: in root mean squares of each tensor, or in its own unit if not ``relative``.
            For differences and gradients 1, or 2 with error feedback; for weights 0.2 to 0.5.
        relative: whether the step follows the scale of each tensor.

    Raises:
        ValueError: ``step`` is out of range.

    Example:
        >>> from sterna.comm.solo import Solo
        >>> codec, x = Quantise(step=0.5, relative=False), {"w": torch.tensor([0.1, -0.9, 100.3])}
        >>> message, _ = codec.encode(x, codec.init(x), Solo(), torch.Generator())
        >>> message.buffers["code"].tolist(), codec.decode(message, x)["w"].tolist()[:2]
        ([0, -2, -128], [0.0, -1.0])
    """

    step: float = 1.0
    relative: bool = True

    summable: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.step < float("inf"):
            raise ValueError(
                f"Quantise: step must be above 0 and finite; got {self.step!r}. 1 is one root mean "
                "square of the tensor; for no rounding use Identity()."
            )

    def init(self, like: Named) -> State:
        """No state."""
        return {}

    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        """Eq. (1) and (2), on the host.

        Raises:
            NotFinite: a tensor holds NaN or infinity.
        """
        flat = Flat.of(named)
        device = flat.buffer.device
        x = flat.buffer.detach().float().cpu().contiguous()
        largest(Flat(flat.layout, x), "Quantise")
        values, bounds = x.numpy(), flat.layout.bounds
        step = self._steps(len(flat))
        if self.relative:
            rms, peak = quantise_kernels.sizes(values, bounds)
            wide = np.clip(np.minimum(self.step * rms, peak), _TINY, _HUGE)
            step = np.where(rms > 0, wide, 0).astype(np.float32)
        code, num_far = quantise_kernels.quantise(values, bounds, step)
        far = x[torch.from_numpy(code == quantise_kernels.FAR)] if num_far else torch.zeros(0)
        buffers = {"code": torch.from_numpy(code).to(device), "far": far.to(device)}
        if self.relative:
            # Not from NumPy: of no tensors, its empty array cannot be viewed as bytes.
            buffers["step"] = torch.zeros(len(step)).copy_(torch.from_numpy(step)).to(device)
        return Message(buffers, ragged=True), state

    def _steps(self, num_tensors: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return np.full(num_tensors, np.clip(self.step, _TINY, _HUGE), np.float32)

    def decode(self, message: Message, like: Named) -> Flat:
        """Eq. (3).

        Raises:
            ValueError: the message is not of these tensors.
        """
        form = Form.of(like)
        expect("Quantise", message, "code", torch.int8, form.layout.num_elements)
        code = message.buffers["code"].cpu().numpy()
        step = self._steps(len(form.layout.names))
        if self.relative:
            expect("Quantise", message, "step", torch.float32, len(step))
            step = message.buffers["step"].cpu().numpy()
            if not (np.isfinite(step) & (step >= 0)).all():
                raise ValueError("Quantise: a step is negative or not finite: a corrupt message.")
        place = np.flatnonzero(code == quantise_kernels.FAR)
        expect("Quantise", message, "far", torch.float32, len(place))
        far = message.buffers["far"].cpu()
        if not bool(far.isfinite().all()):
            raise ValueError("Quantise: an entry is not finite: a corrupt message.")
        out = empty(len(code), torch.float32, torch.device("cpu"))
        limit = min(torch.finfo(form.dtype).max, _HUGE)
        quantise_kernels.scale(code, form.layout.bounds, step, limit, out.numpy())
        out.numpy()[place] = far.numpy()
        return Flat(form.layout, out.to(form.device, form.dtype))


EXAMPLES = (Quantise(), Quantise(step=0.01, relative=False), Quantise(step=0.02))
