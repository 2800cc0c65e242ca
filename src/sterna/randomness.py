"""Random streams: every draw comes from a generator that is derived from a seed and a purpose.

Global random state is banned from the library, with one exception that lives here: ``nn.Module``
constructors and stock layers such as ``nn.Dropout`` take no generator and read torch's global one.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose; different purposes give unrelated streams."""
    digest = hashlib.sha256(repr((int(seed), *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator for one purpose.

    Example:
        >>> a, b = generator(0, "codec", 1), generator(0, "codec", 1)
        >>> bool((torch.rand(3, generator=a) == torch.rand(3, generator=b)).all())
        True
    """
    return torch.Generator().manual_seed(derive(seed, *purpose))


def seed_global(seed: int, *purpose: object) -> None:
    """Seed torch's global generators of this process, for a worker process that owns them."""
    torch.manual_seed(derive(seed, *purpose))  # noqa: TID251  the one place


@contextmanager
def isolated(seed: int, *purpose: object) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore them after it."""
    with torch.random.fork_rng():
        seed_global(seed, *purpose)
        yield
