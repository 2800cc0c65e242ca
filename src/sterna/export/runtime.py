"""ONNX Runtime: a session for a file, and how far its outputs are from torch's."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sterna.export.inputs import at_batch, feeds, tensors
from sterna.randomness import isolated


class ExportError(ValueError):
    """A model that has no ONNX file, or whose file does not agree with torch; the message says why."""


def session(content: bytes, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU with so many threads inside an operator.

    Raises:
        ExportError: ONNX Runtime cannot run the graph.
    """
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot run the model: {first_line(error)} Its CPU kernels are for float32 "
            "above all: export model.float(), or change the layer that needs this operator."
        ) from error


def agreement(
    model: nn.Module,
    copy: nn.Module,
    content: bytes,
    inputs: Any,
    batch_dim: int,
    batches: Sequence[int],
    tolerance: float,
) -> float:
    """The largest difference from torch over the batches.

    Args:
        model: the original, for messages.
        copy: what was exported, in evaluation mode on the CPU.
        content: the ONNX file.
        inputs: positional arguments.
        batch_dim: the dimension that counts examples.
        batches: how many examples to give.
        tolerance: largest difference allowed, as a share of the largest output.

    Raises:
        ExportError: it is too large, or one of the two does not run.
    """
    runner, name, largest = session(content), type(model).__name__, 0.0
    for num in batches:
        some = at_batch(inputs, num, batch_dim)
        try:
            with torch.no_grad(), isolated(0, "export"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = tensors(copy(*some))
            found = runner.run(None, feeds(runner, some))
        except Exception as error:
            raise ExportError(
                f"{name} does not run with a batch of {num}: {first_line(error)} Export for the example's "
                "batch alone (dynamic_batch=False), or take sizes from the tensor's shape."
            ) from error
        if len(found) != len(expected):
            raise ExportError(
                f"{name} gives {len(expected)} tensors in torch and {len(found)} in ONNX Runtime; let it "
                "return tensors only, each once."
            )
        for theirs, ours in zip(expected, found, strict=True):
            off, scale = _apart(theirs, torch.as_tensor(ours), name, num)
            largest = max(largest, off)
            if off > (tolerance * scale + 1e-7 if theirs.is_floating_point() else 0.0):
                raise ExportError(
                    f"{name} gives other outputs in ONNX Runtime: at a batch of {num} they are off by "
                    f"{off:.3g}, and {tolerance:g} of the largest, {scale:.3g}, is allowed. Something in "
                    "it is random in evaluation mode or computed in Python; or raise the tolerance."
                )
    return largest


def _apart(theirs: Tensor, ours: Tensor, name: str, num: int) -> tuple[float, float]:
    if theirs.shape != ours.shape:
        raise ExportError(
            f"{name} gives shape {tuple(ours.shape)} in ONNX Runtime instead of {tuple(theirs.shape)} at a "
            f"batch of {num}: a size became a constant. Take sizes from the tensor's shape."
        )
    if not theirs.numel():
        return 0.0, 0.0
    a, b = theirs.double(), ours.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf"), float(a.abs().max())
    finite = a.isfinite()
    if not finite.any():
        return 0.0, 0.0
    return float((a - b)[finite].abs().max()), float(a[finite].abs().max())


def first_line(error: BaseException) -> str:
    """The first line of an error as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\s+", " ", lines[0]) if lines else type(error).__name__
    return text if text.endswith((".", "!", "?", ":")) else f"{text}."
