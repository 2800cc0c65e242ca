"""What `sterna compress` wrote, looked at again; and an ONNX file where a model can have one."""

from pathlib import Path

import torch
from torch import nn

from sterna.export.onnx import Exported, to_onnx
from sterna.export.runtime import ExportError
from sterna.randomness import isolated
from sterna.runs.files import StoreError
from sterna.runs.subject import of_run


def read_back(folder: Path, model: nn.Module, inputs: torch.Tensor) -> None:
    """Complain unless the model in the folder gives the outputs of the one that it was written from.

    Args:
        folder: of `sterna compress`, with ``original.json`` and ``model.safetensors``.
        model: the model that was written.
        inputs: some examples, shape (examples, ...).

    Raises:
        StoreError: it does not, or cannot be loaded.
    """
    outputs = []
    for one in (model.eval(), of_run(folder).model):
        with torch.no_grad(), isolated(0, "read back"):
            outputs.append(one(inputs))
    expected, found = outputs
    largest = float(expected.abs().max())
    if found.shape != expected.shape or not torch.allclose(
        found, expected, rtol=1e-4, atol=1e-5 * largest, equal_nan=True
    ):
        raise StoreError(
            f"{folder / 'model.safetensors'}, read back, gives other outputs than the model that was chosen; "
            "do not use it. Does the function that builds the original give the same architecture each time?"
        )


def exported_as_possible(
    model: nn.Module, example: torch.Tensor, path: Path
) -> tuple[Exported | None, str]:
    """The ONNX file, for any batch or else for the example's; and what should be known of it.

    Args:
        model: the compressed model.
        example: inputs, shape (examples, ...).
        path: the file.

    Returns:
        The file, or None where the model has none; and a caution, empty where it takes any batch.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        return to_onnx(model, example, path), ""
    except ExportError as error:
        why = str(error)
    try:
        exported = to_onnx(model, example, path, dynamic_batch=False)
    except ExportError as error:
        return None, f"{error} There is no model.onnx of the compressed model."
    return exported, f"model.onnx takes batches of {len(example)} only: {why}"
