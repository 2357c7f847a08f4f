"""Ctrl-C and SIGTERM at a moment of our choosing: after a step, not in its middle."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupted(BaseException):
    """A signal has ended the run; not an Exception, so that nothing takes it for a fault."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Interruptions:
    """A region in which the first Ctrl-C or SIGTERM is noted in `asked` while `hold` is set.

    Without `hold` it is raised as Interrupted; a second one does what it does elsewhere.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.hold = False
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():  # others may not
            for number in (signal.SIGINT, signal.SIGTERM):
                self._usual[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
        self._usual.clear()

    def release(self, number: int = 0) -> None:
        """Hold signals no longer; raise the one that came meanwhile, or `number`.

        Raises:
            Interrupted: there is one.
        """
        self.hold = False
        if self.asked or number:
            raise Interrupted(self.asked or number)

    def _note(self, number: int, frame: object) -> None:
        self.asked = number
        self.__exit__()
        if not self.hold:
            raise Interrupted(number)
