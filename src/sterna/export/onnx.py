"""A model as an ONNX file, checked against torch before it is written.

    example --torch.export--> graph --ONNX--> bytes --checker, ONNX Runtime--> |y - y_torch| --> file

The exporter is torch's own. The batch is a free dimension of the file; the file is run in ONNX Runtime
for the example's batch, for one example and for one more than the example has, and compared with torch.
A file that does not agree is not written. The model is never changed: a copy on the CPU, in evaluation
mode, is exported.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sterna.export.inputs import Example, at_batch, batch_size, mapped, tensors
from sterna.export.runtime import ExportError, agreement, first_line
from sterna.quiet import quiet
from sterna.randomness import isolated
from sterna.surgery.program import copied

_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LARGEST = 2**31  # bytes of one protobuf message
_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An ONNX file that agrees with the model.

    Args:
        path: the file.
        bytes: its size.
        opset: the version of ONNX's operators that it uses.
        inputs: names of its inputs, in the order of the example.
        outputs: names of its outputs.
        batches: batch sizes at which it was compared with torch.
        largest_difference: largest absolute difference from torch's outputs over all of them.
        tolerance: what was allowed, as a share of the largest output.
        dynamic_batch: whether any batch size may be given.
    """

    path: Path
    bytes: int
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batches: tuple[int, ...]
    largest_difference: float
    tolerance: float
    dynamic_batch: bool


def to_onnx(
    model: nn.Module,
    example: Example,
    path: Path | str,
    *,
    dynamic_batch: bool = True,
    batch_dim: int = 0,
    tolerance: float | None = None,
) -> Exported:
    """Write a model as ONNX, after comparing it with torch in ONNX Runtime.

    Args:
        model: any module that `torch.export` can trace; it is left as it is.
        example: an input, or a tuple of positional arguments; float or int64, on any device.
        path: the file, whole or absent; usually ``*.onnx``.
        dynamic_batch: leave the batch size free; False fixes it to the example's.
        batch_dim: the dimension that counts examples: 1 for recurrent models with time first.
        tolerance: largest absolute difference allowed, as a share of the largest output; above 0. None
            takes 1e-4, or five roundings of the coarsest dtype in the model where that is more. Whole
            numbers must be equal.

    Returns:
        Where it is, and how far it is from torch.

    Raises:
        ModuleNotFoundError: the extra ``export`` is not installed.
        ExportError: the model cannot be traced, fixes the batch size, uses an operator that ONNX or ONNX
            Runtime lacks, or gives other outputs.
        OSError: the file cannot be written; what was there before is untouched.
        ValueError: an argument is out of range.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with TemporaryDirectory() as folder:
        ...     exported = to_onnx(model, torch.ones(3, 4), f"{folder}/model.onnx")
        >>> exported.batches, exported.largest_difference < 1e-5
        ((3, 1, 4), True)
    """
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(
            f"to_onnx: tolerance must be a share in (0, 1), or None; got {tolerance!r}."
        )
    require_packages()
    path = Path(path)
    content, names, onnx_opset, inputs, copy, batches = _converted(
        model, example, dynamic_batch, batch_dim
    )
    tolerance = tolerance or _usual(copy, inputs)
    largest = agreement(model, copy, content, inputs, batch_dim, batches, tolerance)
    _write_whole(path, content)
    return Exported(
        path=path,
        bytes=len(content),
        opset=onnx_opset,
        inputs=names[0],
        outputs=names[1],
        batches=batches,
        largest_difference=largest,
        tolerance=tolerance,
        dynamic_batch=dynamic_batch,
    )


def _usual(model: nn.Module, inputs: Any) -> float:
    """What rounding may make of an output: see `to_onnx`."""
    every = (*model.parameters(), *model.buffers(), *tensors(inputs))
    steps = [torch.finfo(x.dtype).eps for x in every if x.is_floating_point()]
    return max(_TOLERANCE, 5 * max(steps, default=0.0))


def onnx_bytes(model: nn.Module, example: Example) -> bytes:
    """The ONNX file of a model, not compared with torch; with a free batch size where it can have one.

    Raises:
        ModuleNotFoundError: the extra ``export`` is not installed.
        ExportError: as in `to_onnx`.
    """
    require_packages()
    try:
        return _converted(model, example, True, 0)[0]
    except ExportError:
        return _converted(model, example, False, 0)[0]


def require_packages() -> None:
    """Complain if the packages of the extra ``export`` are not there.

    Raises:
        ModuleNotFoundError: the message names what is missing and the extra.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"ONNX export needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed: pip install 'sterna[export]'"
        )


def _converted(
    model: nn.Module, example: Example, dynamic: bool, batch_dim: int
) -> tuple[bytes, tuple[tuple[str, ...], tuple[str, ...]], int, Any, nn.Module, tuple[int, ...]]:
    """The file, its names and opset, the inputs on the CPU, the copy, and the batches to look at."""
    given = example if isinstance(example, tuple) else (example,)
    inputs = mapped(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, given)
    size = batch_size(inputs, batch_dim)
    copy = copied(model).cpu().eval()
    if dynamic and size == 1:  # the tracer takes a size of 1 for a constant
        inputs, size = at_batch(inputs, 2, batch_dim), 2
    batches = tuple(dict.fromkeys((size, 1, size + 1))) if dynamic else (size,)
    with quiet(), isolated(0, "export"):
        graph = _traced(model, copy, inputs, dynamic, batch_dim, size)
        content, names, opset = _serialised(model, graph)
    return content, names, opset, inputs, copy, batches


def _traced(
    model: nn.Module, copy: nn.Module, inputs: Any, dynamic: bool, batch_dim: int, size: int
) -> torch.export.ExportedProgram:
    name = type(model).__name__
    try:
        with torch.no_grad():
            copy(*mapped(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors(inputs))
        raise ExportError(
            f"{name} does not run on the example (inputs of shape {shapes}): {first_line(error)} Pass an "
            "input as the model gets it in use."
        ) from error
    fixed = False
    if dynamic:
        batch = torch.export.Dim("batch")

        def free(x: Any) -> Any:
            counts = isinstance(x, Tensor) and x.dim() > batch_dim and x.shape[batch_dim] == size
            return {batch_dim: batch} if counts else None

        try:
            return torch.export.export(
                copy, inputs, dynamic_shapes=mapped(free, inputs), strict=False
            )
        except Exception:
            fixed = True  # or it cannot be traced at all, which shows below
    try:
        found = torch.export.export(copy, inputs, strict=False)
    except Exception as error:
        raise ExportError(
            f"{name} cannot be traced on the example: {first_line(error)} The forward may branch on "
            "shapes, not on values: pull such a branch out of it, or export the submodules one by one."
        ) from error
    if fixed:
        raise ExportError(
            f"{name} fixes its batch size: something in its forward makes {size}, dimension {batch_dim} of "
            "the example, a constant. Take sizes from the tensor's shape, name the right dimension "
            "(batch_dim), or export for this batch alone (dynamic_batch=False)."
        )
    return found


def _serialised(
    model: nn.Module, graph: torch.export.ExportedProgram
) -> tuple[bytes, tuple[tuple[str, ...], tuple[str, ...]], int]:
    import onnx

    try:
        program = torch.onnx.export(graph, dynamo=True, verbose=False, external_data=False)
    except Exception as error:
        raise ExportError(_without_export(model, graph, error)) from error
    if program is None:
        raise ExportError(f"{type(model).__name__}: torch made no ONNX program of it.")
    proto = program.model_proto
    if proto.ByteSize() >= _LARGEST:
        raise ExportError(
            f"{type(model).__name__}: the file would have {proto.ByteSize()} bytes, and one ONNX file holds "
            "less than 2 GiB. Shrink it first, or export it in parts."
        )
    _name_batch(proto.graph)
    _strip(proto.graph)
    for function in proto.functions:
        _strip(function)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__}: torch's ONNX file of it is not valid: {first_line(error)} Its types "
            "may be the reason: ONNX has most operators for float32, so export model.float()."
        ) from error
    names = tuple(tuple(x.name for x in xs) for xs in (proto.graph.input, proto.graph.output))
    opset = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    return proto.SerializeToString(), (names[0], names[1]), opset


def _name_batch(graph: Any) -> None:
    """Call the free dimension ``batch``, which the exporter numbers."""
    every = [
        dim
        for value in (*graph.input, *graph.output, *graph.value_info)
        for dim in value.type.tensor_type.shape.dim
        if dim.dim_param
    ]
    free = {dim.dim_param for dim in every if dim.dim_param.isidentifier()}
    if len(free) == 1:
        (number,) = free
        for dim in every:
            dim.dim_param = re.sub(rf"\b{number}\b", "batch", dim.dim_param)


def _strip(graph: Any) -> None:
    """Leave out the exporter's notes, which hold stack traces and the paths of this machine."""
    for item in (graph, *graph.node, *graph.value_info, *getattr(graph, "initializer", ())):
        del item.metadata_props[:]
        item.doc_string = ""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _strip(inner)


def _without_export(
    model: nn.Module, graph: torch.export.ExportedProgram, error: BaseException
) -> str:
    """One sentence that names the operator and the module that calls it."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    found = None
    for text in reversed(texts):
        found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text)
        found = found or re.search(r"No ONNX function found for <?([\w.:]+)", text)
        if found:
            break
    name = type(model).__name__
    if not found:
        lines = [line for line in texts[-1].splitlines() if line.strip()]
        return f"{name} has no ONNX export: {(lines or ['an internal error of the exporter'])[0].strip()}"
    operator = found[1]
    where = _who_calls(graph, operator)
    place = f" in {where}" if where else ""
    return (
        f"{name} cannot be exported: the operator {operator}{place} has no ONNX export. Write that step "
        "with other operators, or leave it out of the model and run it behind the ONNX file."
    )


def _who_calls(graph: torch.export.ExportedProgram, operator: str) -> str:
    """The innermost module in which an operator stands."""
    wanted = re.sub(r"\.(default|[A-Z]\w*)$", "", operator.replace("::", "."))
    for node in graph.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith(wanted):
            stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
            if stack:
                path, kind = list(stack.values())[-1]
                word = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
                return f"{path!r} ({word})" if path else word
    return ""


def _write_whole(path: Path, content: bytes) -> None:
    """Write beside, then rename: readers see the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        folder = next(p for p in path.absolute().parents if p.exists())
        free = shutil.disk_usage(folder).free >> 20
        raise OSError(
            f"{path} could not be written: {error} ({free} MiB free). What was there before is whole."
        ) from error
    finally:
        beside.unlink(missing_ok=True)
