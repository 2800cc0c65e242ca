"""One worker's copy of what is trained: model, optimizer, step count, gradients in one flat buffer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sterna.flat import Flat, Layout


class Replica:
    """A model with its optimizer, whose gradients are views of one flat buffer.

    Backward passes accumulate straight into the buffer, so an exchange runs one kernel and one
    collective over all gradients, and writes the result where the optimizer reads it.

    Args:
        model: any module. Its parameters that require gradients are trained.
        optimizer: a ``torch.optim`` optimizer over those parameters.
        schedule: learning-rate factor as a function of the step, or None for a constant rate. The
            optimizer's own rates, as given, are what factor 1 means.

    Raises:
        ValueError: the model has nothing to train, the optimizer misses a trainable parameter, or the
            parameters do not share one floating dtype and one device.

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
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
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
        kinds = {(p.dtype, p.device) for p in self.parameters.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"Replica: the trained parameters must share one dtype and one device; got "
                f"{sorted(f'{dtype} on {device}' for dtype, device in kinds)}."
            )
        ((dtype, device),) = kinds
        layout = Layout.of(self.parameters)
        self.gradients = Flat(layout, torch.zeros(layout.num_elements, dtype=dtype, device=device))
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._attach()

    def _attach(self) -> None:
        for name, p in self.parameters.items():
            p.grad = self.gradients[name]

    def update(self) -> None:
        """One optimizer step on ``gradients``, at the scheduled rate; then clear them."""
        if self.schedule is not None:
            factor = self.schedule(self.step)
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
        self.optimizer.step()
        self.step += 1
        self.clear()

    def clear(self) -> None:
        """Zero the gradients in place, and take back any that were replaced (``set_to_none``)."""
        self.gradients.buffer.zero_()
        if any(p.grad is not self.gradients[name] for name, p in self.parameters.items()):
            self._attach()
