# SPDX-License-Identifier: Apache-2.0
"""The progress line."""

from __future__ import annotations

import sys


class Progress:
    """tqdm where it is installed, else one line on stderr; silent when stderr is not a terminal."""

    def __init__(self, cases: int):
        self.cases, self.done, self.name = cases, -1, ""
        self.bar = None
        self.shown = sys.stderr.isatty()
        if self.shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=cases, leave=False, bar_format="{l_bar}{bar}| {desc} {elapsed}<{remaining}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.close()
        else:
            self._line("")

    def start(self, name: str) -> None:
        self.done, self.name = self.done + 1, name
        self.update(0.0)

    def update(self, part: float) -> None:
        if self.bar:
            self.bar.n = round(self.done + part, 2)
            self.bar.set_description_str(self.name, refresh=True)
        else:
            self._line(f"{self.done + 1}/{self.cases} {self.name} {part:.0%}")

    def write(self, text: str) -> None:
        """A line of output that the progress line does not run into."""
        if self.bar:
            self.bar.clear()
        else:
            self._line("")
        print(text, flush=True)

    def _line(self, text: str) -> None:
        if self.shown:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
