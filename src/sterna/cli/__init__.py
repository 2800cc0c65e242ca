"""The command line: ``sterna run``, ``compare``, ``report``, ``compress``, ``export``, ``list``."""

import os
import signal
import sys

from sterna.cli.begins import announcement
from sterna.comm.launch import warm_up

_HELP = """\
Sterna trains deep networks with less, and proves every saving in one ledger.

  sterna run EXPERIMENT [--workers 4 --seed 0 --epochs 5 --out runs/x ...]
  sterna run --resume RUN                 go on from the last checkpoint
  sterna run --replay RUN                 do an asynchronous run again, to the same bits
  sterna compare EXPERIMENT EXPERIMENT ... [--workers 4 --seeds 3 --out runs/y ...]
  sterna report RUN... [--out report.html]
  sterna compress RUN --method ssl --keep-accuracy 0.5     a smaller, faster model, and the proof
  sterna export RUN model.onnx
  sterna list [experiments|methods]

An EXPERIMENT is <data>.<method>, as `sterna list` shows, or your own: path/to/file.py:function.
Each command and each experiment has its flags: `sterna run digits.terngrad --help`.

Exit status: 0 done; 1 the work failed, or a target was not met; 2 wrong usage: an unknown flag or
experiment, a value out of range, a folder that is not there, a file that is not what its flag names, a
method that does not fit the model; 130 interrupted with Ctrl-C; 143 terminated.
"""


def main() -> None:
    """Entry point of the ``sterna`` command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_HELP)
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        from sterna import __version__

        sys.stdout.write(f"sterna {__version__}\n")
        raise SystemExit(0)
    raise SystemExit(_carried_out(arguments))


def _carried_out(arguments: list[str]) -> int:
    begins = announcement(arguments)
    if begins:
        sys.stderr.write(f"{begins}\n")
        sys.stderr.flush()
    usual = signal.getsignal(signal.SIGINT)
    if arguments[0] in ("run", "compare") and not {"-h", "--help"} & set(arguments):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the fork server and the workers inherit it
        warm_up()  # the fork server imports torch while this process does
    if usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)  # imports do not bear being interrupted
    from sterna.cli.commands import dispatch

    signal.signal(signal.SIGINT, usual)
    return dispatch(arguments)


def _leave(signum: int, frame: object) -> None:
    """End at once: nothing has begun that would have to be ended."""
    sys.stderr.write("Interrupted.\n")
    sys.stderr.flush()
    os._exit(130)
