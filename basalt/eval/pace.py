"""How many requests to have under way at once: as many as make the server faster, fewer where it pushes back.

Additive increase, multiplicative decrease (Chiu & Jain 1989), and a search for the throughput's knee. Requests are
counted in rounds. While a larger number brings more answers a second it doubles; then, now and then, a few more and a
few less are tried in turn, and the smallest number is kept that brings as many answers. A server that refuses, fails
or falls silent gets fewer, and nothing at all for as long as it asks to wait.
"""

import asyncio
import time

START = 4
ROUND, LONG_ROUND = 2, 6  # times the requests under way: the answers by which a rate is measured, at first and later
WORTH = 0.15  # the part of the growth in number that the rate must grow by
NOISE = 0.03  # of a rate
LESS = 0.7
LONGEST_REST = 16  # rounds between tries of another number


class Pace:
    """`await enter()` before each request, `leave()` after it; between them one of `answered()`, `push_back()`.

    Attributes:
        limit: how many requests may be under way now.
        knee: the number found best so far.
    """

    def __init__(self, maximum: int, start: int = START) -> None:
        self.maximum = maximum
        self.limit = self.knee = min(start, maximum)
        self.under_way = 0
        self._changed = asyncio.Condition()
        self._paused_until = self._cut_at = 0.0
        self._rate = 0.0  # answers a second at the knee
        self._doubling, self._again, self._fewer = True, False, False
        self._rest, self._rested = 1, 0  # rounds to measure at the knee before more is tried
        self._answers, self._round_began = 0, 0.0

    async def enter(self) -> float:
        """Waits for its turn; returns when it came."""
        while True:
            if (wait := self._paused_until - time.monotonic()) > 0:
                await asyncio.sleep(wait)
                continue
            async with self._changed:
                if self.under_way < self.limit:
                    self.under_way += 1
                    return time.monotonic()
                await self._changed.wait()

    async def leave(self) -> None:
        async with self._changed:
            self.under_way -= 1
            self._changed.notify(max(1, self.limit - self.under_way))

    def answered(self) -> None:
        """A request brought what was asked for."""
        self._answers += 1
        if self._answers == self.limit:  # those from before the round are through
            self._round_began = time.monotonic()
        elif self._answers == self.limit * (1 + self._round):
            self._end_round(self.limit * self._round / max(time.monotonic() - self._round_began, 1e-9))

    def push_back(self, entered: float, wait: float = 0.0) -> None:
        """The server refused, failed or fell silent on a request that entered then, or asks to wait (seconds)."""
        self._paused_until = max(self._paused_until, time.monotonic() + wait)
        if entered < self._cut_at:  # it was under way when the number was cut: that was the answer to it
            return
        self._cut_at = time.monotonic()
        self.knee = max(1, int(self.limit * LESS))
        self._rate, self._doubling, self._rest = 0.0, False, 1
        self._turn_to(self.knee)

    @property
    def _round(self) -> int:
        return ROUND if self._doubling else LONG_ROUND

    def _end_round(self, rate: float) -> None:
        change = self.limit / self.knee - 1
        if change == 0:
            self._rate = rate if self._rate == 0 else (self._rate + rate) / 2
            self._rested += 1
            self._turn_to(self._other() if self._rested >= self._rest else self.knee)
        elif rate >= self._rate * (1 + max(NOISE, WORTH * change) if change > 0 else 1 - NOISE / 2):
            self.knee, self._rate, self._rest = self.limit, rate, 1
            self._turn_to(self._other())
        elif not self._again:  # once is chance
            self._turn_to(self.limit, again=True)
        else:
            self._rest = 1 if self._doubling else min(self._rest * 2, LONGEST_REST)
            self._doubling, self._fewer = False, change > 0
            self._turn_to(self.knee)

    def _other(self) -> int:
        """The number to try next: in the direction that did well last."""
        if self._doubling:
            return min(self.maximum, self.knee * 2)
        step = max(1, self.knee // 8)
        return max(1, self.knee - step) if self._fewer else min(self.maximum, self.knee + step)

    def _turn_to(self, limit: int, *, again: bool = False) -> None:
        if limit != self.knee:
            self._rested = 0
        self.limit, self._again, self._answers = limit, again, 0
