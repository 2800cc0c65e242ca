"""Which indices of which dimensions stand or fall together: labels on tensor dimensions, merged by rules.

Every index of every dimension of every parameter gets a label, a whole number. Each operator of a traced
model carries labels from its inputs to its output, and merges two labels where the operator makes their
indices meet: channel c of a convolution's input and slice c of its weight. What has one label in the end
is one unit: it is removed everywhere or nowhere. A dimension without labels (batch, space, time) does not
shrink; a label that meets one is pinned, with the reason in words.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Labels: TypeAlias = npt.NDArray[np.int64]
Along: TypeAlias = Labels | None
"""Labels of the indices along one dimension, or None where it does not shrink."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What the rules know of one tensor of the traced graph.

    Args:
        shape: as in the trace.
        along: for each dimension its labels or None.
        stacked: for the states of a recurrent stack, the labels of the last dimension for each index of
            the first, since layers differ; ``along[-1]`` is None then.
        parameter: whether it is a parameter, perhaps transposed.
        made_in: path of the module whose code made it out of nothing (zeros, ones), else None.
    """

    shape: tuple[int, ...]
    along: tuple[Along, ...]
    stacked: tuple[Labels, ...] | None = None
    parameter: bool = False
    made_in: str | None = None


@dataclass(frozen=True, kw_only=True)
class Size:
    """An attribute that holds a width: of the module ``path``, the number of ``labels`` that are left.

    ``guessed``: a whole number in the user's own module that merely equals the width; it is changed
    only where the model does not run otherwise.
    """

    path: str
    attribute: str
    labels: Labels
    guessed: bool = False


@dataclass
class Book:
    """Labels and what became of them: merged (a union-find), pinned, read, carried.

    ``reads``: labels of weight columns that multiply a unit's value. ``makes``: of rows that make one; a
    shared weight may do both. ``carries``: labels of weights whose
    being zero says nothing about the value, as a convolution's in front of a batch norm. ``where``: the
    operator at hand; ``merges``: what was merged, and where.
    """

    parent: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    reads: set[int] = field(default_factory=set)
    makes: set[int] = field(default_factory=set)
    carries: set[int] = field(default_factory=set)
    sizes: list[Size] = field(default_factory=list)
    recurrent: dict[str, tuple[Labels, ...]] = field(default_factory=dict)
    views: list[tuple[Labels, str]] = field(default_factory=list)
    where: str = ""
    merges: list[tuple[Labels, Labels, str]] = field(default_factory=list)

    def fresh(self, count: int) -> Labels:
        """New labels, each alone."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count, dtype=np.int64)

    def root(self, label: int) -> int:
        """The label that stands for all that are merged with this one."""
        parent = self.parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def roots(self, labels: Labels) -> Labels:
        """`root` of each."""
        flat = [self.root(int(label)) for label in labels.reshape(-1)]
        return np.array(flat, dtype=np.int64).reshape(labels.shape)

    def merge(self, a: Labels, b: Labels) -> Labels:
        """One unit of a[i] and b[i], for each i; labels broadcast."""
        wide, other = np.broadcast_arrays(a, b)
        self.merges.append((wide, other, self.where))
        for x, y in zip(wide.reshape(-1), other.reshape(-1), strict=True):
            low, high = sorted((self.root(int(x)), self.root(int(y))))
            if low != high:
                self.parent[high] = low
                if high in self.reasons:
                    self.reasons.setdefault(low, self.reasons.pop(high))
        return wide

    def pin(self, labels: Along, reason: str) -> None:
        """These units stay, for this reason; the first reason is kept."""
        if labels is not None:
            for label in labels.reshape(-1):
                self.reasons.setdefault(self.root(int(label)), reason)

    def tie(self, a: Along, b: Along, reason: str) -> Along:
        """The same indices under two names: merged, or pinned where one of them does not shrink."""
        if a is None or b is None:
            self.pin(a, reason)
            self.pin(b, reason)
            return a if b is None else b
        return self.merge(a, b)

    def read(self, labels: Along) -> Along:
        """Mark weight columns that multiply the value of a unit."""
        if labels is not None:
            self.reads.update(int(label) for label in labels.reshape(-1))
        return labels

    def make(self, labels: Along) -> Along:
        """Mark weight rows that make the value of a unit."""
        if labels is not None:
            self.makes.update(int(label) for label in labels.reshape(-1))
        return labels

    def carry(self, *labels: Along) -> None:
        """Mark weights whose being zero does not make the unit's value zero, nor need it be."""
        for some in labels:
            if some is not None:
                self.carries.update(int(label) for label in some.reshape(-1))

    def together(self, labels: Labels, count: int) -> Labels:
        """Merge every ``len / count`` neighbours into one; one label for each of the ``count``."""
        rows = labels.reshape(count, -1)
        self.merge(rows, rows[:, :1])
        return rows[:, 0]

    def tied_by(self, several: Iterable[Labels]) -> list[list[str]]:
        """For labels that are one unit now, where they became fewer: the merges are gone through again."""
        again = Book(parent=list(range(len(self.parent))))
        found: list[list[str]] = []
        member: dict[int, set[int]] = {}  # of a root, which of ``several`` it stands for
        for num, labels in enumerate(several):
            found.append([])
            for label in labels.tolist():
                member.setdefault(label, set()).add(num)
        for a, b, where in self.merges:
            for x, y in zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True):
                low, high = sorted((again.root(x), again.root(y)))
                if low == high:
                    continue
                again.parent[high] = low
                mine, other = member.get(low, set()), member.pop(high, set())
                for num in mine & other:
                    if where not in found[num]:
                        found[num].append(where)
                if mine or other:
                    member[low] = mine | other
        return found


def blocks(
    before: Iterable[int], after: Iterable[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Which dimensions of a reshape's input make which of its output; sizes of 1 are left out.

    Example:
        >>> blocks((2, 8, 4, 4), (2, 128))
        [((0,), (0,)), ((1, 2, 3), (1,))]
        >>> blocks((2, 5, 12), (2, 1, 5, 3, 4))
        [((0,), (0,)), ((1,), (2,)), ((2,), (3, 4))]
    """
    ins = [(k, size) for k, size in enumerate(before) if size != 1]
    outs = [(k, size) for k, size in enumerate(after) if size != 1]
    found = []
    while ins and outs:
        left, right = [ins.pop(0)], [outs.pop(0)]
        while (a := _volume(left)) != (b := _volume(right)):
            side, rest = (left, ins) if a < b else (right, outs)
            if not rest:
                break
            side.append(rest.pop(0))
        found.append((tuple(k for k, _ in left), tuple(k for k, _ in right)))
    return found


def _volume(dims: list[tuple[int, int]]) -> int:
    volume = 1
    for _, size in dims:
        volume *= size
    return volume
