"""Live progress of a run on the terminal; plain lines where there is no terminal."""

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from sterna.data.merit import Merit

_INTERVAL_S = 0.1


class Progress:
    """Shows step, loss, accuracy or what else a run is judged by, bytes so far and time left.

    Args:
        title: name of the run.
        steps: how many there will be.
        bits_sent: gives the bits sent so far.
        merit: by what the run is judged.
        quiet: show nothing.
    """

    def __init__(
        self,
        title: str,
        steps: int,
        bits_sent: Callable[[], int],
        merit: Merit,
        quiet: bool = False,
    ) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.title, self.steps, self.bits_sent, self.merit = title, steps, bits_sent, merit
        self.reached = ""
        self.last = 0.0
        live = self.console.is_terminal and not self.console.quiet
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not live,
        )
        self.task = self.bar.add_task(title, total=steps, figures="")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def show(self, step: int, loss: float | None = None) -> None:
        """Note that ``step`` is done; redraws a few times a second."""
        if self.bar.disable or (time.monotonic() - self.last < _INTERVAL_S and step < self.steps):
            return
        self.last = time.monotonic()
        figures = [f"loss {loss:.3f}"] if loss is not None else []
        if self.reached:
            figures.append(self.reached)
        sent = self.bits_sent()
        if sent:
            figures.append(f"{readable_bytes(sent / 8)} sent")
        self.bar.update(self.task, completed=step, figures="  ".join(figures))

    def tell(self, text: str) -> None:
        """One line, above the display where there is one."""
        self.console.print(f"{self.title}  {text}", highlight=False, markup=False, soft_wrap=True)

    def evaluated(self, epoch: int, loss: float, score: float, bits_sent: int) -> None:
        """Note an evaluation; without a terminal, one line."""
        self.reached = f"{self.merit.name} {self.merit.text(score).replace(' ', '')}"
        if self.bar.disable:
            self.console.print(
                f"{self.title}  epoch {epoch}  test loss {loss:.4f}  {self.reached}  "
                f"sent {readable_bytes(bits_sent / 8)}",
                highlight=False,
            )


def readable_bytes(count: float) -> str:
    """A byte count with a decimal unit.

    Example:
        >>> readable_bytes(12_345_678)
        '12.3 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
