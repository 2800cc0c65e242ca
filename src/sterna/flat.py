"""Named tensors as views of one flat buffer.

What travels between workers is named, never numbered: state keyed by a bucket or a position breaks as
soon as somebody rebuilds the buckets. For speed the named tensors are views of one contiguous buffer, so
that a kernel runs once per step over all of them and keeps its statistics by segment.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Named = Mapping[str, Tensor]

_ROW = 4096


@dataclass(frozen=True)
class Layout:
    """Which tensor lies where in a flat buffer: names and shapes, in order, without gaps."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, named: Named) -> "Layout":
        """The layout that packs ``named`` in its own order."""
        return cls(tuple(named), tuple(tuple(x.shape) for x in named.values()))

    @cached_property
    def bounds(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Offsets of the segments, in elements: segment ``k`` is ``bounds[k]:bounds[k + 1]``."""
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in self.shapes]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Position of each name."""
        return {name: k for k, name in enumerate(self.names)}

    @property
    def num_elements(self) -> int:
        """Elements of the whole buffer."""
        return int(self.bounds[-1])

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of names and shapes; peers compare it before they exchange anything."""
        return hashlib.sha256(repr((self.names, self.shapes)).encode()).hexdigest()[:16]


def norm(buffer: Tensor) -> Tensor:
    """Euclidean norm of a one-dimensional buffer, 0-dim float64: the same bits with any number of threads.

    Norms of rows of fixed length in the buffer's own precision, their squares added in float64. Infinite
    where a row's squares overflow, from about 1e18 on in float32.

    Example:
        >>> norm(torch.tensor([3.0, 4.0]))
        tensor(5., dtype=torch.float64)
    """
    rows = buffer.numel() // _ROW
    body, rest = buffer[: rows * _ROW].view(rows, _ROW), buffer[rows * _ROW :]
    norms = [torch.linalg.vector_norm(body, dim=1)] if rows else []
    norms.append(torch.linalg.vector_norm(rest).view(1))
    return torch.cat(norms).double().square().sum().sqrt()


class Flat(Mapping[str, Tensor]):
    """Named tensors that are views of one contiguous one-dimensional buffer.

    Args:
        layout: names and shapes, in the order in which they lie.
        buffer: one-dimensional tensor of ``layout.num_elements`` elements.

    Example:
        >>> flat = Flat.of({"w": torch.ones(2, 3), "b": torch.zeros(2)})
        >>> flat.buffer.shape, flat["w"].shape
        (torch.Size([8]), torch.Size([2, 3]))
        >>> flat["b"].fill_(5.0) is not None and flat.buffer[-1].item()
        5.0
    """

    def __init__(self, layout: Layout, buffer: Tensor) -> None:
        if buffer.shape != (layout.num_elements,):
            raise ValueError(
                f"Flat: buffer must have shape ({layout.num_elements},) to hold the layout's "
                f"{len(layout.names)} tensors; got {tuple(buffer.shape)}."
            )
        self.layout = layout
        self.buffer = buffer
        self._views: dict[str, Tensor] = {}

    @classmethod
    def of(cls, named: Named) -> "Flat":
        """``named`` itself where it is flat already, else a packed copy in the common dtype."""
        if isinstance(named, Flat):
            return named
        layout = Layout.of(named)
        if not named:
            return cls(layout, torch.zeros(0))
        dtype = None
        for x in named.values():
            dtype = x.dtype if dtype is None else torch.promote_types(dtype, x.dtype)
        return cls(layout, torch.cat([x.detach().reshape(-1).to(dtype) for x in named.values()]))

    @classmethod
    def zeros_like(cls, named: Named) -> "Flat":
        """Zeros of the same names, shapes, dtype and device."""
        flat = cls.of(named)
        return cls(flat.layout, torch.zeros_like(flat.buffer))

    def clone(self) -> "Flat":
        """A copy with its own buffer."""
        return Flat(self.layout, self.buffer.clone())

    def __getitem__(self, name: str) -> Tensor:
        view = self._views.get(name)
        if view is None:
            k = self.layout.index[name]
            start, stop = int(self.layout.bounds[k]), int(self.layout.bounds[k + 1])
            view = self._views[name] = self.buffer[start:stop].view(self.layout.shapes[k])
        return view

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout.names)

    def __repr__(self) -> str:
        return (
            f"Flat({len(self)} tensors, {self.layout.num_elements} elements, {self.buffer.dtype})"
        )
