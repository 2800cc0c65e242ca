"""One optimizer step of a worker by itself: between two rounds nothing has to lie in one buffer."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sterna.codecs.finite import largest
from sterna.flat import Flat, Layout
from sterna.replica import Replica


def step_alone(replica: Replica, who: str) -> None:
    """Step the optimizer on this worker's own gradients.

    Leaves the parameters without gradients, so that the next backward pass hands over the tensors that
    it made instead of adding them to the replica's buffer: two passes over the gradients less.

    Args:
        replica: after its backward pass.
        who: class name for the error.

    Raises:
        NotFinite: a gradient holds NaN or infinity; nothing is changed.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> replica = Replica(model, torch.optim.SGD(model.parameters(), lr=1.0))
        >>> before = model.weight.clone()
        >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
        >>> step_alone(replica, "Example")
        >>> (before - model.weight).tolist(), replica.step, model.weight.grad
        ([[1.0, 2.0]], 1, None)
    """
    gradients = {
        name: p.grad.detach() for name, p in replica.parameters.items() if p.grad is not None
    }
    if len(gradients) < len(replica.parameters):
        largest(replica.gradients, who)  # zeros for what this step did not use
    elif all(x.is_cpu for x in gradients.values()) or not all_finite(gradients.values()):
        for name, x in gradients.items():
            largest(Flat(Layout((name,), ((x.numel(),),)), x.reshape(-1)), who)
    replica.update()
    for p in replica.parameters.values():
        p.grad = None


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; a device is read back once, whatever their number.

    Args:
        tensors: any shapes, of one dtype, on one device.

    Example:
        >>> import torch
        >>> all_finite([torch.ones(2, 2), torch.zeros(0)]), all_finite([torch.tensor([1.0, torch.nan])])
        (True, False)
    """
    ends = [end for x in tensors if x.numel() for end in torch.aminmax(x)]
    return not ends or bool(torch.stack(ends).isfinite().all())
