"""One measurement in a process of its own: python scripts/bench_worker.py JOB.json

bench_peers.py and bench_growth.py start it. JOB.json is a `Job`; what is measured goes to the file
that it names, as a `Measured`. A first picture of a few steps brings everything into memory; the
pictures after it, of other prompts, are those that are timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

#: The first picture's prompt, and those of the others: nobody is to gain by keeping text states.
FIRST_PROMPT = "a wooden boat on a calm lake, morning fog"
PROMPTS = ("a lighthouse at dusk, oil painting", "a bowl of fruit on a table by the window")
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker is to do."""

    #: "sdvino", "optimum", "genai" or "diffusers".
    runner: str
    #: What to load.
    folder: str
    #: Where `Measured` is written.
    result: str
    width: int
    height: int
    steps: int
    guidance: float
    #: Prompts that are timed, and steps of the first one, which is not.
    pictures: int = 1
    first_steps: int = 1
    #: Folder of compiled models; None: none is kept.
    cache: str | None = None
    #: OpenVINO's properties; for sdvino `precision` alone.
    properties: Mapping[str, Any] = field(default_factory=dict)
    #: Fix the shapes before compiling, where that is not done anyway.
    static: bool = False
    #: torch's type, for diffusers.
    dtype: str = "float32"
    #: sdvino's approximations: fields of SpeedSettings.
    speed: Mapping[str, Any] = field(default_factory=dict)
    #: Pictures of each prompt, when timed.
    images: int = 1
    #: time.time() when the process was started.
    started: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a worker found; seconds."""

    #: From the start of the process to the first evaluation of the UNet, and to the first picture.
    ready: float
    first_picture: float
    #: Each timed prompt, text to pixels.
    pictures: tuple[float, ...]
    #: Of one evaluation of the UNet, conditional or unconditional, over the timed pictures.
    evaluation: float
    evaluations: int
    #: Peak of this process in bytes, as the system says at its end; None: it does not.
    peak: int | None = None


class Watch:
    """Counts and times evaluations of a UNet; a batch of two is two evaluations."""

    def __init__(self) -> None:
        #: time.time() when the first evaluation began; or, where that cannot be seen, when the
        #: first step ended, and how many evaluations it was.
        self.first: float | None = None
        self.first_step: tuple[float, int] | None = None
        self.seconds = 0.0
        self.evaluations = 0

    def begin(self, at: float | None = None) -> None:
        """Note that an evaluation begins, now or ``at``; only the first is kept."""
        if self.first is None:
            self.first = time.time() if at is None else at

    def ready(self) -> float:
        """Return when the first evaluation began; to be asked when others have been timed."""
        if self.first is not None:
            return self.first
        assert self.first_step is not None
        ended, evaluations = self.first_step
        # What the first one took longer than the others is part of getting ready.
        return ended - evaluations * self.seconds / self.evaluations

    def reset(self) -> None:
        """Count from zero again."""
        self.seconds, self.evaluations = 0.0, 0

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``forward`` of a UNet in torch's manner, watched."""

        def watched(sample: Any, *arguments: Any, **named: Any) -> Any:
            self.begin()
            started = time.perf_counter()
            result = forward(sample, *arguments, **named)
            self.seconds += time.perf_counter() - started
            self.evaluations += int(sample.shape[0])
            return result

        return watched


#: Makes so many pictures of a prompt in so many steps.
Draw = Callable[[str, int, int], object]


def open_sdvino(job: Job, watch: Watch) -> Draw:
    """Open a folder with sdvino, as its users do."""
    from sdvino import DeviceSettings, RunSettings, StableDiffusionPipeline

    settings = DeviceSettings(
        cache=job.cache is not None,
        cache_dir=None if job.cache is None else Path(job.cache),
        precision=job.properties.get("INFERENCE_PRECISION_HINT"),
    )
    pipe = StableDiffusionPipeline.from_pretrained(
        job.folder, settings=RunSettings(default=settings)
    )
    approximate = {"speed": _speed(job.speed)} if job.speed else {}

    # Not through components.observe: what is observed runs otherwise than what is not.
    def note(pipe: Any, step: int, timestep: float, state: Any) -> None:
        if watch.first_step is None:
            watch.first_step = time.time(), 2 if job.guidance > 1 else 1

    def draw(prompt: str, steps: int, images: int) -> object:
        out = pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=job.guidance,
            width=job.width,
            height=job.height,
            num_images_per_prompt=images,
            seed=SEED,
            scheduler="euler",
            callback_on_step_end=note,
            **approximate,
        )
        # The sampler's own arithmetic is counted as the UNet's: it is next to nothing.
        watch.seconds += out.timings.denoise
        watch.evaluations += out.timings.unet_evaluations
        return out.images

    return draw


def _speed(values: Mapping[str, Any]) -> Any:
    # Not every version of sdvino has them: bench_peers.py leaves such cases out.
    settings: Any = import_module("sdvino.settings")
    # JSON has no tuples.
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return settings.SpeedSettings(**fields)


def open_optimum(job: Job, watch: Watch) -> Draw:
    """Open a folder with optimum-intel."""
    from diffusers import EulerDiscreteScheduler
    from optimum.intel import OVDiffusionPipeline

    properties = dict(job.properties)
    if job.cache is not None:
        properties["CACHE_DIR"] = job.cache
    pipe = OVDiffusionPipeline.from_pretrained(
        job.folder, ov_config=properties, compile=not job.static
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    if job.static:
        pipe.reshape(batch_size=1, height=job.height, width=job.width, num_images_per_prompt=1)
        if job.guidance <= 1:  # reshape() always doubles the UNet's batch
            model = pipe.unet.model
            shapes = {
                port: [1, *list(port.get_partial_shape())[1:]]
                for port in model.inputs
                if len(port.get_partial_shape()) > 1
            }
            model.reshape(shapes)
        pipe.compile()
    pipe.unet.forward = watch.wrap(pipe.unet.forward)
    return _draw_in_torch(pipe, job)


def open_diffusers(job: Job, watch: Watch) -> Draw:
    """Open a diffusers folder with diffusers itself."""
    import torch
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    pipe = DiffusionPipeline.from_pretrained(job.folder, torch_dtype=getattr(torch, job.dtype))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.unet.forward = watch.wrap(pipe.unet.forward)
    return _draw_in_torch(pipe, job)


def _draw_in_torch(pipe: Any, job: Job) -> Draw:
    import torch

    def draw(prompt: str, steps: int, images: int) -> object:
        return pipe(
            prompt,
            num_inference_steps=steps,
            guidance_scale=job.guidance,
            num_images_per_prompt=images,
            width=job.width,
            height=job.height,
            generator=torch.Generator().manual_seed(SEED),
        ).images

    return draw


def open_genai(job: Job, watch: Watch) -> Draw:
    """Open a folder with OpenVINO GenAI."""
    import openvino_genai as genai

    properties = dict(job.properties)
    if job.cache is not None:
        properties["CACHE_DIR"] = job.cache
    scheduler = genai.Scheduler.from_config(
        str(Path(job.folder) / "scheduler" / "scheduler_config.json"),
        genai.Scheduler.Type.EULER_DISCRETE,
    )
    if job.static:
        pipe = genai.Text2ImagePipeline(job.folder)
        pipe.set_scheduler(scheduler)
        pipe.reshape(1, job.height, job.width, job.guidance)
        pipe.compile("CPU", **properties)
    else:
        pipe = genai.Text2ImagePipeline(job.folder, "CPU", **properties)
        pipe.set_scheduler(scheduler)
    batch = 2 if job.guidance > 1 else 1

    def draw(prompt: str, steps: int, images: int) -> object:
        ended: list[float] = []

        def note(step: int, of: int, latents: Any) -> bool:
            ended.append(time.time())
            return False

        picture = pipe.generate(
            prompt,
            num_inference_steps=steps,
            guidance_scale=job.guidance,
            num_images_per_prompt=images,
            width=job.width,
            height=job.height,
            rng_seed=SEED,
            callback=note,
        )
        metrics = pipe.get_performance_metrics()
        # Milliseconds; an evaluation is a batch of two where there is guidance.
        watch.begin(ended[0] - metrics.get_first_and_other_unet_infer_duration()[0] / 1000)
        watch.seconds += metrics.get_unet_infer_duration().mean / 1000 * len(ended)
        watch.evaluations += batch * images * len(ended)
        return picture.data

    return draw


RUNNERS: dict[str, Callable[[Job, Watch], Draw]] = {
    "sdvino": open_sdvino,
    "optimum": open_optimum,
    "genai": open_genai,
    "diffusers": open_diffusers,
}


def measure(job: Job) -> Measured:
    """Do ``job`` and return what it took."""
    watch = Watch()
    draw = RUNNERS[job.runner](job, watch)
    draw(FIRST_PROMPT, job.first_steps, 1)
    first_picture = time.time() - job.started
    watch.reset()
    pictures = []
    for number in range(job.pictures):
        started = time.perf_counter()
        draw(PROMPTS[number % len(PROMPTS)], job.steps, job.images)
        pictures.append(time.perf_counter() - started)
    from sdvino.runtime.memory import peak_memory

    return Measured(
        ready=watch.ready() - job.started,
        first_picture=first_picture,
        pictures=tuple(pictures),
        evaluation=watch.seconds / watch.evaluations,
        evaluations=watch.evaluations,
        peak=peak_memory(),
    )


def main() -> int:
    """Do the job of the file named on the command line."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    text = json.dumps(asdict(measure(job)))
    Path(job.result).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
