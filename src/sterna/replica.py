"""One worker's copy of what is trained: model, optimizer, step count, gradients in one flat buffer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sterna.flat import Flat, Layout, Named, norm
from sterna.flat_sgd import FlatSGD


class Replica:
    """A model with its optimizer, whose gradients are views of one flat buffer.

    Backward passes accumulate straight into the buffer, so an exchange runs one kernel and one
    collective over all gradients, and writes the result where the optimizer reads it. A parameter that
    a step did not use has the gradient 0, where plain torch has none: momentum and weight decay go on.

    Args:
        model: any module. Its parameters that require gradients are trained.
        optimizer: a ``torch.optim`` optimizer over those parameters.
        schedule: learning-rate factor as a function of the step, or None for a constant rate. The
            optimizer's own rates, as given, are what factor 1 means.
        clip_norm: a longer gradient is shortened to this Euclidean norm, over all parameters, before the
            optimizer's step. Workers that step on the same gradient shorten it alike, to the bit. None:
            as it is.

    Raises:
        ValueError: the model has nothing to train, the optimizer misses a trainable parameter or holds
            one that is not the model's, or the parameters do not share one dtype and one device; or
            ``clip_norm`` is out of range.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> replica.gradients["bias"]
        tensor([1., 1.])
        >>> replica.update()
        >>> replica.step, replica.gradients.buffer.abs().sum().item()
        (1, 0.0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.clip_norm = require_clip_norm("Replica", clip_norm)
        self.step = 0
        self.parameters: dict[str, Tensor] = {
            name: p for name, p in model.named_parameters() if p.requires_grad
        }
        if not self.parameters:
            raise ValueError("Replica: the model has no parameter that requires a gradient.")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in self.parameters.items() if id(p) not in held]
        if missing:
            raise ValueError(
                f"Replica: the optimizer does not hold the parameter {missing[0]!r}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; give it "
                "model.parameters(), or freeze what must not be trained with requires_grad_(False)."
            )
        owned = {id(p) for p in model.parameters()}
        foreign = [p for g in optimizer.param_groups for p in g["params"] if id(p) not in owned]
        if foreign:
            raise ValueError(
                f"Replica: the optimizer holds {len(foreign)} parameter(s) that are not the model's, the "
                f"first of shape {tuple(foreign[0].shape)}; nothing would exchange their gradients. "
                "Make them part of the model."
            )
        kinds = {(p.dtype, p.device) for p in self.parameters.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"Replica: the trained parameters must share one dtype and one device; got "
                f"{sorted(f'{dtype} on {device}' for dtype, device in kinds)}."
            )
        ((dtype, device),) = kinds
        layout = Layout.of(self.parameters)
        self._flat = Flat(layout, torch.zeros(layout.num_elements, dtype=dtype, device=device))
        self._weights: Flat | None = None
        self._flat_sgd: FlatSGD | None = None
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self.clear()

    @property
    def gradients(self) -> Flat:
        """The gradients, as views of one buffer.

        A gradient that something put elsewhere (``zero_grad`` sets them to None, for one) is brought
        back into the buffer first.

        Raises:
            ValueError: a parameter was converted to another dtype or device since.
        """
        buffer = self._flat.buffer
        for name, p in self.parameters.items():
            if (p.dtype, p.device) != (buffer.dtype, buffer.device):
                raise ValueError(
                    f"Replica: the parameter {name!r} has become {p.dtype} on {p.device}; it was "
                    f"{buffer.dtype} on {buffer.device}. Convert the model before making the replica."
                )
            view, own = self._flat[name], p.grad
            if own is None:
                view.zero_()
            elif own.data_ptr() != view.data_ptr():
                view.copy_(own)
            p.grad = view
        return self._flat

    @property
    def weights(self) -> Flat:
        """The trained parameters, as views of one buffer, into which the first use moves them."""
        flat = self._weights
        held = flat is not None and all(
            p.data_ptr() == flat[name].data_ptr() for name, p in self.parameters.items()
        )
        if flat is None or not held:
            flat = self._weights = Flat.of(self.parameters)
            for name, p in self.parameters.items():
                p.data = flat[name]
            if FlatSGD.fits(self.optimizer, list(self.parameters.values())):
                self._flat_sgd = FlatSGD(self.optimizer, flat)  # type: ignore[arg-type]
        return flat

    def update(self, gradients: Named | None = None) -> None:
        """One optimizer step on ``gradients``, at the scheduled rate.

        Args:
            gradients: of all parameters, read where they lie, for weights that are in one buffer (see
                `weights`); by default `gradients`, which are cleared then.
        """
        if self.schedule is not None:
            factor = self.schedule(self.step)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
        if self.clip_norm is not None:
            gradients = self._shortened(gradients, self.clip_norm)
        if gradients is None:
            self.optimizer.step()
            self.step += 1
            self.clear()
            return
        if isinstance(gradients, Flat) and self._flat_sgd is not None:
            self._flat_sgd.step(gradients)
            self.step += 1
            return
        for name, p in self.parameters.items():
            p.grad = gradients[name]
        self.optimizer.step()
        self.step += 1
        for name, p in self.parameters.items():
            p.grad = self._flat[name]

    def _shortened(self, gradients: Named | None, longest: float) -> Named | None:
        """The replica's own gradients shortened in place; given ones are left alone, and copied."""
        if gradients is None:
            flat = self.gradients
        elif isinstance(gradients, Flat):
            flat = gradients
        else:
            flat = Flat.of({name: gradients[name] for name in self.parameters})
        factor = (longest / norm(flat.buffer)).clamp_(max=1.0).to(flat.buffer.dtype)
        if gradients is None:
            flat.buffer.mul_(factor)
            return None
        return Flat(flat.layout, flat.buffer * factor)

    def clear(self) -> None:
        """Zero the gradients, in the buffer; drop them where none of them lies in it."""
        own = [p.grad for p in self.parameters.values()]
        if all(
            g is not None and g is not self._flat[n] for n, g in zip(self._flat, own, strict=True)
        ):
            for p in self.parameters.values():
                p.grad = None
            return
        self._flat.buffer.zero_()
        for name, p in self.parameters.items():
            if p.grad is not self._flat[name]:
                p.grad = self._flat[name]


def require_clip_norm(who: str, clip_norm: float | None) -> float | None:
    """The largest norm of a gradient itself.

    Raises:
        ValueError: it is neither None nor above 0 and finite; names ``who`` was given it.
    """
    if clip_norm is not None and not 0 < clip_norm < float("inf"):
        raise ValueError(
            f"{who}: clip_norm must be above 0 and finite, or None; got {clip_norm!r}. None does not "
            "clip; 5.0 is usual for recurrent networks."
        )
    return clip_norm
