"""What a model costs on this machine: the table behind `sdvino bench`, and that of one run."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import openvino as ov

from sdvino.errors import RequestError
from sdvino.outputs import StepEvent
from sdvino.pipeline import StableDiffusionPipeline
from sdvino.request import Request, ResolvedRequest
from sdvino.runtime.core import shared_core
from sdvino.runtime.memory import peak_memory
from sdvino.runtime.timings import Timings
from sdvino.settings import DeviceSettings, RunSettings, SamplerName

MAX_PICTURES = 100
#: One for each picture in turn, so that no text state is there from the picture before.
PROMPTS = (
    "a red circle on a blue background",
    "a small green star on a white background",
    "a big yellow square on a black background",
)
_SEED = 1
PARTS = ("load", "text", "denoise", "decode")

#: Told how many steps are done, and of how many.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """One machine, one model, one kind of picture. Times in seconds, medians over the pictures."""

    model: str
    recipe: str | None
    #: What the UNet ran on, and the name of this machine's processor.
    device: str
    processor: str
    openvino: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: str
    #: How many pictures were timed.
    pictures: int
    #: Reading and compiling every part, and the same from the cache of compiled models; None
    #: where the settings keep no cache.
    load_cold: float
    load_warm: float | None
    #: The text encoders: prompt and, with guidance, negative prompt.
    text: float
    #: One evaluation of the UNet, and how many a picture takes.
    evaluation: float
    evaluations: int
    decode: float
    #: Text to pixels, without what loads once.
    picture: float
    #: Bytes of this process at its peak, compiling included; None where the system does not say.
    peak_memory: int | None
    #: Bytes of the model's parts on disk.
    model_bytes: int

    def table(self) -> str:
        """Return the report for people."""
        what = self.model if self.recipe is None else f"{self.model} ({self.recipe})"
        rows = [
            ("load, first time", _seconds(self.load_cold)),
            ("load, from the cache", _seconds(self.load_warm)),
            ("text encoder", _seconds(self.text)),
            ("UNet, one evaluation", f"{_seconds(self.evaluation)}  {self.evaluations} a picture"),
            ("VAE decoder", _seconds(self.decode)),
            ("picture", f"{_seconds(self.picture)}  without loading, median of {self.pictures}"),
            ("peak memory", _size(self.peak_memory)),
            ("model on disk", _size(self.model_bytes)),
        ]
        head = (
            f"{what}, {self.width} x {self.height}, {self.steps} steps, guidance"
            f" {self.guidance_scale:g}, {self.scheduler}\n"
            f"{self.device}: {self.processor}, OpenVINO {self.openvino}\n"
        )
        return "\n".join([head, *(f"{name:22}{value}" for name, value in rows)])


def measure_model(
    model: str | Path | None = None,
    *,
    num_inference_steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    scheduler: SamplerName | None = None,
    pictures: int = 3,
    settings: RunSettings | None = None,
    revision: str | None = None,
    offline: bool = False,
    max_download: int | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure ``model`` (a folder, a hub id; None: the bundled demo model) in this process.

    What is None is the model's own. Everything is compiled twice, the second time from a cache of
    its own below the system's temporary folder, which is removed; then ``pictures`` pictures are
    made. Raises RequestError for a wrong request, SdvinoError when the work fails.
    """
    if not 1 <= pictures <= MAX_PICTURES:
        raise RequestError(
            f"The number of pictures is {pictures}; give a whole number from 1 to {MAX_PICTURES}."
        )
    request = Request.of(
        prompts=tuple(PROMPTS[i % len(PROMPTS)] for i in range(pictures)),
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=_SEED,
        scheduler=scheduler,
    )
    settings = RunSettings() if settings is None else settings
    with tempfile.TemporaryDirectory(prefix="sdvino-bench-", ignore_cleanup_errors=True) as cache:

        def open_pipeline() -> StableDiffusionPipeline:
            return StableDiffusionPipeline.from_pretrained(
                model,
                settings=with_cache(settings, Path(cache)),
                revision=revision,
                offline=offline,
                max_download=max_download,
            )

        pipe = open_pipeline()
        resolved = request.resolve(pipe.folder)
        first = replace(resolved, num_inference_steps=1, jobs=resolved.jobs[:1])
        steps = pipe.schedule(resolved).steps
        count = _Counter(pipe.schedule(first).steps + steps * pictures, progress)
        cold = _run(pipe, first, count)
        pipe.components.release()
        pipe = open_pipeline()
        runs = [_run(pipe, replace(resolved, jobs=(job,)), count) for job in resolved.jobs]
        pipe.components.release()
    return _report(pipe, resolved, cold, runs)


def with_cache(settings: RunSettings, folder: Path) -> RunSettings:
    """Return ``settings`` with the compiled models of every component kept in ``folder``."""

    def moved(device: DeviceSettings) -> DeviceSettings:
        return replace(device, cache_dir=folder)

    components = {name: moved(device) for name, device in settings.components.items()}
    return replace(settings, default=moved(settings.default), components=components)


def _run(pipe: StableDiffusionPipeline, request: ResolvedRequest, count: _Counter) -> Timings:
    timings = Timings()
    for event in pipe.stream(request, timings=timings):
        if isinstance(event, StepEvent):
            count.step()
    return timings


def _report(
    pipe: StableDiffusionPipeline,
    request: ResolvedRequest,
    cold: Timings,
    runs: Sequence[Timings],
) -> BenchReport:
    folder, device = pipe.folder, pipe.settings.for_component("unet")
    median = statistics.median
    return BenchReport(
        model=folder.name,
        recipe=None if folder.manifest is None else folder.manifest.recipe,
        device=device.device,
        processor=str(shared_core().get_property("CPU", "FULL_DEVICE_NAME")).strip(),
        openvino=ov.get_version().partition("-")[0],
        width=request.width,
        height=request.height,
        steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        scheduler=pipe.sampler_name(request),
        pictures=len(runs),
        load_cold=cold.load,
        load_warm=runs[0].load if device.cache else None,
        text=median(run.text for run in runs),
        evaluation=median(run.denoise / run.unet_evaluations for run in runs),
        evaluations=max(run.unet_evaluations for run in runs),
        decode=median(run.decode for run in runs),
        # Loading for the first is told apart; what is loaded again for each is part of each.
        picture=median([runs[0].total - runs[0].load, *(run.total for run in runs[1:])]),
        peak_memory=peak_memory(),
        model_bytes=sum(part.bytes for part in folder.components.values()),
    )


class _Counter:
    """Counts steps for whoever shows them."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


def breakdown(timings: Timings, *, pictures: int = 1, peak: int | None = None) -> str:
    """Return where the time of a run went, a line for each part: seconds, share, what it holds."""
    total = timings.total
    notes = {"denoise": _evaluations(timings)}
    lines = []
    for part in PARTS:
        seconds = getattr(timings, part)
        share = seconds / total if total > 0 else 0.0
        note = f"  {notes[part]}" if part in notes else ""
        lines.append(f"{part:13}{seconds:8.2f} s {share:5.0%}{note}")
    each = f"  {total / pictures:.2f} s a picture" if pictures > 1 else ""
    lines.append(f"{'together':13}{total:8.2f} s{'':6}{each}".rstrip())
    if peak is not None:
        lines.append(f"{'peak memory':13}{peak / 1e9:8.2f} GB")
    return "\n".join(lines)


def _evaluations(timings: Timings) -> str:
    count = timings.unet_evaluations
    if count == 0:
        return "no UNet evaluation"
    return f"{count} UNet evaluation{'s' * (count > 1)}, {timings.denoise / count:.3f} s each"


def _seconds(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:9.3f} s"


def _size(value: int | None) -> str:
    if value is None:
        return f"{'-':>9}"
    return f"{value / 1e9:9.3f} GB" if value >= 1e8 else f"{value / 1e6:9.3f} MB"
