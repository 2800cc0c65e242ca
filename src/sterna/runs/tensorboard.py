"""TensorBoard events, where the ``report`` extra is installed."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes scalars into ``<folder>/tensorboard``; does nothing without a folder or the extra.

    Args:
        folder: the run folder, or None.
        purge_step: hide events from this step on, which a killed run may have left.
    """

    def __init__(self, folder: Path | None, purge_step: int | None = None) -> None:
        self._writer: Any = None
        if folder is not None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """One value per tag at ``step``."""
        if self._writer is not None:
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
