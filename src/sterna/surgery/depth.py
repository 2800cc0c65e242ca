"""Depth: residual blocks whose branch is all zero go whole.

    y = x + F(x; W),   W = 0   =>   y = x;      y = relu(x + F(x; W)),   W = 0   =>   y = relu(x)

Reference: depth-wise sparsity in W. Wen, C. Wu, Y. Wang, Y. Chen, H. Li, "Learning Structured Sparsity in
    Deep Neural Networks", NIPS 2016, arXiv:1608.03665.
Differs from the paper: nothing; a block that ends in a ReLU leaves a ReLU, which costs next to nothing
    and is right for any input.
Cost: a forward pass of the model, and three of each block that is tried.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sterna.randomness import generator
from sterna.surgery.coupling import couple
from sterna.surgery.description import Description, Report, resize
from sterna.surgery.program import Refused, arguments, copied, multiply_adds, not_running
from sterna.surgery.proof import compare, distance, outputs

_SCALES = (1.0, 30.0, 1000.0)


def remove_blocks(model: nn.Module, example: Tensor | tuple[Any, ...]) -> tuple[nn.Module, Report]:
    """A copy of a model without the blocks that pass their input on; the model is not changed.

    A block is a submodule of one tensor in and one of the same shape out that holds a layer whose
    parameters are all zero (a last convolution or batch norm, say). It goes if it gives exactly its
    input, or its ReLU, for the example and for random inputs of three sizes.

    Args:
        model: any module.
        example: an input, or a tuple of positional arguments, on the model's device.

    Returns:
        The smaller model, in the original's mode, and what was done. Warns if there was no such block.

    Raises:
        Refused: the model cannot be traced, or gives another output without the blocks.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Linear(3, 3)
        ...
        ...     def forward(self, x):
        ...         return x + self.branch(x)
        >>> model = nn.Sequential(Block(), nn.Linear(3, 2))
        >>> for parameter in model[0].parameters():
        ...     _ = nn.init.zeros_(parameter.detach())
        >>> small, report = remove_blocks(model, torch.ones(1, 3))
        >>> small[0], dict(report.replaced)
        (Identity(), {'0': 'identity'})
    """
    inputs = arguments(example)
    before = couple(model, example).multiply_adds
    dense = copied(model).eval()
    expected, replaced = outputs(dense, inputs), _idle(dense, inputs)
    if not replaced:
        warnings.warn(
            "remove_blocks: nothing was removed: no block with a layer of zeros passes its input on.",
            stacklevel=2,
        )
    description = Description(replaced=replaced)
    small = resize(model, description)
    modes = {name: module.training for name, module in small.named_modules()}
    with not_running(model, replaced):
        found = outputs(small.eval(), inputs)
    wrong = compare(found, expected)
    if wrong:
        names = " and ".join(map(repr, replaced))
        raise Refused(f"{type(model).__name__}: {names} cannot be removed: {wrong}")
    for name, module in small.named_modules():
        module.training = modes[name]
    return small, Report(
        parameters_before=sum(p.numel() for p in model.parameters()),
        parameters_after=sum(p.numel() for p in small.parameters()),
        multiply_adds_before=before,
        multiply_adds_after=multiply_adds(small, inputs),
        widths={},
        replaced=replaced,
        difference=max((distance(a, b) for a, b in zip(found, expected, strict=True)), default=0.0),
        description=description,
    )


def _idle(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, str]:
    """Outermost blocks that pass their input on, and what they come to."""
    shapes: dict[str, list[Tensor]] = {}
    names = {m: name for name, m in model.named_modules() if name and _has_zero_layer(m)}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        fits = plain and isinstance(out, Tensor) and out.shape == args[0].shape
        shapes.setdefault(names[module], []).append(
            args[0].detach().clone() if fits else torch.empty(0)
        )

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in names]
    try:
        outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, str] = {}
    for module, name in names.items():
        seen = shapes.get(name, [])
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if seen and not inside and all(x.numel() and x.is_floating_point() for x in seen):
            kind = _kind(module, seen)
            if kind:
                found[name] = kind
    return found


def _has_zero_layer(module: nn.Module) -> bool:
    """Whether some layer in it has parameters, all of them zero, and more goes than that layer."""
    for layer in module.modules():
        own = list(layer.parameters(recurse=False))
        if own and layer is not module and not any(bool(p.any()) for p in own):
            return True
    return False


def _kind(module: nn.Module, seen: list[Tensor]) -> str:
    probes = list(seen)
    for k, scale in enumerate(_SCALES):
        noise = torch.randn(seen[0].shape, generator=generator(0, "depth", k), dtype=torch.float32)
        probes.append((scale * noise).to(seen[0]))
    for kind, expected in (("identity", lambda x: x), ("relu", torch.relu)):
        if all(torch.equal(outputs(module, (x,))[0], expected(x)) for x in probes):
            return kind
    return ""
