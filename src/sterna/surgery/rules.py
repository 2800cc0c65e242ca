"""What each operator of a traced model does to the labels of its tensors.

One rule per operator of `torch.export`'s graph, found by its name without ``aten.`` and a trailing
underscore. A rule gets the operator's arguments in their places, tensors as `Traced`, and gives the
labels of the output. What has no rule pins every label that it meets: it cannot be understood wrongly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import numpy as np

from sterna.surgery.labels import Along, Book, Size, Traced


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where an operator stands.

    Args:
        book: labels of the whole model.
        name: of the operator.
        where: module, class and source line, for sentences.
        path: of the innermost module.
        stock: whether that module's class is torch's own.
        attributes: whole numbers among that module's attributes, if it is the user's own.
        shapes: of the outputs; one for an operator with one output.
        covered: whether a normalisation is the only reader of the output.
    """

    book: Book
    name: str
    where: str
    path: str
    stock: bool
    attributes: Mapping[str, int]
    shapes: tuple[tuple[int, ...], ...]
    covered: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first output."""
        return self.shapes[0]

    def pin(self, labels: Along, reason: str) -> None:
        """These units stay; no reason: what nobody would expect to shrink."""
        if reason and self.stock and self.where.endswith("(MultiheadAttention)"):
            reason = "it allows no other width; write the attention out to remove heads"
        self.book.pin(labels, f"{self.where}: {reason}" if reason else "")

    def tie(self, a: Along, b: Along) -> Along:
        """The same indices under two names."""
        reason = f"{self.where}: {self.name} meets a dimension there whose size is fixed"
        return self.book.tie(a, b, reason)

    def out(self, *along: Along) -> Traced:
        """The first output, with these labels."""
        return Traced(shape=self.shape, along=along)


Rule: TypeAlias = Callable[..., Any]


def tensors(value: Any) -> list[Traced]:
    """All traced tensors in nested arguments."""
    if isinstance(value, Traced):
        return [value]
    if isinstance(value, Mapping):
        return [x for item in value.values() for x in tensors(item)]
    return [x for item in value for x in tensors(item)] if isinstance(value, list | tuple) else []


def settle(site: Site, x: Traced) -> Traced:
    """States of a recurrent stack as one tensor: unit k of all layers is one unit from here on."""
    if x.stacked is None:
        return x
    first = x.stacked[0]
    for other in x.stacked[1:]:
        site.tie(first, other)
    return Traced(shape=x.shape, along=(*x.along[:-1], first))


def unknown(site: Site, *args: Any) -> Any:
    """No rule: everything stays."""
    for x in tensors(args):
        for labels in x.along:
            site.pin(
                labels, f"no rule for the operator {site.name}, so what it reads stays as it is"
            )
    outs = [Traced(shape=shape, along=(None,) * len(shape)) for shape in site.shapes]
    return outs[0] if len(outs) == 1 else outs


def elementwise(site: Site, *args: Any) -> Traced:
    """Tensors that are broadcast against each other."""
    shape, found = site.shape, []
    operands = tensors(args)
    for back in range(len(shape), 0, -1):
        size, meets = shape[-back], []
        for x in operands:
            if len(x.shape) >= back and x.shape[-back] == size:
                meets.append(x.along[-back])
            elif len(x.shape) >= back:
                site.pin(x.along[-back], "")
        along = meets[0] if meets else None
        for other in meets[1:]:
            along = site.tie(along, other)
        found.append(along)
    return site.out(*found)


def like(site: Site, x: Traced, *_: Any) -> Traced:
    """A new tensor as large as x."""
    return site.out(*x.along)


def create(site: Site, *_: Any) -> Traced:
    """A constant made by the code, whose sizes are numbers there: it follows if the code does."""
    along = tuple(site.book.fresh(size) for size in site.shape)
    guess(site, along)
    return replace(site.out(*along), made_in=site.path)


def guess(site: Site, along: tuple[Along, ...]) -> None:
    """Attributes of the user's module that equal these widths may be what the code took them from."""
    for labels in along:
        if labels is not None:
            for name, value in site.attributes.items():
                if value == len(labels) > 1:
                    site.book.sizes.append(
                        Size(path=site.path, attribute=name, labels=labels, guessed=True)
                    )


def convolution(site: Site, x: Traced, w: Traced, b: Traced | None = None, *rest: Any) -> Traced:
    """Convolution and transposed convolution; with groups, all channels of one group are one unit."""
    transposed = "transpose" in site.name
    groups = rest[3] if len(rest) > 3 else 1
    axis = len(x.shape) - len(w.shape) + 1
    for labels in (*w.along[2:], *x.along[axis + 1 :]):
        site.pin(labels, "")
    channels, (first, second) = x.along[axis], w.along[:2]
    if groups == 1:
        inner, out = (first, second) if transposed else (second, first)
        site.tie(channels, site.book.read(inner))
        site.book.make(out)
    else:
        site.pin(second, "")
        units = None if first is None else site.book.together(first, groups)
        if channels is None or units is None:
            site.tie(channels, first)
        else:
            site.tie(site.book.together(channels, groups), units)
            if site.stock:
                site.book.sizes.append(Size(path=site.path, attribute="groups", labels=units))
        out = units if units is None else np.repeat(units, site.shape[axis] // groups)
        site.book.carry(first)
    if b is not None:
        site.tie(b.along[0], out)
    if site.covered:
        site.book.carry(out if groups == 1 else None, b.along[0] if b is not None else None)
    along = list(x.along)
    along[axis:] = [out] + [None] * (len(x.shape) - axis - 1)
    return site.out(*along)


def linear(site: Site, x: Traced, w: Traced, b: Traced | None = None) -> Traced:
    """y = x W' + b."""
    site.tie(x.along[-1], site.book.read(w.along[1]) if w.parameter else w.along[1])
    site.book.make(w.along[0])
    if not w.parameter:
        site.pin(w.along[1], "linear with a computed weight")
    if b is not None:
        site.tie(w.along[0], b.along[0])
    if site.covered:
        site.book.carry(w.along[0], b.along[0] if b is not None else None)
    return site.out(*x.along[:-1], w.along[0])


def addmm(site: Site, b: Traced, x: Traced, w: Traced) -> Traced:
    """B + x W."""
    return elementwise(site, matmul(site, x, w), b)


def matmul(site: Site, a: Traced, b: Traced) -> Traced:
    """Product of matrices or batches of them; a weight may stand on either side."""
    if min(len(a.shape), len(b.shape)) < 2:
        return unknown(site, a, b)  # type: ignore[no-any-return]
    inner = site.tie(a.along[-1], b.along[-2])
    if b.parameter or a.parameter:
        site.book.read(b.along[-2] if b.parameter else a.along[-1])
        site.book.make(b.along[-1] if b.parameter else a.along[-2])
    else:
        site.pin(inner, f"{site.name} sums over it without a weight")
    batch = replace(site, shapes=(site.shape[:-2],))
    ahead = [Traced(shape=x.shape[:-2], along=x.along[:-2]) for x in (a, b)]
    return site.out(*elementwise(batch, *ahead).along, a.along[-2], b.along[-1])


def attention(site: Site, q: Traced, k: Traced, v: Traced, *rest: Any) -> Traced:
    """Scaled dot product: the scale depends on the width of q and k, so that stays; heads may go."""
    for x in (q, k):
        site.pin(x.along[-1], "the width of queries and keys sets the scale of attention")
    batch = replace(site, shapes=(site.shape[:-2],))
    ahead = [Traced(shape=x.shape[:-2], along=x.along[:-2]) for x in (q, k, v)]
    mask = [Traced(shape=x.shape[:-2], along=x.along[:-2]) for x in tensors(rest)]
    return site.out(*elementwise(batch, *ahead, *mask).along, None, v.along[-1])


def embedding(site: Site, w: Traced, index: Traced, *_: Any) -> Traced:
    """Rows of w."""
    site.pin(w.along[0], "")
    return site.out(*(None,) * len(index.shape), site.book.make(w.along[1]))


def batch_norm(site: Site, x: Traced, *rest: Any) -> Traced:
    """Per channel; also the instance norm."""
    channels = x.along[1] if len(x.shape) > 1 else x.along[0]
    for k, y in enumerate(rest[:4]):
        if isinstance(y, Traced):
            channels = site.tie(channels, y.along[0])
            if k > 1:
                site.book.carry(y.along[0])
    if site.stock and channels is not None:
        site.book.sizes.append(Size(path=site.path, attribute="num_features", labels=channels))
    return site.out(*x.along)


def group_norm(site: Site, x: Traced, groups: int, *rest: Any) -> Traced:
    """All channels that are normalised together are one unit."""
    channels = x.along[1]
    for y in tensors(rest):
        channels = site.tie(channels, y.along[0])
    if channels is not None:
        units = site.book.together(channels, groups)
        if site.stock:
            for name, labels in (("num_groups", units), ("num_channels", channels)):
                site.book.sizes.append(Size(path=site.path, attribute=name, labels=labels))
    for rest_of in x.along[2:]:
        site.pin(rest_of, "group norm takes a mean over it")
    return site.out(*x.along)


def layer_norm(site: Site, x: Traced, shape: list[int], *rest: Any) -> Traced:
    """The mean over a width changes with the width, so it stays."""
    inner: tuple[Along, ...] = x.along[-len(shape) :]
    for y in tensors(rest):
        inner = tuple(site.tie(a, b) for a, b in zip(inner, y.along, strict=True))
    for k in range(len(shape)):
        site.pin(
            inner[k], f"{site.name} takes a mean over the width, which its removal would change"
        )
    return site.out(*x.along)


def prelu(site: Site, x: Traced, w: Traced) -> Traced:
    """A slope for each channel, or one for all."""
    if prod(w.shape) > 1:
        site.book.carry(w.along[0])
        site.tie(x.along[1], w.along[0])
        if site.stock and w.along[0] is not None:
            size = Size(path=site.path, attribute="num_parameters", labels=w.along[0])
            site.book.sizes.append(size)
    return site.out(*x.along)


def spatial(site: Site, x: Traced, *_: Any) -> Any:
    """Pooling, resizing: what changes its size is not a width."""
    outs = []
    for shape in site.shapes:
        along: list[Along] = []
        for size, before, labels in zip(shape, x.shape, x.along, strict=True):
            if size != before:
                site.pin(labels, f"{site.name} changes its size")
            along.append(labels if size == before else None)
        outs.append(Traced(shape=shape, along=tuple(along)))
    return outs[0] if len(outs) == 1 else outs


def pad(site: Site, x: Traced, widths: list[int], mode: str = "constant", *_: Any) -> Traced:
    """Entries that are added before and behind stay."""
    along = list(x.along)
    for k in range(len(widths) // 2):
        low, high, labels = widths[2 * k], widths[2 * k + 1], along[-1 - k]
        if labels is None or (low, high) == (0, 0):
            continue
        edge = [site.book.fresh(max(n, 0)) for n in (low, high)]
        if mode != "constant" or min(low, high) < 0:
            site.pin(labels, f"{site.name} cuts or mirrors it")
            along[-1 - k] = None
        else:
            along[-1 - k] = np.concatenate([edge[0], labels, edge[1]])
        for some in edge:
            site.pin(some, f"{site.name} adds it")
    return site.out(*along)


def over(site: Site, x: Traced, dims: Any = None, *rest: Any) -> Traced:
    """Softmax and the like, which mix the entries of a dimension and keep its size."""
    for k in _dims(x, dims):
        site.pin(x.along[k], f"{site.name} mixes its entries")
    return site.out(*x.along)


def reduce(site: Site, x: Traced, dims: Any = None, *rest: Any) -> Any:
    """Mean, maximum and the like."""
    gone = _dims(x, dims)
    for k in gone:
        site.pin(x.along[k], f"{site.name} takes one number of it")
    kept = len(site.shape) == len(x.shape)
    along = tuple(
        None if k in gone else labels for k, labels in enumerate(x.along) if kept or k not in gone
    )
    outs = [Traced(shape=shape, along=along) for shape in site.shapes]
    return outs[0] if len(outs) == 1 else outs


def norm(site: Site, x: Traced, order: Any = 2, dims: Any = None, *rest: Any) -> Any:
    """`reduce` with an order in between."""
    return reduce(site, x, dims)


def _dims(x: Traced, dims: Any) -> set[int]:
    some = dims if isinstance(dims, list | tuple) else [dims]
    if not some or not all(isinstance(k, int) and not isinstance(k, bool) for k in some):
        return set(range(len(x.shape)))
    return {k % max(len(x.shape), 1) for k in some}
