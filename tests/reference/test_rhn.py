"""The recurrent highway network against the literal transcription."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sterna.models import RHNLanguageModel
from sterna.randomness import isolated

_spec = importlib.util.spec_from_file_location("reference_rhn", Path(__file__).with_name("rhn.py"))
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_logits_equal_the_reference(depth, tied):
    with isolated(0, "model"):
        model = RHNLanguageModel(vocabulary=9, hidden=5, depth=depth, tied=tied, spread=0.7)
    model = model.double()
    words = torch.tensor([[1, 4, 4, 8], [0, 2, 7, 3]])
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    layers = [
        tuple(
            weights[f"{part}.{k}.{kind}"] for part in ("h", "gate") for kind in ("weight", "bias")
        )
        for k in range(depth)
    ]
    decoder = weights["embedding.weight" if tied else "decoder.weight"]
    for row, logits in zip(words.tolist(), model(words), strict=True):
        found = reference.states(
            row,
            weights["embedding.weight"],
            weights["into_h.weight"],
            weights["into_gate.weight"],
            layers,
        )
        expected = found @ decoder.T + weights["decoder.bias"]
        torch.testing.assert_close(logits, torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("field", "value"), [("vocabulary", 0), ("hidden", 0), ("depth", 0), ("spread", 0.0)]
)
def test_bad_arguments_are_named(field, value):
    with pytest.raises(ValueError, match=f"RHNLanguageModel: {field} must be"):
        RHNLanguageModel(**{field: value})
