"""What every benchmark times with: engines in turns, as calm as the machine allows, and a word on those that fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hfaccel.measure.timing import MIN_ROUNDS, PATIENCE, SETTLE_S, Timing, interleaved, stay_awake

# Worker threads must stop spinning before the next one's turn; those of onnxruntime were seen to spin for 40 ms after a run.
PAUSE_S = 0.06


def _tell_nobody(*_: object) -> None:
    """Where nobody wants to know."""


@dataclass(frozen=True)
class Stopwatch:
    """Times runs against each other.

    Attributes:
        seconds: time budget of all runs of one call of :meth:`measure`.
        on_step: told what is being timed now.
        on_failure: told the name and the error of an engine that fails; it is left out.
        pause_s: pause between runs, see :mod:`hfaccel.measure.timing`.
        clock: seconds, rising.
        sleep: how to pause.
    """

    seconds: float
    on_step: Callable[[str], None] = _tell_nobody
    on_failure: Callable[[str, Exception], None] = _tell_nobody
    pause_s: float = PAUSE_S
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = stay_awake

    def prepared(self, prepare: Mapping[str, Callable[[], Callable[[], None]]]) -> dict[str, Callable[[], None]]:
        """Prepare runs and make each once; a failure of the first one is raised, others are told and left out."""
        ready: dict[str, Callable[[], None]] = {}
        for name, prepare_run in prepare.items():
            try:
                run = prepare_run()
                run()
            except Exception as error:  # engines fail in any way; the others are timed all the same
                if not ready:
                    raise
                self.on_failure(name, error)
                continue
            ready[name] = run
        return ready

    def measure(
        self, runs: Mapping[str, Callable[[], None]], *, times: float = 1.0, min_rounds: int = MIN_ROUNDS, warmup_rounds: int = 2
    ) -> dict[str, Timing]:
        """Time runs in interleaved rounds.

        Args:
            runs: by name.
            times: how many times ``seconds`` they may take.
            min_rounds: rounds made even when they exceed the budget.
            warmup_rounds: rounds before the first that counts.

        Returns:
            A timing for each name; all have the same number of samples.
        """
        return interleaved(
            runs,
            seconds=times * self.seconds,
            min_rounds=min_rounds,
            warmup_rounds=warmup_rounds,
            pause_s=self.pause_s,
            settle_s=SETTLE_S,
            patience=PATIENCE,
            clock=self.clock,
            sleep=self.sleep,
        )
