"""Show a training in a terminal: a bar for the preparation, and one for the steps with loss, time and memory."""

import logging

import mlx.core as mx
from tqdm import tqdm

from .train import TrainingRun
from .training_output import SMOOTHING, Event

_log = logging.getLogger("stable_diffusion")


class TrainingProgress:
    """Show a run on stderr if it is a terminal; log skipped steps."""

    def __init__(self, run: TrainingRun):
        self._run = run
        # A launcher reads the output of the processes and prints it to a terminal.
        self._off = None if run.group is None else not run.is_first
        self._bar: tqdm | None = None
        self._mean: float | None = None
        self._measured = ""

    def close(self) -> None:
        """End the bar that is shown."""
        if self._bar is not None:
            self._bar.close()

    def prepare(self) -> None:
        """Prepare the run."""
        for label, done, total in self._run.prepare():
            if done == 1:
                self.close()
                self._bar = tqdm(total=total, desc=label, disable=self._off, leave=False)
            self._bar.update()
        self.close()
        total, step = self._run.request.settings.steps, self._run.trainer.step
        self._bar = tqdm(total=total, initial=step, desc="training", disable=self._off, dynamic_ncols=True)
        mx.reset_peak_memory()

    def __call__(self, event: Event) -> None:
        """Show a step."""
        if event["kind"] != "step":
            return
        if event["skipped"]:
            _log.warning("step %d is skipped: its loss is not finite", event["step"])
        else:
            last = event["loss"] if self._mean is None else self._mean
            self._mean = last + SMOOTHING * (event["loss"] - last)
        if event["measured"] is not None:
            self._measured = f" (measured {event['measured']:.4f})"
        if self._mean is not None:
            figures = f"loss {self._mean:.4f}{self._measured}, {event['seconds']:.2f} s, {event['peak_gb']:.2f} GB"
            self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update()
