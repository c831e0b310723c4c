"""The training loop: AdamW under a cosine, a running average, and checkpoints to go on from.

Each iteration draws its numbers from generators seeded by (seed, iteration), so that there is no
random state to keep: a run that was interrupted ends, on the CPU and with a budget in iterations,
in the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdvino.errors import SdvinoError
from sdvino.train.distillation.objectives import Batch, Objective, describe
from sdvino.train.distillation.settings import DistillSettings
from sdvino.train.distillation.store import reading
from sdvino.train.modules import write_weights

CHECKPOINT = "checkpoint.safetensors"
_BETAS = (0.9, 0.99)
_WEIGHT_DECAY = 1e-2
_GRADIENT_NORM = 1.0
# Training lasts so many times as long as writing the checkpoint before it.
_SAVING = 20.0
# From this share of exact zeros on, a matrix was pruned, and its zeros are kept.
_PRUNED = 0.01


class Trainer:
    """Trains a student. Ctrl-C keeps a checkpoint, and another run in the same folder goes on."""

    def __init__(self, student: Any, settings: DistillSettings, folder: Path, device: Any) -> None:
        """``student``: on the device already; ``folder`` takes checkpoint and curves."""
        import torch

        self.student = student.requires_grad_(True)
        self.settings = settings
        self.folder = folder
        self.device = device
        self.average = copy.deepcopy(student).requires_grad_(False) if settings.ema else student
        self.parameters = dict(student.named_parameters())
        self.zeros = held_zeros(self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=_BETAS,
            weight_decay=_WEIGHT_DECAY,
        )
        self.iteration = 0
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self.curve = Curve(folder)
        if (folder / CHECKPOINT).is_file():
            self._load()
        self.curve.begin_at(self.iteration)

    @property
    def share(self) -> float:
        """Return the share of the budget that is spent, 0 to 1."""
        if self.settings.minutes is not None:
            return min(self.seconds / (60.0 * self.settings.minutes), 1.0)
        return min(self.iteration / self.settings.iterations, 1.0)

    def run(self, objective: Objective, progress: Callable[[float], None]) -> Any:
        """Train until the budget is spent and return the module to keep.

        Raises KeyboardInterrupt, the checkpoint saved, after Ctrl-C; SdvinoError when the loss is
        no number.
        """
        saved, pause = time.monotonic(), self.settings.checkpoint_seconds
        with _interrupts() as interrupted:
            while self.share < 1.0 and not interrupted.is_set():
                began = time.monotonic()
                self.iterate(objective)
                now = time.monotonic()
                self.seconds += now - began
                if now - saved > pause:
                    self.save()
                    saved = time.monotonic()
                    # Gigabytes take a while to write: not more of it than of training.
                    pause = max(self.settings.checkpoint_seconds, _SAVING * (saved - now))
                progress(self.share)
        self.save()
        self.curve.draw()
        if interrupted.is_set():
            raise KeyboardInterrupt
        return self.average.eval().requires_grad_(False)

    def rate(self) -> float:
        """Return the learning rate of this iteration."""
        settings = self.settings
        warm = min(1.0, (self.iteration + 1) / max(settings.warmup, 1))
        return settings.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * self.share))

    def iterate(self, objective: Objective) -> None:
        """Do one iteration: forward, backward, update."""
        import torch

        rate = self.rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = objective.loss(self.student, self.average, self._batch())
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SdvinoError(
                f"The loss is no number after {self.iteration} iterations; lower the learning rate"
                f" ({self.settings.learning_rate:g}) and run again."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), _GRADIENT_NORM)
        self.optimizer.step()
        self._keep_zeros()
        self.iteration += 1
        self._update_average()
        self.curve.add(
            {"loss": value, **describe(objective.parts), "gradient": float(norm)},
            iteration=self.iteration,
            rate=rate,
            seconds=self.seconds,
        )

    def _batch(self) -> Batch:
        import torch

        seed, iteration = self.settings.seed, self.iteration
        torch.manual_seed(seed * 1_000_003 + iteration)  # of dropout, where a UNet has any
        noise = torch.Generator().manual_seed(1 + seed * 1_000_003 + iteration)
        rng = np.random.default_rng((seed, iteration))
        return Batch(rng, noise, self.settings.batch, self.device)

    def _keep_zeros(self) -> None:
        import torch

        with torch.no_grad():
            for name, mask in self.zeros.items():
                self.parameters[name].masked_fill_(mask, 0.0)

    def _update_average(self) -> None:
        import torch

        # A young average forgets where it began.
        decay = min(self.settings.ema, (1 + self.iteration) / (10 + self.iteration))
        with torch.no_grad():
            for name, value in self._averages().items():
                value.lerp_(self.parameters[name], 1 - decay)

    # --- checkpoints

    def save(self) -> None:
        """Write the checkpoint and the curves; a crash meanwhile leaves the earlier ones."""
        tensors = {f"weight.{name}": value for name, value in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self._averages().items()}
        for name, value in self.parameters.items():
            for key, state in self.optimizer.state.get(value, {}).items():
                tensors[f"{key}.{name}"] = state
        note = {"iteration": self.iteration, "seconds": self.seconds}
        self.curve.write()
        write_weights(self.folder / CHECKPOINT, tensors, "float32", {"training": json.dumps(note)})

    def _load(self) -> None:
        import torch

        averages = self._averages()
        state: dict[int, dict[str, Any]] = {}
        with reading(self.folder / CHECKPOINT) as file, torch.no_grad():
            note = json.loads(file.metadata()["training"])
            stepped = f"step.{next(iter(self.parameters))}" in file.keys()  # noqa: SIM118
            for index, (name, value) in enumerate(self.parameters.items()):
                value.copy_(file.get_tensor(f"weight.{name}"))
                if name in averages:
                    averages[name].copy_(file.get_tensor(f"average.{name}"))
                if stepped:
                    state[index] = {"step": file.get_tensor(f"step.{name}")}
                    for key in ("exp_avg", "exp_avg_sq"):
                        # Laid out as the weights are: otherwise sums may round otherwise.
                        kept = torch.empty_like(value, memory_format=torch.preserve_format)
                        state[index][key] = kept.copy_(file.get_tensor(f"{key}.{name}"))
            self.iteration, self.seconds = int(note["iteration"]), float(note["seconds"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def _averages(self) -> dict[str, Any]:
        return {} if self.average is self.student else dict(self.average.named_parameters())


def held_zeros(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return where magnitude pruning put zeros: name -> mask, bool, true at them.

    They are told by their number: single weights are exactly zero by chance.
    """
    found = {}
    for name, value in parameters.items():
        mask = value.detach() == 0
        zeros = int(mask.sum())
        if value.ndim >= 2 and _PRUNED * value.numel() <= zeros < value.numel():
            found[name] = mask
    return found


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that an iteration is never cut in the middle."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None):
        yield event
        return

    def note(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)  # a second one does not wait for the iteration

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


LOG_FILE = "loss.jsonl"
PLOT_FILE = "loss.png"
#: Iterations in a line of the log.
_EVERY = 10
#: What a line holds beside losses.
_NO_LOSS = ("iteration", "seconds", "rate", "gradient")


class Curve:
    """Adds up the losses of iterations, and writes the mean of some down."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG_FILE
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._lines: list[str] = []

    def begin_at(self, iteration: int) -> None:
        """Forget what was written down of iterations after ``iteration``: they are done again."""
        kept = [line for line in read_log(self._path) if line["iteration"] <= iteration]
        self._lines = [json.dumps(line) for line in kept]

    def add(
        self, losses: Mapping[str, float], *, iteration: int, rate: float, seconds: float
    ) -> None:
        """Take in the ``losses`` of the ``iteration`` that was done last."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        if iteration % _EVERY == 0:
            means = {name: total / self._counts[name] for name, total in self._sums.items()}
            line = {"iteration": iteration, "seconds": round(seconds, 1), "rate": rate}
            self._lines.append(json.dumps(line | {k: float(f"{v:.6g}") for k, v in means.items()}))
            self._sums, self._counts = {}, {}

    def write(self) -> None:
        """Write the log."""
        part = self._path.with_name(self._path.name + ".part")
        part.write_text("".join(line + "\n" for line in self._lines), encoding="utf-8")
        part.replace(self._path)

    def draw(self) -> None:
        """Draw the curves; without matplotlib there are none."""
        try:
            from sdvino.compress.plots import plot_losses

            lines: list[dict[str, Any]] = [json.loads(line) for line in self._lines]
            last = lines[-1] if lines else {}
            names = [name for name in last if name not in _NO_LOSS]
            plot_losses(
                {
                    name: [(line["iteration"], line[name]) for line in lines if name in line]
                    for name in names
                },
                self._path.with_name(PLOT_FILE),
            )
        except ImportError:
            return


def read_log(path: Path) -> list[dict[str, float]]:
    """Return the lines of a log; none where there is no log, or what is left of a damaged one."""
    lines: list[Any] = []
    with contextlib.suppress(OSError, ValueError):
        lines.extend(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    return [line for line in lines if isinstance(line, dict) and "iteration" in line]
