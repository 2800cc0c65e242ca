"""Examples in memory: what every reader returns and every training loop indexes."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from sterna.data.merit import ACCURACY, Merit
from sterna.data.split import stratified
from sterna.randomness import generator
from sterna.seams import Batch

Index = Int64[Tensor, " batch"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and targets in memory; implements `sterna.seams.Source`.

    Args:
        inputs: shape (examples, ...), any dtype.
        targets: shape (examples, ...), any dtype, on the same device.

    Raises:
        TypeError: ``inputs`` or ``targets`` is not a tensor.
        ValueError: they disagree in the number of examples or the device, or hold no example.

    Example:
        >>> examples = Examples(torch.arange(8.0).view(4, 2), torch.tensor([0, 1, 0, 1]))
        >>> examples
        Examples(inputs=(4, 2) float32, targets=(4,) int64)
        >>> examples[torch.tensor([2, 0])].inputs
        tensor([[4., 5.],
                [0., 1.]])
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        for name in ("inputs", "targets"):
            value: object = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"Examples: {name} must be a torch.Tensor; got {type(value).__name__}. "
                    "Convert arrays with torch.from_numpy."
                )
            if value.dim() == 0 or len(value) == 0:
                raise ValueError(
                    f"Examples: {name} must have shape (examples, ...) with at least one example; "
                    f"got {tuple(value.shape)}."
                )
        if len(self.inputs) != len(self.targets):
            raise ValueError(
                f"Examples: inputs and targets must have the same first dimension, one target an "
                f"example; got {tuple(self.inputs.shape)} and {tuple(self.targets.shape)}."
            )
        if self.inputs.device != self.targets.device:
            raise ValueError(
                f"Examples: inputs and targets must be on the same device; got "
                f"{self.inputs.device} and {self.targets.device}. Use Examples.to(device)."
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Index) -> Batch:
        """The examples ``index``, in that order.

        Raises:
            TypeError: ``index`` is not a one-dimensional int64 tensor.
            IndexError: an index lies outside ``[0, len(self))``.
        """
        given: object = index
        if not (isinstance(given, Tensor) and index.dim() == 1 and index.dtype == torch.int64):
            what = f"{index.dtype} {tuple(index.shape)}" if isinstance(given, Tensor) else given
            raise TypeError(
                f"Examples: index must be a one-dimensional int64 tensor; got {what!r}. In a "
                "DataLoader use DataLoader(examples, sampler=Shuffle(...), batch_size=None)."
            )
        where = index.to(self.inputs.device)
        try:
            return Batch(
                self.inputs.index_select(0, where), self.targets.index_select(0, where), index
            )
        except (IndexError, RuntimeError) as error:
            if index.min() < 0 or index.max() >= len(self):
                raise IndexError(
                    f"Examples: every index must lie in [0, {len(self)}); got "
                    f"{int(index.min())}..{int(index.max())}. Make the sampler with "
                    f"num_examples={len(self)}."
                ) from error
            raise

    def to(self, device: torch.device | str) -> "Examples":
        """The same examples on another device."""
        return Examples(self.inputs.to(device), self.targets.to(device))

    def __repr__(self) -> str:
        def brief(x: Tensor) -> str:
            return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"

        return f"Examples(inputs={brief(self.inputs)}, targets={brief(self.targets)})"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named task of predicting classes: examples to train on and examples to test on.

    Args:
        name: as it stands in reports; says so where the data is not the full published set.
        train: examples to train on.
        test: examples to judge by, of the same shape and dtype.
        classes: number of classes, of a language model its words; every target is an int64 in
            ``[0, classes)``. An example may have several, one for each position.
        merit: by what a trained model is judged: `ACCURACY` or `PERPLEXITY`.

    Raises:
        ValueError: train and test disagree, or a target is not a class.

    Example:
        >>> part = Examples(torch.zeros(10, 3), torch.arange(10) % 2)
        >>> toy = Dataset("toy", part, part, classes=2)
        >>> tuning = toy.validation_split(0.4, seed=0)
        >>> tuning.name, len(tuning.train), len(tuning.test)
        ('toy (validation 0.4)', 6, 4)
        >>> tuning.test.targets.bincount()
        tensor([2, 2])
    """

    name: str
    train: Examples
    test: Examples
    classes: int
    merit: Merit = ACCURACY

    def __post_init__(self) -> None:
        if self.classes < 1:
            raise ValueError(f"Dataset: classes must be at least 1; got {self.classes}.")
        for field in ("inputs", "targets"):
            a, b = getattr(self.train, field), getattr(self.test, field)
            if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
                raise ValueError(
                    f"Dataset: {field} of train and test must have the same shape but for the "
                    f"first dimension, and the same dtype; got {a.dtype} {tuple(a.shape)} and "
                    f"{b.dtype} {tuple(b.shape)}."
                )
        for part in ("train", "test"):
            targets = getattr(self, part).targets
            if targets.dtype != torch.int64:
                raise ValueError(
                    f"Dataset: targets of {part} must be int64 classes; got {targets.dtype}. "
                    "Convert them with .long()."
                )
            low, high = (int(x) for x in targets.aminmax())
            if low < 0 or high >= self.classes:
                raise ValueError(
                    f"Dataset: targets of {part} must lie in [0, {self.classes}), the classes; got "
                    f"{low}..{high}."
                )

    def validation_split(self, fraction: float, seed: int) -> "Dataset":
        """A data set for tuning: its test examples are cut out of ``train``, class by class.

        The test set stays unseen. Inputs keep the scaling of the whole training part. Examples with
        several targets are cut by chance alone. Windows of one text are then neighbours of what is
        trained on; a text with a validation part of its own, such as `sterna.data.ptb`, is better
        judged by that.

        Args:
            fraction: share of the training examples that becomes the test part, in (0, 1).
            seed: the same seed gives the same split.
        """
        count = round(fraction * len(self.train)) if math.isfinite(fraction) else 0
        if not 0 < fraction < 1 or not 0 < count < len(self.train):
            raise ValueError(
                f"Dataset.validation_split: fraction must lie in (0, 1) and leave at least one of "
                f"the {len(self.train)} training examples on either side; got {fraction}."
            )
        targets = self.train.targets
        kept, cut = stratified(targets.cpu(), count, generator(seed, "validation"))
        parts = (self.train[kept], self.train[cut])
        train, test = (Examples(part.inputs, part.targets) for part in parts)
        return replace(self, name=f"{self.name} (validation {fraction:g})", train=train, test=test)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on another device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))
