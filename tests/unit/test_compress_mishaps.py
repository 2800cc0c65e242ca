"""``sterna compress`` where something is off: what is refused, what goes on, and what is said."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from sterna.cli.commands import dispatch
from sterna.cli.compress import compress_command, export_command
from sterna.cli.compress_flags import CompressFlags, value
from sterna.cli.flags import parse
from sterna.cli.usage import UsageError
from sterna.models import MLP
from sterna.randomness import isolated
from sterna.runs import compress as compress_module
from sterna.runs import compressors, written
from sterna.runs import subject as subject_module
from sterna.runs.candidate import Candidate
from sterna.runs.compress import Bench, compress
from sterna.runs.experiment import resolve
from sterna.runs.files import StoreError, write_json
from sterna.runs.request import Request, build
from sterna.runs.subject import of_module, of_run
from sterna.runs.written import exported_as_possible, read_back
from sterna.surgery.description import Description, save

QUICK = Bench(engines=("eager",), rounds=3, batch=2)
BUILD = "from sterna.models import MLP\n\n\ndef build():\n    return MLP((64, 16, 10))\n"


class FixedBatch(nn.Module):
    """A batch size that is a plain number where it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x.reshape(int(x.shape[0]), -1))


class OnValues(nn.Module):
    """A branch on a value, which has no ONNX file at all."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x) if x.sum() > 0 else self.out(-x)


@dataclass(frozen=True)
class Given:
    """Candidates that are ready."""

    ready: tuple[Candidate, ...]
    by_size: bool = False

    def candidates(
        self, model: nn.Module, training: object, say: object = None
    ) -> Iterator[Candidate]:
        yield from self.ready


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """torch's random state stays; the dense model's ONNX file, which takes seconds, is left out."""

    def none(*arguments: object) -> None:
        raise written.ExportError("left out.")

    monkeypatch.setattr(compress_module, "onnx_bytes", none)
    with isolated(0, "mishaps"):
        yield


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(BUILD)
    with isolated(0, "mishaps"):
        save_file(MLP((64, 16, 10)).state_dict(), folder / "w.safetensors")
    return of_module(f"{folder / 'mine.py'}:build", folder / "w.safetensors", "digits")


def halved(label: str = "half", width: int = 8) -> Candidate:
    """Half of the hidden units, written as a shrunk model."""
    with isolated(0, "halved"):
        small = MLP((64, width, 10)).eval()
    changed = ("layers.1.weight", "layers.1.bias", "layers.3.weight")
    shapes = {n: tuple(p.shape) for n, p in small.named_parameters() if n in changed}
    attributes = {"layers.1": {"out_features": width}, "layers.3": {"in_features": width}}
    description = Description(shapes=shapes, attributes=attributes)
    return Candidate(
        label=label,
        model=small,
        accuracy=1.0,
        write=lambda path: save(small, description, path),
        bits=32,
        changed=True,
    )


def test_what_is_compressed_is_not_compressed_again(subject, tmp_path):
    first = tmp_path / "first"
    outcome = compress(subject, Given((halved(),)), first, keep_accuracy=99.0, bench=QUICK)
    assert outcome.met and not subject.compressed
    again = of_run(first)
    assert again.compressed
    with pytest.raises(StoreError, match=r"compressed already.*Compress the original again, or"):
        compress(again, Given((halved(),)), tmp_path / "second", keep_accuracy=99.0, bench=QUICK)
    assert not (tmp_path / "second").exists()


def test_a_file_with_other_weights_is_found_out(subject, tmp_path):
    good = halved()
    with isolated(1, "other"):
        other = MLP((64, 8, 10)).eval()
    wrong = replace(good, model=other)
    with pytest.raises(StoreError, match=r"model\.safetensors, read back, gives other outputs"):
        compress(subject, Given((wrong,)), tmp_path / "x", keep_accuracy=99.0, bench=QUICK)
    assert not (tmp_path / "x" / "compress.json").exists()
    folder = tmp_path / "y"
    folder.mkdir()
    write_json(folder / "original.json", subject.original)
    good.write(folder / "model.safetensors")
    read_back(folder, good.model, subject.example)
    with pytest.raises(StoreError, match="gives other outputs"):
        read_back(folder, nn.Sequential(good.model, nn.Linear(10, 3)), subject.example)


def test_a_fixed_batch_is_exported_with_a_caution(tmp_path):
    example = torch.ones(2, 64)
    found, caution = exported_as_possible(FixedBatch(), example, tmp_path / "m.onnx")
    assert found is not None and not found.dynamic_batch and (tmp_path / "m.onnx").exists()
    assert caution.startswith("model.onnx takes batches of 2 only: ")
    found, caution = exported_as_possible(OnValues(), example, tmp_path / "n.onnx")
    assert found is None and not (tmp_path / "n.onnx").exists()
    assert caution.endswith("There is no model.onnx of the compressed model.")


def test_without_onnx_all_else_is_written(subject, tmp_path, monkeypatch):
    def fails(*arguments: object, **named: object) -> None:
        raise written.ExportError("no operator for that.")

    monkeypatch.setattr(written, "to_onnx", fails)
    monkeypatch.setattr(compress_module, "onnx_bytes", lambda *arguments: b"dense")
    folder = tmp_path / "x"
    outcome = compress(subject, Given((halved(),)), folder, keep_accuracy=99.0, bench=QUICK)
    names = {p.name for p in folder.iterdir()}
    assert {"compress.json", "report.html", "model.safetensors"} <= names
    assert "model.onnx" not in names and "onnx_bytes" not in outcome.summary
    assert outcome.cautions[-1].startswith("no operator for that. There is no model.onnx")
    assert "no operator for that" in (folder / "report.html").read_text()


def test_equal_labels_keep_their_own_timings(subject, tmp_path):
    three = (halved("half"), halved("half", width=4), halved("dense", width=2))
    compress(subject, Given(three), tmp_path / "x", keep_accuracy=99.0, bench=QUICK)
    tried = json.loads((tmp_path / "x" / "candidates.json").read_text())["candidates"]
    assert [t["label"] for t in tried] == ["half", "half (2)", "dense (2)"]
    assert len({t["seconds"] for t in tried}) == 3 and None not in [t["seconds"] for t in tried]
    assert json.loads((tmp_path / "x" / "compress.json").read_text())["candidate"] in {
        t["label"] for t in tried
    }


def test_labels_get_the_digits_that_tell_them_apart(subject):
    way = compressors.Magnitude(shares=(0.504, 0.5, 0.25, 0.5), finetune_epochs=0, round_to=1)
    found = [c.label for c in way.candidates(subject.model, subject.training)]
    assert found == ["50.4% of units", "50.0% of units", "25.0% of units"]
    assert compressors._labels([0.1, 0.2], lambda x, more: f"{x:.{2 + more}g}") == ["0.1", "0.2"]


def test_phases_clip_as_the_run_did(monkeypatch):
    request = Request(
        experiment="digits.sync", arguments={}, folder=Path("none"), seed=0, quiet=True
    )
    run = replace(build(request), clip_norm=0.25)
    assert subject_module._fresh_of_run(request, {}).training.clip_norm is None
    monkeypatch.setattr(subject_module, "build", lambda request: run)
    assert subject_module._fresh_of_run(request, {}).training.clip_norm == 0.25


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lr", "0.01"], "--lr is for your_module.py:build; a run folder has its own"),
        (["--batch-size", "64"], "--batch-size is for your_module.py:build"),
        (["--method", "magnitude", "--epochs", "5"], "--epochs is for --method ssl and force and"),
        (["--method", "ternary", "--epochs", "5"], "--epochs is for"),
        (["--method", "ternary", "--finetune-epochs", "5"], "--finetune-epochs is for"),
        (["--method", "ternary", "--rate", "1"], "--rate is for"),
        (["--method", "ternary", "--multiple-of", "8"], "--multiple-of is for"),
        (["--method", "ternary", "--lr", "0.01"], "--lr is for --method"),
        (["--depth", "0", "--method", "force"], "--depth is for --method ssl"),
        (["--form", "channel"], "--form is for --method force and low-rank"),
        (["--passes", "10"], "--passes is for --method ternary"),
        (["--engines"], "--engines must be at least one of"),
    ],
)
def test_flags_that_are_not_read_are_refused(arguments, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        compress_command([str(tmp_path), *arguments])


def test_a_module_without_its_function_is_asked_for_it():
    with pytest.raises(UsageError, match=r"my\.py needs the function .*: my\.py:build, say"):
        compress_command(["my.py", "--weights", "w.safetensors", "--data", "digits"])


def spoilt(case: str, path: Path) -> None:
    """A weights file that is broken, or of another model."""
    model = MLP((64, 24, 10)) if case == "shape" else MLP((64, 16, 10))
    state = {
        k.replace("layers", "other") if case == "names" else k: v
        for k, v in model.state_dict().items()
    }
    header = {"shrunk": '{"version": 1}', "garbage": "{"}.get(case)
    save_file(state, path, {"sterna.shrunk": header} if header else None)
    if case in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 900 if case == "cut" else 0])


@pytest.mark.parametrize("command", ["export", "compress"])
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("cut", "is not a safetensors file, or not a whole one: incomplete metadata"),
        ("empty", "is not a safetensors file, or not a whole one: header too small. Save this"),
        (
            "shape",
            "does not fit the model of MODEL: the shape of layers.1.weight is (24, 64), in the model "
            "(16, 64). Save this model's weights again.",
        ),
        (
            "names",
            "it lacks layers.1.weight, layers.1.bias and 2 more, and it has other.1.bias, "
            "other.1.weight and 2 more, which the model has not.",
        ),
        ("shrunk", "must be one of save; reading it gave KeyError('shapes'). Save the model"),
        ("garbage", "must be one of save; reading it gave JSONDecodeError("),
    ],
)
def test_wrong_weights_are_wrong_usage(command, case, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    (tmp_path / "mine.py").write_text(BUILD)
    model = f"{tmp_path / 'mine.py'}:build"
    spoilt(case, tmp_path / "w.safetensors")
    arguments = [model, "--weights", str(tmp_path / "w.safetensors"), "--data", "digits"]
    arguments += [str(tmp_path / "m.onnx")] if command == "export" else ["--quiet"]
    assert dispatch([command, *arguments]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert said.replace("MODEL", model) in err and "Traceback" not in err


LAYERS = {
    "plain": "nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)",
    "softmax": "nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10), nn.Softmax(1)",
}


def built(kind: str, folder: Path) -> list[str]:
    """How the command line is told of a model."""
    layers: dict[str, object] = {"nn": nn}
    code = f"def build():\n    return nn.Sequential({LAYERS[kind]})\n"
    exec(code, layers)  # noqa: S102
    (folder / f"{kind}.py").write_text(f"from torch import nn\n\n\n{code}")
    save_file(layers["build"]().state_dict(), folder / f"{kind}.safetensors")
    weights = ["--weights", str(folder / f"{kind}.safetensors"), "--data", "digits", "--quiet"]
    return [f"{folder / kind}.py:build", *weights, "--out", str(folder / "out")]


@pytest.mark.parametrize(
    ("kind", "method", "said"),
    [
        (
            "softmax",
            ["ternary"],
            "error: --method ternary: the model must end in an nn.Linear that",
        ),
        (
            "plain",
            ["ssl", "--depth", "1"],
            "error: --depth must be 0 for Sequential: it has no res",
        ),
        (
            "plain",
            ["magnitude", "--validation", "0.999"],
            "error: --validation must be a share in",
        ),
        (
            "plain",
            ["low-rank", "--shares", "0.01", "--epochs", "1", "--validation", "0.9"],
            "error: --shares 0.01 cannot be met: with every rank at its smallest",
        ),
    ],
)
def test_a_method_that_does_not_fit_says_what_to_type(
    kind, method, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    arguments = built(kind, tmp_path)
    assert dispatch(["compress", *arguments, "--method", *method]) == 2
    err = capsys.readouterr().err
    assert said in err and "sets=" not in err and "Traceback" not in err


def test_errors_that_are_about_no_flag_stay_as_they_are(subject, monkeypatch):
    def refuses(*arguments: object, **named: object) -> None:
        compressors.Ssl(epochs=0)

    monkeypatch.setattr(compress_module, "compress", refuses)
    monkeypatch.setattr("sterna.cli.compress._subject", lambda *arguments: subject)
    with pytest.raises(ValueError, match=r"^Ssl: epochs must be at least 1") as raised:
        compress_command(["folder", "--quiet"])
    assert not isinstance(raised.value, UsageError)


TIED = """
import torch
from torch import nn
from sterna.data import digits


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.out = nn.Linear(64, 10)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(torch.relu(self.b(torch.relu(self.a(x)))))


def build():
    return Tied()
"""


def test_tied_weights_are_read_as_safetensors_stores_them(tmp_path):
    (tmp_path / "mine.py").write_text(TIED, encoding="utf-8")
    spec = f"{tmp_path}/mine.py:build"
    with isolated(1, "tied"):
        model = resolve(spec)()
    save_model(model, str(tmp_path / "w.safetensors"))
    assert len(load_file(tmp_path / "w.safetensors")) == len(model.state_dict()) - 1
    found = of_module(spec, tmp_path / "w.safetensors", "digits").model
    assert found.a.weight is found.b.weight
    x = torch.ones(2, 64)
    torch.testing.assert_close(found(x), model(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize(
    ("build", "said"),
    [
        ("Pair()", "must return one tensor of logits; got a tuple"),
        ("nn.Linear(64, 7)", "targets must be less than the number of logits, 7; got 9"),
        ("nn.Linear(64, 10).double()", "float32"),
        ("nn.Sequential(nn.Linear(64, 8), nn.Unflatten(1, (4, 2)))", "logits must have shape"),
        ("torch.jit.script(nn.Linear(64, 10))", "quantised or scripted"),
    ],
)
def test_models_that_do_not_fit_their_data_are_refused_in_a_sentence(build, said, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Pair(nn.Linear):\n    def __init__(self):\n"
        "        super().__init__(64, 10)\n\n    def forward(self, x):\n"
        f"        return super().forward(x), x\n\n\ndef build():\n    return {build}\n",
        encoding="utf-8",
    )
    spec = f"{tmp_path}/mine.py:build"
    with isolated(1, "model"):
        save_file(resolve(spec)().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(StoreError, match=said):
        of_module(spec, tmp_path / "w.safetensors", "digits")


def test_a_damaged_run_folder_is_no_wrong_usage(subject, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    write_json(tmp_path / "original.json", subject.original)
    spoilt("cut", tmp_path / "model.safetensors")
    assert dispatch(["export", str(tmp_path), str(tmp_path / "m.onnx")]) == 1
    assert "or not a whole one" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--batch", "64"], ["--threads", "1"], ["--engines", "eager"]])
def test_export_refuses_flags_of_timing_without_time(flag, tmp_path):
    with pytest.raises(UsageError, match=f"{flag[0]} needs --time"):
        export_command([str(tmp_path), "m.onnx", *flag])


def test_usual_values_stand_for_flags_that_are_not_given():
    flags, _ = parse(CompressFlags, [], ["folder", "--epochs", "3"], "sterna compress")
    assert (value(flags, "epochs"), value(flags, "finetune_epochs")) == (3, 5)
    assert value(flags, "engines") == ("onnxruntime", "eager") and value(flags, "lr") == 0.01
