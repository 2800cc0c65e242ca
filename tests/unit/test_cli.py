"""What a newcomer reads: help, lists, the first line, exit codes, and what was probably meant."""

import subprocess
import sys
import warnings
from functools import partial
from typing import Literal

import pytest
import torch
from torch import nn

from sterna.cli import begins, listing
from sterna.cli.begins import announcement
from sterna.cli.commands import dispatch
from sterna.cli.compress_flags import CompressFlags
from sterna.cli.flags import CompareFlags, RunFlags, parse
from sterna.cli.ranges import built
from sterna.cli.usage import UsageError, meant
from sterna.data import digits
from sterna.ledger import Spent
from sterna.randomness import isolated
from sterna.runs.compare import FIGURES, compare
from sterna.runs.experiment import all_experiments
from sterna.runs.noted import noted
from sterna.runs.request import Request
from sterna.runs.run import Run
from sterna.runs.sections import ledger_table, workers_table
from sterna.runs.table import run_figures
from sterna.samplers import Shuffle
from sterna.surgery import Refused, couple

SUMMARY = dict.fromkeys(FIGURES, 1.0) | {
    "experiment": "digits.sync",
    "seed": 0,
    "accuracy": 0.5,
    "staleness_mean": 0.0,
    "staleness_max": 0,
    "refused": None,
}


def started(code: str, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """``sterna`` with these arguments, in which ``code`` runs instead of the fork server."""
    program = (
        f"import os, signal, sys, sterna.cli\n{before}"
        f"sys.argv = ['sterna', *{arguments!r}]\n"
        f"def warm_up():\n    {code}\n"
        "sterna.cli.warm_up = warm_up\n"
        "sterna.cli.main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


# The first line.


def test_a_run_begins_with_a_line_before_torch_is_loaded():
    stop = "sys.exit(99 if 'torch' in sys.modules else 7)"
    ended = started(stop, "run", "digits.sync", "--workers", "2")
    assert (ended.returncode, ended.stdout) == (7, "")
    assert ended.stderr == "Starting digits.sync: data digits, 2 workers\n"
    assert started(stop, "run", "digits.sync", "--quiet").stderr == ""


def test_an_interrupt_before_the_run_begins():
    """Torch's imports do not bear one: a handler ends the process; the fork server ignores it."""
    ignored = "signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    code = f"{ignored} or sys.exit(9); {kill}; sys.modules['sterna.cli.commands'] = Late()"
    late = f"class Late:\n    def __getattr__(self, name):\n        {kill}; sys.exit(8)\n"
    ended = started(code, "run", "digits.sync", "--quiet", before=late)
    assert (ended.returncode, ended.stderr) == (130, "Interrupted.\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("run ptb.sync", "Starting ptb.sync: data ptb, 1 worker"),
        ("run digits.sync --workers=3 --lr 1", "Starting digits.sync: data digits, 3 workers"),
        (
            "compare digits.sync mnist.sync",
            "Starting digits.sync, mnist.sync: data digits, mnist, 4 workers, 3 seeds",
        ),
        ("compare digits.sync digits.snyc", ""),
        ("run digits.sync --help", ""),
        ("run digits._run", ""),
        ("run nothing.py:train", ""),
        ("run --resume nowhere", ""),
        ("run digits.sync --workers x", ""),
        ("report digits.sync", ""),
        ("run", ""),
    ],
)
def test_announcement(arguments, text, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert announcement(arguments.split()) == text


def test_announcement_of_a_users_file_and_of_torchrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "0")
    assert announcement(["run", "mine.py:train"]) == "Starting mine.py:train: 8 workers"
    assert announcement(["run", "--resume", "."]) == "Going on with ."
    monkeypatch.setenv("RANK", "1")
    assert announcement(["run", "mine.py:train"]) == ""


def test_the_line_knows_the_defaults():
    assert {"run": RunFlags().workers, "compare": CompareFlags().workers} == begins.WORKERS
    assert CompareFlags().seeds == begins.SEEDS


# Help.


def help_of(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        dispatch([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


COMMANDS = [
    "run",
    "run --resume",
    "run --replay",
    "compare",
    "report",
    "list",
    "compress",
    "export",
]


@pytest.mark.parametrize("command", [*COMMANDS, "run digits.slim_dp", "run ptb.terngrad"])
def test_help_is_for_users(command, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    text = help_of(command.split(), capsys)
    for leak in ("None", "``", "True", "False", "(default: )", "_to", "Flags of"):
        assert leak not in text
    assert text.startswith(f"usage: sterna {command}")


def test_help_says_how_it_ends(capsys):
    ended = started("pass", "--help")
    assert ended.returncode == 0
    for status in ("0 done", "1 the work failed", "2 wrong usage", "130 interrupted"):
        assert status in ended.stdout
    assert "resume" not in help_of(["run", "digits.sync"], capsys)


@pytest.mark.parametrize("word", ["none", "None"])
def test_none_is_typed_as_the_help_says(word):
    experiment = all_experiments()["digits.terngrad"]
    for words in (["--clip", word], [f"--clip={word}"]):
        _, (values,) = parse(RunFlags, [experiment], words, "sterna run")
        assert values["clip"] is None
    assert parse(RunFlags, [], ["--bandwidth", "none"], "sterna run")[0].bandwidth == "none"


def mine(
    *,
    lr_max_scale: float = 1.0,
    level: Literal[1, 2] = 1,
    parts: tuple[Literal["in", "out"], ...] = (),
    label: str | None = "a",
) -> Run:
    """An experiment with flags of every kind."""
    raise NotImplementedError


def test_none_is_none_where_text_is_taken_too():
    assert parse(RunFlags, [mine], ["--label", "none"], "sterna run")[1][0]["label"] is None


@pytest.mark.parametrize("flag", ["--lr-max-scale", "--lr_max_scale", "--lr_max-scale"])
@pytest.mark.parametrize("words", ["{} 9", "{}=9"])
def test_a_flag_is_typed_with_either_stroke(flag, words):
    arguments = words.format(flag).split()
    found = parse(CompareFlags, [mine, mine], arguments, "sterna compare")[1]
    assert found == [{"lr_max_scale": 9.0}] * 2


@pytest.mark.parametrize("name", ["resume", "replay", "workers"])
def test_an_experiment_has_no_flag_of_the_command(name):
    taken: dict[str, object] = {}
    exec(f"def taken(*, {name}: int = 1): ...", taken)  # noqa: S102
    with pytest.raises(TypeError, match=f"the parameter '{name}' is a flag of the command itself"):
        parse(RunFlags, [taken["taken"]], [], "sterna run")


# Wrong values.


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--level 3", "--level must be one of 1, 2; got 3."),
        ("--level -4", "--level must be one of 1, 2; got -4."),
        ("--parts in up", "--parts must be one of in, out; got up."),
        ("--parts=up", "--parts must be one of in, out; got up."),
        ("--workers x", "--workers must be a whole number; got x."),
        ("--max_restarts=1.5", "--max-restarts must be a whole number; got 1.5."),
        ("--lr_max-scale x", "--lr-max-scale must be a number; got x."),
        ("--lr-max-scale y --workers x", "--lr-max-scale must be a number; got y."),
    ],
)
def test_wrong_values_have_one_face(words, complaint, capsys):
    with pytest.raises(UsageError) as raised:
        parse(RunFlags, [mine], words.split(), "sterna run")
    assert str(raised.value) == complaint and capsys.readouterr() == ("", "")


def test_a_number_may_be_none():
    experiment = all_experiments()["digits.terngrad"]
    with pytest.raises(UsageError, match=r"--clip must be a number or none; got off\."):
        parse(RunFlags, [experiment], ["--clip", "off"], "sterna run")


def test_what_the_parser_takes_is_not_refused():
    words = ["--engines", "eager", "folder"]  # the last word is the folder
    flags, _ = parse(CompressFlags, [], words, "sterna compress")
    assert (flags.engines, flags.model) == (("eager",), "folder")
    assert parse(RunFlags, [mine], ["--lr-max-scale", "-1e-3"], "t")[1][0]["lr_max_scale"] == -1e-3


def test_a_missing_value_is_still_said(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(RunFlags, [mine], ["--workers"], "sterna run")
    assert ended.value.code == 2 and "Missing value" in capsys.readouterr().err


class Odd(torch.optim.SGD):
    """SGD whose groups hold what the given one makes of them."""

    def __init__(self, parameters, momentum):
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["momentum"] = momentum


def request_of(monkeypatch, fixed, /, **arguments):
    def experiment(*, scale: float = 1.0, momentum: float = 0.0) -> Run:
        return Run(
            data=digits.load(),
            model=lambda: nn.Linear(64, 10),
            optimizer=partial(Odd, momentum=fixed),
        )

    monkeypatch.setattr("sterna.runs.request.resolve", lambda name: experiment)
    monkeypatch.setattr("sterna.cli.ranges.resolve", lambda name: experiment)
    return Request(experiment="mine", arguments=arguments, folder=None)


def test_an_optimizer_may_hold_what_is_no_number(monkeypatch):
    assert built(request_of(monkeypatch, (0.9, 0.99))).optimizer.keywords["momentum"][0] == 0.9


def test_no_flag_is_blamed_for_a_value_of_the_code(monkeypatch):
    with pytest.raises(ValueError, match="mine: momentum of the optimizer must be"):
        built(request_of(monkeypatch, 2.0, scale=2.0))
    with pytest.raises(UsageError, match="--momentum must be"):
        built(request_of(monkeypatch, 2.0, momentum=2.0))


def test_no_flag_is_blamed_for_an_error_of_the_code(monkeypatch):
    request = request_of(monkeypatch, 0.0, scale=-1)
    monkeypatch.setattr("sterna.cli.ranges.build", lambda _: Shuffle(8, batch_size=-1))
    with pytest.raises(ValueError, match=r"batch_size must be .* got -1") as raised:
        built(request)
    assert not isinstance(raised.value, UsageError)


# What was meant.


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--epoch", "3"], r"has no flag --epoch\. Did you mean --epochs\?"),
        (["--shar-scalers"], r"Did you mean --share-scalers\?"),
        (["--engine", "vitual"], r"--engine must be one of .* got vitual\. Did you mean virtual\?"),
        (["--engine=vitual"], r"Did you mean virtual\?"),
        (["extra"], r"has no argument extra\. All"),
    ],
)
def test_what_was_meant(words, complaint):
    experiment = all_experiments()["digits.terngrad"]
    with pytest.raises(UsageError, match=complaint):
        parse(RunFlags, [experiment], words, "sterna run digits.terngrad")


def test_nothing_near():
    assert meant("frobnicate", ["run", "compare"]) == ""


# Lists.


def test_methods_are_a_line_each():
    found = listing.methods()
    assert len(found) > 20 and set(listing.PHRASES) <= set(found)
    lines = list(listing.lines())
    assert all(len(line) <= 80 and "…" not in line for line in lines)
    for name, phrase in found.items():
        assert sum(line.split()[:1] == [name.partition(".")[2]] for line in lines) == 1
        assert sum(line.endswith(phrase) for line in lines) == 1


def test_list_is_not_wrapped(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    assert dispatch(["list", "methods"]) == 0
    assert capsys.readouterr().out.splitlines() == list(listing.lines())


# Figures that nobody measured.


def labels(summary):
    return [label for label, _ in run_figures(summary) if "staleness" in label]


def test_staleness_is_left_out_without_a_server():
    assert labels(SUMMARY) == []
    assert labels(SUMMARY | {"refused": 0}) == ["staleness, mean", "staleness, largest"]
    assert labels(SUMMARY | {"staleness_mean": 0.5}) == ["staleness, mean"]


def test_the_page_leaves_staleness_out_too():
    sync, stale = SUMMARY, SUMMARY | {"experiment": "digits.asgd", "staleness_mean": 2.0}
    places = {"digits.sync": 0, "digits.asgd": 1}
    assert "staleness" not in ledger_table(compare([sync], "digits.sync"), places)
    page = ledger_table(compare([sync, stale], "digits.sync"), places)
    assert "staleness, mean" in page and "staleness, largest" not in page


@pytest.mark.parametrize("largest", [0, 3])
def test_workers_have_staleness_only_with_a_server(largest):
    class Run:
        experiment, seed = "digits.sync", 0
        workers = ({"worker": 0, "staleness_sum": 0, "staleness_max": largest, "steps": 7},)

    table = workers_table([Run()])
    assert ("staleness" in table) == (largest > 0)
    assert "<td>7</td>" in table and table.count('<th scope="col">') == 10 + 2 * (largest > 0)


def test_a_ledger_is_written_without_what_was_not_measured():
    assert str(Spent(steps=3, bits_sent=64, wait_s=0.5)) == "steps=3, bits_sent=64, wait_s=0.5"


# Library.


class Branch(nn.Module):
    """Branches on values."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x * 2 if x.sum() > 0 else x)


def test_a_module_that_cannot_be_traced_is_one_sentence(capfd):
    with isolated(0, "model"):
        model = Branch()
    with pytest.raises(Refused, match=r"^Branch cannot be traced on the example: \S.*\S\. The "):
        couple(model, torch.ones(1, 4))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_notes_name_flags():
    with noted() as notes:
        warnings.warn("Raise strength (0.1) or epochs (5), or lower round_to.", stacklevel=1)
    assert notes == ["Raise --strength (0.1) or --epochs (5), or lower --multiple-of."]
