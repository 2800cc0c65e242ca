"""Rules for LSTM, GRU and plain recurrent layers: the intrinsic sparse structure of a hidden unit.

Unit k of a layer owns row k of every gate (rows k, H + k, ...) in ``weight_ih``, ``weight_hh`` and the
biases, and is read by column k of ``weight_hh`` and of whatever comes next. Both directions of a
bidirectional layer hold one tensor of states, so their units k are one.
Reference: W. Wen, Y. He, S. Rajbhandari, M. Zhang, W. Wang, F. Liu, B. Hu, Y. Chen, H. Li, "Learning
    Intrinsic Sparse Structures within Long Short-Term Memory", ICLR 2018, arXiv:1709.05027.
"""

from typing import Any

import numpy as np

from sterna.surgery.labels import Along, Labels, Traced
from sterna.surgery.rules import Site, unknown

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _layer(site: Site, x: Along, params: list[Traced], gates: int) -> Labels | None:
    """Ties the parameters of one layer and direction; gives its units, None where it is not known."""
    w_ih, w_hh, *biases = params
    hidden, units = w_hh.shape[1], w_hh.along[1]
    if w_hh.shape[0] != gates * hidden or len(biases) > 2:
        for w in params:
            for labels in w.along:
                site.pin(labels, "a recurrent layer with a projection (proj_size) is not shrunk")
        site.pin(x, "it feeds a recurrent layer with a projection (proj_size)")
        return None
    site.tie(x, site.book.read(w_ih.along[1]))
    site.book.read(units)
    for w in (w_ih, w_hh, *biases):
        rows = w.along[0]
        if units is not None and rows is not None:
            site.book.merge(rows.reshape(gates, hidden), units[None])
        else:
            site.tie(None, rows)
    return units


def _states(site: Site, state: Traced, units: list[Labels]) -> None:
    """Where the first states come from: zeros made by the layer, another layer, the code, the caller."""
    if state.made_in is not None and state.made_in == site.path:
        return
    given: list[Along] = list(state.stacked) if state.stacked else [state.along[-1]] * len(units)
    for some, labels in zip(units, given, strict=True):
        if labels is None:
            site.pin(some, "its first state is given by the caller, whose width is fixed")
        else:
            site.tie(some, labels)


def recurrent(
    site: Site,
    x: Traced,
    first: Any,
    params: list[Traced],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """A stack of layers; gives the outputs and the last states."""
    gates, directions = GATES[site.name], 2 if bidirectional else 1
    per = len(params) // (num_layers * directions)
    width, stacked = x.along[-1], []
    for layer in range(num_layers):
        found = []
        for k in range(directions):
            at = (layer * directions + k) * per
            found.append(_layer(site, width, params[at : at + per], gates))
        known = [units for units in found if units is not None]
        if len(known) < directions:
            return unknown(site, x)
        for units in known[1:]:
            site.tie(known[0], units)
        stacked += known
        width = np.concatenate(known)
    states = list(first) if isinstance(first, list | tuple) else [first]
    for state in states:
        _states(site, state, stacked)
    site.book.recurrent[site.path] = tuple(stacked)
    outs = [Traced(shape=site.shape, along=(*(None,) * (len(site.shape) - 1), width))]
    for shape in site.shapes[1:]:
        head = (None,) * (len(shape) - 1)
        if len(stacked) == 1:
            outs.append(Traced(shape=shape, along=(*head, stacked[0])))
        else:
            outs.append(Traced(shape=shape, along=(*head, None), stacked=tuple(stacked)))
    return outs


def cell(site: Site, x: Traced, first: Any, *params: Traced | None) -> Any:
    """One step of one layer: LSTMCell, GRUCell, RNNCell."""
    gates = GATES[site.name.removesuffix("_cell")]
    given = [w for w in params if w is not None]
    units = _layer(site, x.along[-1], given, gates)
    if units is None:
        return unknown(site, x)
    for state in list(first) if isinstance(first, list | tuple) else [first]:
        _states(site, state, [units])
    outs = [Traced(shape=s, along=(*(None,) * (len(s) - 1), units)) for s in site.shapes]
    return outs[0] if len(outs) == 1 else outs
