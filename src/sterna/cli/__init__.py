"""The command line: ``sterna run``, ``compare``, ``report``, ``compress``, ``export``, ``list``."""

import sys

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
    starts_workers = arguments[0] in ("run", "compare") and not {"-h", "--help"} & set(arguments)
    if starts_workers:
        warm_up()  # the fork server imports torch while this process does
    from sterna.cli.commands import dispatch

    raise SystemExit(dispatch(arguments))
