"""What a run shows: one bar over all, what each worker does, and when it will end."""

from __future__ import annotations

import shutil
import sys
from typing import TextIO

_BAR = 30
# Seconds between two lines where the output is no terminal.
_QUIET = 15.0
# Workers that are shown by name.
_SHOWN = 16


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "?"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {left:02d} s" if minutes else f"{left} s"


class Progress:
    """Shows the state of a run.

    Args:
        stream: a terminal, on which a block of lines is drawn again and again; or a file, to which lines are added.
    """

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._drawn = 0
        self._latest: tuple[float, str] = (float("-inf"), "")

    @property
    def pause(self) -> float:
        """Seconds between two calls of `show` that are worth it."""
        return 1.0 if self._terminal else _QUIET

    def say(self, line: str) -> None:
        """A line that stays."""
        self._clear()
        print(line, file=self._stream, flush=True)

    def show(
        self,
        now: float,
        counts: list[tuple[str, int, int]],
        concepts: tuple[int, int],
        left: float | None,
        workers: dict[str, tuple[str, float]],
    ) -> None:
        """Show how far the run is.

        Args:
            now: seconds.
            counts: of each unit how many are made and how many there will be; 0 as long as that is not known.
            concepts: how many are finished, and how many there are.
            left: seconds to go, or None.
            workers: what each does, and how much of it is done.
        """
        totals = [total for _, _, total in counts]
        # A share of what is known so far would fall as soon as more is.
        share = sum(made for _, made, _ in counts) / sum(totals) if totals and all(totals) else 0.0
        percent = f"{share:4.0%}" if all(totals) else "   ?"
        units = ", ".join(f"{made} of {total or '?'} {unit}" for unit, made, total in counts)
        chain = f", {concepts[0]} of {concepts[1]} concepts" if concepts[1] > 1 else ""
        head = f"{units}{chain}; {duration(left)} left"
        if not self._terminal:
            if any(totals) and now - self._latest[0] >= _QUIET and head != self._latest[1]:
                self._latest = (now, head)
                print(f"{percent}  {head}", file=self._stream, flush=True)
            return
        self._clear()
        width = shutil.get_terminal_size().columns - 1
        lines = [f"[{'#' * int(share * _BAR):.<{_BAR}}] {percent}  {head}"]
        for name, (doing, done) in list(workers.items())[:_SHOWN]:
            lines.append(f"  {name}: {doing}" + (f", {done:.0%}" if done else ""))
        if len(workers) > _SHOWN:
            lines.append(f"  and {len(workers) - _SHOWN} more workers")
        self._stream.write("".join(f"{line[:width]}\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)

    def _clear(self) -> None:
        if self._drawn:
            self._stream.write(f"\033[{self._drawn}A\033[J")
            self._drawn = 0
