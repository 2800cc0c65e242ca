"""Weights of few values: rounded to them, and stored in as few bits.

    W  ->  g_{c_1}, ..., g_{c_n}     codes c (positions in the grid g) by the nearest value      (1)
    byte_j = sum_k c_{pj + k} b^k,   k < p,   p = largest with b^p <= 256                        (2)

Symbols: g grid, the value set times the tensor's scale; b base of the digits: 4 for up to four values
(2 bits each), with ``dense`` as many as there are values (3: five ternary codes a byte), and so on up
to 256 values; p codes per byte. The last byte is filled up with code 0. What is unpacked is equal bit
for bit, as the grid itself is stored, in the weight's dtype.

Ternary codes take 1/16 of the bytes of float32 weights and 1/32 of float64; the grid adds its few
numbers a tensor. Biases and everything else stay as they are. Packing saves storage, not time: for a
run the weights are unpacked.

Reference: none needed for the arithmetic; the rounding is that of `sterna.value_sets`.
Differs from the paper: nothing.
Cost per step: a pass over the weights, once. Rounding without training costs accuracy; it is here as
    the control of what trains the values.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sterna.surgery.program import copied
from sterna.value_sets import TERNARY, Grids, Sets, check_sets, choose, nearest, require_plain

Codes = UInt8[Tensor, " n"]
Bytes = UInt8[Tensor, " bytes"]
Weight = Float[Tensor, "*shape"]

_FORMAT = "sterna.packed.1"
_GRID = "/grid"  # no parameter name holds a slash


def codes_per_byte(base: int) -> int:
    """p in (2): how many digits of a base from 2 to 256 fit a byte.

    Raises:
        ValueError: ``base`` is not a whole number from 2 to 256.

    Example:
        >>> [codes_per_byte(base) for base in (2, 3, 4, 5, 16, 256)]
        [8, 5, 4, 3, 2, 1]
    """
    if not isinstance(base, int) or not 2 <= base <= 256:
        raise ValueError(
            f"codes_per_byte: base must be a whole number from 2 to 256; got {base!r}. It is the "
            "number of values, or the next power of 2."
        )
    return next(p for p in (8, 5, 4, 3, 2, 1) if base**p <= 256)


def pack(codes: Codes, base: int) -> Bytes:
    """Codes below ``base``, 2 to 256, as ceil(n / p) bytes.

    Raises:
        ValueError: a code is not below ``base``.

    Example:
        >>> pack(torch.tensor([2, 0, 1, 1, 2, 1], dtype=torch.uint8), base=3).tolist()
        [200, 1]
    """
    if len(codes) and int(codes.max()) >= base:
        raise ValueError(
            f"pack: codes must be below the base, {base}; got {int(codes.max())}. Give the base the "
            "number of values."
        )
    per = codes_per_byte(base)
    digits = torch.cat([codes, codes.new_zeros(-len(codes) % per)]).view(-1, per)
    out = torch.zeros_like(digits[:, 0])
    for k in range(per):
        out += digits[:, k] * base**k
    return out


def unpack(packed: Bytes, num_codes: int, base: int) -> Codes:
    """The codes of `pack`.

    Raises:
        ValueError: ``packed`` is not the size of so many codes.

    Example:
        >>> unpack(torch.tensor([200, 1], dtype=torch.uint8), 6, base=3).tolist()
        [2, 0, 1, 1, 2, 1]
    """
    per = codes_per_byte(base)
    if len(packed) != -(-num_codes // per):
        raise ValueError(
            f"unpack: {num_codes} codes in base {base} take {-(-num_codes // per)} bytes; got "
            f"{len(packed)}. Give the number of codes that were packed."
        )
    wide = packed.short()  # the base itself may not fit a byte
    digits = [wide // base**k % base for k in range(per)]
    return torch.stack(digits, 1).flatten()[:num_codes].to(torch.uint8)


@dataclass(frozen=True)
class RoundingReport:
    """What was rounded, by parameter.

    Args:
        grids: the values that each rounded parameter has.
        error: |W - rounded W|^2 / |W|^2; 0 for a tensor of zeros.
    """

    grids: Grids
    error: Mapping[str, float]


@torch.no_grad()
def ternarise(model: nn.Module, *, sets: Sets = TERNARY) -> tuple[nn.Module, RoundingReport]:
    """A copy of ``model`` with its weights rounded to value sets, ternary unless told otherwise.

    Args:
        model: any module.
        sets: one set for all weights, or pairs of a pattern of parameter names and its set.

    Raises:
        Refused: the model cannot be copied.
        ValueError: a pattern matches nothing; a weight is not finite or has a parametrization.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> rounded, report = ternarise(model)
        >>> len(rounded[0].weight.unique()) <= 3, sorted(report.grids)
        (True, ['0.weight', '2.weight'])
    """
    check_sets(sets, "ternarise")
    out = copied(model)
    named = dict(out.named_parameters())
    chosen = choose(sets, named, "ternarise")
    require_plain(chosen, "ternarise")
    grids, error = {}, {}
    for name, values in chosen.items():
        weight = named[name]
        codes, grid = values.round(weight.detach(), name)
        rounded, size = grid[codes.long()], float(weight.double().square().sum())
        apart = float((weight.double() - rounded.double()).square().sum())
        error[name] = apart / size if size else 0.0
        grids[name] = tuple(grid.tolist())
        weight.copy_(rounded)
    return out, RoundingReport(grids, error)


@dataclass(frozen=True)
class PackedReport:
    """Sizes of a packed model.

    Args:
        num_packed: weights that were packed.
        packed_bytes: what their codes take.
        grid_bytes: what their grids take.
        other_bytes: parameters and buffers that were stored as they are.
    """

    num_packed: int
    packed_bytes: int
    grid_bytes: int
    other_bytes: int

    @property
    def of_float32(self) -> float:
        """Codes as a share of the same weights in float32; 1/16 for ternary ones."""
        return self.packed_bytes / (4 * self.num_packed)

    @property
    def of_float64(self) -> float:
        """Codes as a share of the same weights in float64; 1/32 for ternary ones."""
        return self.packed_bytes / (8 * self.num_packed)

    @property
    def model_bits(self) -> int:
        """All tensors of the file; its header is not counted."""
        return 8 * (self.packed_bytes + self.grid_bytes + self.other_bytes)


@torch.no_grad()
def save_packed(
    model: nn.Module, grids: Grids, path: Path | str, *, dense: bool = False
) -> PackedReport:
    """Store a model whose weights lie on grids, as `ternarise` and `CoNNTrA` report them.

    Args:
        model: any module with a ``state_dict`` of tensors.
        grids: by parameter, the values that it has, ascending.
        path: a safetensors file.
        dense: digits of base |V| instead of whole bits: five ternary codes a byte instead of four.

    Raises:
        ValueError: a name is no parameter, there is none, or a weight is not on its grid.
    """
    tensors: dict[str, Tensor] = {}
    described, num, packed_bytes, grid_bytes = {}, 0, 0, 0
    named = dict(model.named_parameters())
    _require_names(grids, named)
    for name, values in grids.items():
        weight = named[name].detach()
        grid = weight.new_tensor(values)
        codes = nearest(weight, grid)
        if not torch.equal(grid[codes.long()], weight):
            raise ValueError(
                f"save_packed: every weight of {name!r} must be one of its grid's values, {values}; "
                f"got others, such as {float(weight[grid[codes.long()] != weight][0])}. Round the "
                "model with ternarise, or give the grids of the report that came with it."
            )
        base = len(values) if dense else 2 ** (1, 2, 4, 8)[_width(len(values))]
        tensors[name] = pack(codes.flatten().cpu(), base)
        tensors[name + _GRID] = grid.cpu()
        described[name] = {"shape": list(weight.shape), "base": base}
        num += weight.numel()
        packed_bytes += tensors[name].nbytes
        grid_bytes += grid.nbytes
    shared = {id(named[name]) for name in grids}
    aliases = {n for n, x in model.named_parameters(remove_duplicate=False) if id(x) in shared}
    others = {n: x for n, x in model.state_dict().items() if n not in aliases}
    tensors |= {name: x.detach().cpu().contiguous().clone() for name, x in others.items()}
    save_file(tensors, path, {"format": _FORMAT, "packed": json.dumps(described)})
    other_bytes = sum(x.nbytes for x in others.values())
    return PackedReport(num, packed_bytes, grid_bytes, other_bytes)


@torch.no_grad()
def load_packed(path: Path | str, model: nn.Module) -> tuple[nn.Module, Grids]:
    """A copy of ``model`` with the weights of a file of `save_packed`, and their grids.

    Args:
        path: the file.
        model: a module of the architecture that was stored; its weights do not matter.

    Raises:
        Refused: the model cannot be copied.
        ValueError: the file is not of that kind, is damaged, or is of another architecture.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> model, report = ternarise(nn.Linear(8, 4))
        >>> with TemporaryDirectory() as folder:
        ...     sizes = save_packed(model, report.grids, f"{folder}/model.safetensors")
        ...     again, _ = load_packed(f"{folder}/model.safetensors", nn.Linear(8, 4))
        >>> sizes.packed_bytes, sizes.of_float32, torch.equal(again.weight, model.weight)
        (8, 0.0625, True)
    """
    tensors, described = _read(path)
    grids: dict[str, tuple[float, ...]] = {}
    out = copied(model)
    try:
        for name, about in described.items():
            grid, num = tensors.pop(name + _GRID), torch.Size(about["shape"]).numel()
            codes = unpack(tensors[name], num, about["base"]).long()
            tensors[name] = grid[codes].view(about["shape"])
            grids[name] = tuple(grid.tolist())
        missing, unknown = out.load_state_dict(tensors, strict=False)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"load_packed: {path} must fit the model and its own description; got: {error}. Build "
            "the architecture that was stored, or store the model again."
        ) from error
    tied = {id(x) for n, x in out.named_parameters(remove_duplicate=False) if n in grids}
    aliases = {n for n, x in out.named_parameters(remove_duplicate=False) if id(x) in tied}
    if unknown or set(missing) - aliases:
        raise ValueError(
            f"load_packed: {path} must hold the tensors of the model and no others; it lacks "
            f"{sorted(set(missing) - aliases)[:4]} and has {unknown[:4]} beside them. Build the "
            "architecture that was stored."
        )
    return out, grids


def _read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(about["packed"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"load_packed: {path} must be a file of save_packed, format {_FORMAT}; {error}. Plain "
            "safetensors files are read with safetensors.torch.load_file."
        ) from error


def _width(num: int) -> int:
    """Position in (1, 2, 4, 8) of the bits that ``num`` values take."""
    return next(k for k, bits in enumerate((1, 2, 4, 8)) if num <= 2**bits)


def _require_names(grids: Grids, named: Mapping[str, Tensor]) -> None:
    unknown = sorted(set(grids) - set(named))
    if unknown or not grids:
        raise ValueError(
            "save_packed: grids must name parameters of the model, at least one; got "
            f"{unknown[:4] or 'none'}, and the model has {list(named)[:6]}. Take them from the report."
        )
