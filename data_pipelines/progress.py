"""The progress of a job over clips: one line, rewritten in place on a terminal; and what it says in the end."""
import collections
import re
import sys
import time

LINE_S = 5.0  # between two lines when the output is no terminal
TERMINAL_LINE_S = 0.2
REASONS = 3  # kinds of rejection that the line names


def kind(reason: str) -> str:
    """The kind of a rejection: its reason without the numbers, by which it is counted."""
    return re.sub(r'[-+]?\d[\d.]*(e[-+]?\d+)?', '#', reason)


def span(seconds: float) -> str:
    """'45 s', '12 min' or '3 h 05 min'."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f'{seconds:.0f} s'
    return f'{minutes} min' if minutes < 100 else f'{minutes // 60} h {minutes % 60:02d} min'


class Progress:
    """Counts clips, hours of media and rejections."""

    def __init__(self, name: str, total: int, clip_s: float):
        """
        Args:
          name: of the job and its set.
          total: clips to go.
          clip_s: seconds of media in one.
        """
        self._name, self._total, self._clip_s = name, total, clip_s
        self.done = 0
        self.rejected: collections.Counter[str] = collections.Counter()  # by kind
        self._started = self._shown = time.monotonic()

    def count(self, clips: int, rejected: list[str]) -> None:
        """Counts clips that are done, and the reasons of those among them that were rejected."""
        self.done += clips
        self.rejected.update(map(kind, rejected))

    def add(self, clips: int, rejected: list[str]) -> None:
        """Counts, and shows the line now and then."""
        self.count(clips, rejected)
        terminal, now = sys.stdout.isatty(), time.monotonic()
        last = self.done == self._total
        if not last and now - self._shown < (TERMINAL_LINE_S if terminal else LINE_S):
            return
        self._shown = now
        line = self.line(now - self._started)
        print(f'\r{line}   ' if terminal else line, end='' if terminal and not last else '\n', flush=True)

    def line(self, took_s: float) -> str:
        """The line, `took_s` seconds after the start."""
        rate = self.done / max(took_s, 1e-9)
        left = span((self._total - self.done) / rate) if self.done else '?'
        hours = self.done * self._clip_s / 3600
        line = (f'{self._name}: {self.done} of {self._total} clips, {rate:.1f} clips/s, {hours:.2f} h of media, '
                f'{left} left')
        return f'{line}; {self.rejections()}' if self.rejected else line

    def rejections(self) -> str:
        """'12 rejected (7 the sound ends at # s, # s are needed, 5 no such file)'."""
        parts = [f'{count} {reason}' for reason, count in self.rejected.most_common(REASONS)]
        more = ', …' if len(self.rejected) > REASONS else ''
        return f'{self.rejected.total()} rejected ({", ".join(parts)}{more})'
