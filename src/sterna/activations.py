"""How much memory autograd keeps between forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sterna.ledger import Ledger


@contextmanager
def kept_for_backward(ledger: Ledger, parameters: Iterator[Tensor]) -> Iterator[None]:
    """Enter into the ledger the bytes that autograd saves inside the block, parameters left out.

    Each storage counts once, however many views of it are saved.
    """
    owned = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in owned:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield
    ledger.add(peak_activation_bytes=sum(seen.values()))
