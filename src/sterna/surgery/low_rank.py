"""Low rank: a convolution or linear layer becomes two smaller ones, by singular value decomposition.

A weight as a matrix M with singular values s_1 >= s_2 >= ... is cut to rank r::

    M ~ B A,    ||M - B A||^2 = sum_{k > r} s_k^2                                       (1)

    linear        M[n, c]            A: c -> r, B: r -> n
    channel       M[n, (c i j)]      A: c -> r with the kernel, B: r -> n with 1x1        (2)
    spatial       M[(c i), (n j)]    A: c -> r with height x 1, B: r -> n with 1 x width  (3)

Symbols: n filters or outputs, c channels or inputs, i and j rows and columns of the kernel. A layer
costs r (a + b) instead of a b multiply-adds at each position, for matrices a x b in (2): only ranks
below a b / (a + b) are cheaper. The ranks are given, or the smallest that keep a share of the variance
sum_k s_k^2 in each layer, or those of a whole network within a number of multiply-adds: there,
directions go in the order of variance (as a share of the layer's) per multiply-add.

Reference: (2) as in E. Denton et al., NIPS 2014, arXiv:1404.0736, and W. Wen et al., "Coordinating
    Filters for Faster Deep Neural Networks", ICCV 2017, arXiv:1703.09746; (3) C. Tai et al.,
    "Convolutional neural networks with low-rank regularization", ICLR 2016, arXiv:1511.06067.
Differs from the paper: the rule for a number of multiply-adds is ours. "Variance" is not centred, as
    in the code of Wen et al., and counts squares (their `svd` counts the norm: its 0.95 is 0.9025
    here). The roots of the singular values go to A and to B.

Cost: one decomposition in float64 on the CPU per layer, cubic in the smaller side. Hurts where two
    small operations are slower than one large: time it; and without fine-tuning the accuracy.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, get_args

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sterna.multiply_adds import counted
from sterna.surgery.factorise import Factors, Form, Layer, decomposed, pair
from sterna.surgery.program import (
    Refused,
    arguments,
    copied,
    not_running,
    refuse_converted,
)


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """What became of one layer. Multiply-adds are per example.

    Args:
        name: in the model.
        rank: of the two layers (in each group of a grouped convolution); None if it was left.
        full_rank: the largest possible; 0 if the layer was not decomposed.
        error: ||M - B A|| / ||M||; 0 if it was left.
        parameters_before: of the layer, bias included.
        parameters_after: of what stands in its place.
        multiply_adds_before: of the layer.
        multiply_adds_after: of what stands in its place.
        left: why it was left as it is; empty if it was not.
    """

    name: str
    rank: int | None
    full_rank: int
    error: float
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int
    left: str = ""


@dataclass(frozen=True, kw_only=True)
class LowRankReport:
    """What `low_rank` did.

    Args:
        layers: the convolutions and linear layers that were asked for, in the model's order.
        parameters_before: of the model.
        parameters_after: of the new one.
        multiply_adds_before: of one example, counted on the operators that ran.
        multiply_adds_after: of the new model, counted in the same way.
    """

    layers: tuple[LayerCut, ...]
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer that was replaced."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}


def low_rank(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    *,
    ranks: Mapping[str, int] | None = None,
    variance: float | None = None,
    multiply_adds: float | None = None,
    form: Form = "channel",
    layers: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    multiple_of: int = 1,
) -> tuple[nn.Module, LowRankReport]:
    """A copy of ``model`` in which layers are two of lower rank, where that takes fewer multiply-adds.

    Give exactly one of ``ranks``, ``variance`` and ``multiply_adds``. Layers that are a ``Conv2d`` or
    ``Linear`` proper are cut, the rest is copied; the parts are named ``<layer>.0`` and ``<layer>.1``.

    Args:
        model: stays as it is.
        example: an input, or a tuple of positional arguments, on the model's device; the first tensor in
            it has shape (batch, ...). Both models are run on them in evaluation mode, to count and to
            see that they run, and that what was replaced does not.
        ranks: by name of layer; other layers are left out.
        variance: share to keep in each layer, in (0, 1].
        multiply_adds: share of the model's multiply-adds that may be left over, in (0, 1).
        form: (2) or (3), for convolutions.
        layers: `fnmatch` patterns of the layers that may be cut.
        exclude: patterns of layers that may not.
        multiple_of: ranks are rounded up to multiples of it, at most to the full rank.

    Returns:
        The new model, in the old one's mode, and what was done. Warns if no layer was replaced.

    Raises:
        Refused: the model is quantised or scripted, or cannot be copied, or a replaced layer still runs.
        ValueError: an argument is out of range, a name or pattern is not in the model, a weight is not
            finite, the target cannot be met, or a model does not run on ``example``.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> small, report = low_rank(model, torch.zeros(1, 64), ranks={"0": 8})
        >>> report.multiply_adds_before, report.multiply_adds_after, report.ranks
        (4736, 1664, {'0': 8})
    """
    _check(ranks, variance, multiply_adds, form, multiple_of)
    refuse_converted(model)
    edited = copied(model)
    named = _named_layers(edited, ranks, layers, exclude)
    obstacles = {name: _obstacle(edited, name, layer) for name, layer in named.items()}
    before, positions = _run(edited, example, named.values())
    candidates: dict[str, _Candidate] = {}
    for name, layer in named.items():
        if not obstacles[name] and not positions[layer][0]:
            obstacles[name] = "the example does not reach it"
        if not obstacles[name]:
            factors = decomposed(name, layer, form)
            candidates[name] = _candidate(layer, factors, positions[layer], form, multiple_of)
    if ranks is not None:
        chosen = {name: _given(name, c, ranks[name]) for name, c in candidates.items()}
    elif variance is not None:
        chosen = {name: c.rounded(c.keeping(variance)) for name, c in candidates.items()}
    else:
        chosen = _within(candidates, before, multiply_adds or 0.0, obstacles)
    cuts: list[LayerCut] = []
    pairs: dict[nn.Module, nn.Module] = {}
    for name, layer in named.items():
        cut = _left(name, layer, positions[layer], obstacles[name])
        if name in chosen:
            c, rank = candidates[name], chosen[name]
            cut = replace(cut, full_rank=c.factors.full)
            if c.price * rank >= c.dense:
                cut = replace(cut, left=f"rank {rank} of {c.factors.full} would not be cheaper")
            else:
                pairs[layer] = pair(layer, c.factors, rank, form)
                cut = replace(
                    cut,
                    rank=rank,
                    error=math.sqrt(float(c.factors.variance[rank:].sum())),
                    parameters_after=_count(pairs[layer]),
                    multiply_adds_after=c.price * rank,
                )
        cuts.append(cut)
    if not pairs:
        reasons = "; ".join(f"{cut.name}: {cut.left}" for cut in cuts) or "there is no such layer"
        warnings.warn(f"low_rank: no layer was replaced. {reasons}.", stacklevel=2)
    small = copied(edited, pairs)
    with not_running(edited, [cut.name for cut in cuts if cut.rank is not None]):
        after, _ = _run(small, example, ())
    return small, LowRankReport(
        layers=tuple(cuts),
        parameters_before=_count(edited),
        parameters_after=_count(small),
        multiply_adds_before=before,
        multiply_adds_after=after,
    )


class _Candidate(NamedTuple):
    """A layer that may be cut. ``price``: multiply-adds of rank 1; ``dense``: of the layer itself."""

    factors: Factors
    price: int
    dense: int
    multiple_of: int

    def rounded(self, rank: int) -> int:
        return min(self.factors.full, math.ceil(rank / self.multiple_of) * self.multiple_of)

    def keeping(self, share: float) -> int:
        """The smallest rank that keeps this share of the variance."""
        missing = self.factors.variance.cumsum(0) < share - 1e-12
        return min(self.factors.full, int(missing.sum()) + 1)

    def cost(self, rank: int) -> int:
        return min(self.price * self.rounded(rank), self.dense)


def _given(name: str, candidate: _Candidate, rank: int) -> int:
    full = candidate.factors.full
    if not (isinstance(rank, int) and 1 <= rank <= full):
        raise ValueError(
            f"low_rank: ranks[{name!r}] must be a whole number in [1, {full}], the full rank; got "
            f"{rank!r}."
        )
    return candidate.rounded(rank)


def _within(
    candidates: Mapping[str, _Candidate], before: int, share: float, obstacles: Mapping[str, str]
) -> dict[str, int]:
    """Ranks that fit ``share`` of the multiply-adds: directions of most variance a multiply-add first."""
    others = before - sum(c.dense for c in candidates.values())
    worth = {name: c.factors.variance / c.price for name, c in candidates.items()}

    def ranks_from(least: float) -> dict[str, int]:
        return {name: max(1, int((w >= least).sum())) for name, w in worth.items()}

    def cost(ranks: Mapping[str, int]) -> int:
        return others + sum(candidates[name].cost(rank) for name, rank in ranks.items())

    smallest = cost(ranks_from(math.inf))
    if smallest > share * before:
        left = "; ".join(f"{name}: {why}" for name, why in obstacles.items() if why)
        raise ValueError(
            f"low_rank: multiply_adds={share!r} cannot be met: with every rank at its smallest, "
            f"{smallest / before:.4f} of the {before} multiply-adds are left. Ask for that or more, cut "
            "more layers, or make the model narrower." + (f" Left alone: {left}." if left else "")
        )
    levels = sorted({float(x) for w in worth.values() for x in w}, reverse=True)
    low, high = 0, len(levels)  # the first ``low`` levels fit, ``high`` + 1 would not
    while low < high:
        middle = (low + high + 1) // 2
        if cost(ranks_from(levels[middle - 1])) <= share * before:
            low = middle
        else:
            high = middle - 1
    found = ranks_from(levels[low - 1]) if low else ranks_from(math.inf)
    return {name: candidates[name].rounded(rank) for name, rank in found.items()}


def _candidate(
    layer: Layer, factors: Factors, positions: tuple[int, int], form: Form, multiple_of: int
) -> _Candidate:
    at, before = positions
    if isinstance(layer, nn.Linear):
        price = at * (layer.in_features + layer.out_features)
    else:
        kh, kw = layer.kernel_size
        c, n = layer.in_channels, layer.out_channels
        price = at * (c * kh * kw + n) if form == "channel" else before * c * kh + at * n * kw
    return _Candidate(factors, price, at * layer.weight.numel(), multiple_of)


def _run(
    model: nn.Module, example: Tensor | tuple[Any, ...], layers: Iterable[nn.Module]
) -> tuple[int, dict[nn.Module, tuple[int, int]]]:
    """Multiply-adds of one example, and for each layer its positions, behind and before its width."""
    inputs = arguments(example)
    tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    num = len(tensors[0]) if tensors and tensors[0].dim() else 0
    if not num:
        raise ValueError(
            f"low_rank: example must hold inputs of shape (batch, ...), at least one; got {example!r}."
        )
    positions: dict[nn.Module, tuple[int, int]] = dict.fromkeys(layers, (0, 0))

    def note(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        at = before = out.numel() // len(layer.weight)
        if isinstance(layer, nn.Conv2d):
            before = at // out.shape[-1] * (args[0] if args else kwargs["input"]).shape[-1]
        first, second = positions[layer]
        positions[layer] = (first + at // num, second + before // num)

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in positions]
    try:
        total = counted(model, inputs)[""]
    except Refused:
        raise
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError) as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        hint = (
            "" if positions else " If a module reads a layer's weight itself, exclude that layer."
        )
        raise ValueError(
            f"low_rank: {type(model).__name__} does not run on inputs of shape {shapes}: {error}.{hint}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return total // num, positions


def _named_layers(
    model: nn.Module, ranks: Mapping[str, int] | None, layers: Sequence[str], exclude: Sequence[str]
) -> dict[str, Layer]:
    """The layers asked for, by the first of their names."""
    there = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for parameter, patterns in (("layers", layers), ("exclude", exclude)):
        for pattern in patterns:
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in there):
                raise ValueError(
                    f"low_rank: each pattern in {parameter} must fit a Conv2d or Linear; got {pattern!r}, "
                    f"and the layers are {', '.join(there) or 'none'}."
                )
    for name in ranks or ():
        if name not in there:
            raise ValueError(
                f"low_rank: ranks must name Conv2d or Linear layers; got {name!r}, and the layers are "
                f"{', '.join(there) or 'none'}."
            )
    return {
        name: layer
        for name, layer in there.items()
        if ranks is None or name in ranks
        if any(fnmatchcase(name, p) for p in layers)
        if not any(fnmatchcase(name, p) for p in exclude)
    }


def _obstacle(model: nn.Module, name: str, layer: Layer) -> str:
    """Why a layer cannot be replaced; empty if it can."""
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return f"it is a {type(layer).__name__}, not a plain Conv2d or Linear"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has forward hooks, which would be lost"
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    if any(owners[id(p)] > 1 for p in layer.parameters()):
        return "it shares a weight with another module"
    if name and isinstance(
        model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer
    ):
        return "nn.TransformerEncoderLayer reads its weight itself"
    return ""


def _left(name: str, layer: Layer, positions: tuple[int, int], why: str) -> LayerCut:
    parameters, cost = _count(layer), positions[0] * layer.weight.numel()
    return LayerCut(
        name=name,
        rank=None,
        full_rank=0,
        error=0.0,
        parameters_before=parameters,
        parameters_after=parameters,
        multiply_adds_before=cost,
        multiply_adds_after=cost,
        left=why,
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _check(
    ranks: Mapping[str, int] | None,
    variance: float | None,
    multiply_adds: float | None,
    form: str,
    multiple_of: int,
) -> None:
    given = {"ranks": ranks, "variance": variance, "multiply_adds": multiply_adds}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(
            "low_rank: give exactly one of ranks, variance and multiply_adds; got "
            f"{', '.join(f'{name}={value!r}' for name, value in given.items())}."
        )
    if variance is not None and not 0 < variance <= 1:
        raise ValueError(f"low_rank: variance must be a share in (0, 1]; got {variance!r}.")
    if multiply_adds is not None and not 0 < multiply_adds < 1:
        raise ValueError(
            f"low_rank: multiply_adds must be a share in (0, 1); got {multiply_adds!r}. For a number of "
            "multiply-adds divide it by the model's."
        )
    if form not in get_args(Form):
        raise ValueError(f"low_rank: form must be 'channel' or 'spatial'; got {form!r}.")
    if not (isinstance(multiple_of, int) and multiple_of >= 1):
        must = "multiple_of must be a whole number, at least 1"
        raise ValueError(f"low_rank: {must}; got {multiple_of!r}.")
