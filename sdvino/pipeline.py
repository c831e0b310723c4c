"""Prompt to picture: `StableDiffusionPipeline`, with the argument names of diffusers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from sdvino.diffusion.grid import Grid
from sdvino.diffusion.layout import make_grid
from sdvino.diffusion.noise import given_noise, make_noise
from sdvino.diffusion.samplers import get_sampler
from sdvino.diffusion.scheduler_config import SchedulerConfig, sampler_from_config
from sdvino.errors import ModelFolderError, RequestError
from sdvino.folder.index import ModelFolder
from sdvino.image.codec import DecodeQueue, PictureDecoder, decodes_aside
from sdvino.image.preview import Previewer
from sdvino.outputs import Array, OutputType, PictureEvent, PipelineOutput, StepEvent, gather
from sdvino.request import OPTIONS, PictureJob, PictureRecord, Request, ResolvedRequest, as_texts
from sdvino.runtime.components import Components
from sdvino.runtime.denoising import PictureDenoiser
from sdvino.runtime.guard import Guard
from sdvino.runtime.memory import check_memory, memory_status
from sdvino.runtime.memory_plan import MemoryPlan, measure_parts, plan_memory
from sdvino.runtime.plugins import register_plugins
from sdvino.runtime.timings import Timings, clock
from sdvino.runtime.tuned import tuned_run
from sdvino.settings import (
    GuidanceMode,
    NoiseName,
    RunSettings,
    SamplerName,
    SigmaScheduleName,
    SpeedSettings,
    TimestepSpacing,
    check_choice,
)
from sdvino.text.conditions import Conditioner, Embeddings
from sdvino.text.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger("sdvino")

#: Pictures whose texts are encoded before the first of them is denoised.
TEXTS_AHEAD = 32

Callback = Callable[["StableDiffusionPipeline", int, float, dict[str, Any]], dict[str, Any] | None]


class StableDiffusionPipeline:
    """Text to image with a converted model folder.

    >>> pipe = StableDiffusionPipeline.from_pretrained()
    >>> pipe("a red circle on a blue background", seed=7).images[0].save("circle.png")
    """

    def __init__(
        self,
        folder: ModelFolder,
        settings: RunSettings | None = None,
        *,
        vae_tiling: bool | None = None,
        guard: Guard | None = None,
        components: Components | None = None,
    ) -> None:
        """``components`` run in place of the folder's own, which ``guard`` looks at.

        Raises ModelFolderError for a folder of a kind that does not run here.
        """
        if folder.refusal is not None:
            raise ModelFolderError(folder.refusal)
        self.folder = folder
        #: Decode in tiles, which bounds the decoder's memory; None: only where pictures are large.
        self.vae_tiling = vae_tiling
        self.settings = RunSettings() if settings is None else settings
        if components is None:
            components = Components(folder, self.settings, Guard() if guard is None else guard)
        self.components = components
        self.conditioner = Conditioner(self.components)
        self._scheduler_config = SchedulerConfig.from_dict(folder.scheduler_config)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        recipe: str | Path | None = None,
        gate: bool = False,
        device: str | Mapping[str, str] | None = None,
        plugins: Mapping[str, str | Path] | None = None,
        settings: RunSettings | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        offline: bool = False,
        max_download: int | None = None,
        verify: bool = False,
        vae_tiling: bool | None = None,
        profile: bool = True,
    ) -> StableDiffusionPipeline:
        """Open a model: the bundled demo model, a model folder, a checkpoint, or a hub id.

        A .safetensors checkpoint, a diffusers folder and a hub id of one are converted when they
        are first used and found again from then on (`sdvino.first_use`); ``recipe`` says
        to what (None: int8 where NNCF is installed, else fp16), with ``gate`` the result is
        compared with the uncompressed model. A folder or hub id of an OpenVINO model takes neither.
        ``device`` is one OpenVINO device name, or names by component, with ``default`` for the
        rest; ``plugins`` makes devices of vendors' OpenVINO libraries first, name to path;
        ``settings`` says everything else too. ``cache_dir`` is the hub's download cache,
        ``max_download`` the most bytes that may come from the hub (None: 32 GB).
        ``verify`` compares every file with the SHA-256 of the manifest. With ``profile``, what
        `sdvino tune` measured on this machine fills in what is left open. Nothing is compiled
        before the first call. Raises RequestError (ModelFolderError, DeviceError) for a wrong
        request.
        """
        # Above this module, as converting is: the one import that points up.
        from sdvino.first_use.resolve import ModelOptions, resolve

        register_plugins({} if plugins is None else plugins)
        asked = ModelOptions(
            recipe=recipe,
            gate=gate,
            revision=revision,
            cache_dir=cache_dir,
            offline=offline,
            max_download=max_download,
        )
        folder = ModelFolder.open(resolve(model, asked))
        if verify:
            folder.verify()
        run = RunSettings(any_device=True) if settings is None else settings
        run = run if device is None else run.on(device)
        tuned, guard = tuned_run(folder, run, profile=profile)
        return cls(folder, tuned, vae_tiling=vae_tiling, guard=guard)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        seed: int | None = None,
        latents: Array | None = None,
        prompt_embeds: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        pooled_prompt_embeds: Array | None = None,
        negative_pooled_prompt_embeds: Array | None = None,
        clip_skip: int | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        scheduler: SamplerName | None = None,
        sigma_schedule: SigmaScheduleName | None = None,
        timestep_spacing: TimestepSpacing | None = None,
        noise: NoiseName = "torch",
        guidance_mode: GuidanceMode | None = None,
        guidance_interval: tuple[float, float] | None = None,
        speed: SpeedSettings | None = None,
    ) -> PipelineOutput:
        """Make pictures; arguments as in diffusers, with ``seed`` in place of a generator.

        What is None is taken from the model folder. ``latents`` is unit noise, float32
        [N, C, height / 8, width / 8]; ``prompt_embeds`` is float32 [N, 77, width] in place of
        ``prompt``, beside which Stable Diffusion XL takes ``pooled_prompt_embeds``, float32
        [N, width]. Without a ``negative_prompt`` Stable Diffusion XL guides away from zeros, with
        an empty one away from an empty text, as in diffusers. ``clip_skip`` counts for the prompt
        alone, as there. ``output_type`` is "pil", "np" (float32 [N, H, W, 3], 0 to 1) or "latent".
        ``callback_on_step_end(pipe, step, timestep, {"latents": x})`` may return a dict with other
        latents of the same shape, and stops the work by raising `Cancelled`.
        ``speed`` buys time with likeness to the exact picture (`sdvino.settings.FAST` is a good
        mix); ``guidance_mode`` and ``guidance_interval`` stand in place of its own.
        Raises RequestError for a wrong request, SdvinoError when the work fails.
        """
        given = dict(locals())  # by name: a new option is an argument more, and no line here
        check_choice("output type", output_type, get_args(OutputType))
        embeddings = Embeddings(**{one.name: given[one.name] for one in fields(Embeddings)})
        embeddings.check_beside(prompt, negative_prompt)
        request = _request(given, embeddings).resolve(self.folder)
        inputs = {"embeddings": embeddings, "latents": latents}
        return self._answer(request, output_type, callback_on_step_end, inputs)

    def _answer(
        self,
        request: ResolvedRequest,
        output_type: OutputType,
        callback: Callback | None,
        inputs: Mapping[str, Any],
    ) -> PipelineOutput:
        timings = Timings()
        pictures: list[PictureEvent] = []
        for event in self.stream(request, output_type=output_type, timings=timings, **inputs):
            if isinstance(event, PictureEvent):
                pictures.append(event)
            elif callback is not None:
                self._call_back(callback, event)
        return PipelineOutput(
            images=gather(pictures, output_type),
            seeds=[picture.job.seed for picture in pictures],
            records=[self.record(request, picture.job) for picture in pictures],
            timings=timings,
            dropped=[self.dropped_words(text) for text in request.prompts],
        )

    def stream(
        self,
        request: ResolvedRequest,
        *,
        output_type: OutputType = "pil",
        latents: Array | None = None,
        embeddings: Embeddings | None = None,
        timings: Timings | None = None,
        once: bool = False,
    ) -> Iterator[StepEvent | PictureEvent]:
        """Yield a `StepEvent` after each denoising step and a `PictureEvent` for each picture.

        Whoever iterates shows progress, draws previews, and cancels by no longer iterating. With
        ``once`` nothing is drawn afterwards: a single picture's models are released one by one.
        """
        timings = Timings() if timings is None else timings
        embeddings = Embeddings() if embeddings is None else embeddings
        factor = self.folder.vae_scale_factor
        size = (request.height // factor, request.width // factor)
        grid = self.schedule(request)
        memory = self.memory_plan(request, once=once)
        shape = (1, self.folder.latent_channels, *size)
        given = given_noise(latents, (len(request.jobs), *shape[1:]))
        sample = get_sampler(grid.sampler)
        denoising = PictureDenoiser(self.components, request, grid, memory, timings)
        decoder = PictureDecoder(
            self.components, memory, output_type, tiny=bool(request.speed.tiny_vae)
        )
        hint = self.settings.default.performance_hint
        aside = decodes_aside(hint, len(request.jobs), memory)
        with denoising, DecodeQueue(decoder, timings, aside=aside) as queue:
            denoising.load_ahead(guided=self.conditioner.needs_negative(request.guidance_scale))
            for job, (cond, uncond) in self._conditions(request, embeddings, memory, timings):
                denoise = denoising.denoiser(cond, uncond)
                noise = make_noise(request.noise, job.seed)
                start = noise.randn(shape) if given is None else given[job.index : job.index + 1]
                x = grid.initial(start)
                steps = sample(denoise, x, grid, noise, eta=request.sampler.eta)
                while True:
                    with clock(timings, "denoise"):
                        step = next(steps, None)
                    if step is None:
                        break
                    x = step.x
                    yield StepEvent(
                        job=job,
                        step=step.index,
                        steps=grid.steps,
                        timestep=step.level.t,
                        latents=x,
                        denoised=step.denoised,
                    )
                yield from queue.put(job, grid.final(x))
            yield from queue.rest()

    def _conditions(
        self,
        request: ResolvedRequest,
        embeddings: Embeddings,
        memory: MemoryPlan,
        timings: Timings,
    ) -> Iterator[tuple[PictureJob, tuple[dict[str, Array], dict[str, Array] | None]]]:
        """Yield each job with its UNet inputs; texts are read several ahead, then released."""
        for start in range(0, len(request.jobs), TEXTS_AHEAD):
            jobs = request.jobs[start : start + TEXTS_AHEAD]
            inputs = [
                self.conditioner.unet_inputs(request, job, embeddings, timings) for job in jobs
            ]
            if memory.release_text:
                self.components.release(*self.folder.kind.text_encoders)
            yield from zip(jobs, inputs, strict=True)

    def schedule(self, request: ResolvedRequest) -> Grid:
        """Return the grid of noise levels that ``request`` asks for."""
        return make_grid(
            self.sampler_name(request),
            self._scheduler_config,
            request.num_inference_steps,
            sigma_schedule=request.sampler.sigma_schedule,
            timestep_spacing=request.sampler.timestep_spacing,
        )

    def sampler_name(self, request: ResolvedRequest) -> SamplerName:
        """Return the sampler: the one asked for, or the folder's own, or the one nearest to it."""
        if request.sampler.scheduler is not None:
            return request.sampler.scheduler
        name, warning = sampler_from_config(self.folder.scheduler_config)
        if warning is not None:
            _log.warning(warning)
        return name

    def record(self, request: ResolvedRequest, job: PictureJob) -> PictureRecord:
        """Return what repeats the picture of ``job``, as its file carries it."""
        manifest = self.folder.manifest
        return PictureRecord(
            request=request.of_picture(job, scheduler=self.sampler_name(request)),
            model=self.folder.name,
            recipe=None if manifest is None else manifest.recipe,
        )

    def memory_plan(self, request: ResolvedRequest, *, once: bool = False) -> MemoryPlan:
        """Return what is held in memory when, for the pictures asked for; ``once`` as in `stream`.

        Raises RequestError when they cannot fit into this machine's memory, or under the limit.
        """
        sizes = measure_parts(
            self.folder, request.height, request.width, tiny=bool(request.speed.tiny_vae)
        )
        limit = self.settings.max_memory
        status = memory_status()
        free = None if status.available is None else status.available + status.own
        plan = plan_memory(
            sizes,
            free if limit is None else limit,
            tiling=self.vae_tiling,
            low_memory=self.settings.low_memory,
            once=once and len(request.jobs) == 1,
            strict=limit is not None,
        )
        check_memory(plan.peak, status)
        return plan

    def decode(self, latents: Array) -> NDArray[np.uint8]:
        """Return the pictures of finished latents, float32 [N, C, h, w], as uint8 [N, H, W, 3]."""
        latents = np.asarray(latents, np.float32)
        factor = self.folder.vae_scale_factor
        height, width = latents.shape[-2] * factor, latents.shape[-1] * factor
        request = Request(prompts=("",), height=height, width=width, seed=0)
        memory = self.memory_plan(request.resolve(self.folder))
        decode = PictureDecoder(self.components, memory, "pil", tiny=False)
        pictures = [decode(x[None], Timings()) for x in latents]
        return np.stack([picture for picture in pictures if picture is not None])

    def preview(self, denoised: Array) -> Image.Image:
        """Draw the model's present guess, float32 [1, C, h, w], quickly and roughly."""
        from PIL import Image

        tiny = self.components.tiny_vae(*denoised.shape[-2:])
        return Image.fromarray(Previewer(tiny).preview(denoised)[0])

    def dropped_words(self, prompt: str) -> str:
        """Return the words at the end of ``prompt`` that the text encoder cannot read, or ''."""
        return self.tokenizer.encode(prompt).dropped

    @property
    def tokenizer(self) -> ClipTokenizer:
        """The tokenizer of the folder, the first text encoder's."""
        return self.conditioner.tokenizer()

    def _call_back(self, callback: Callback, event: StepEvent) -> None:
        answer = callback(self, event.step, event.timestep, {"latents": event.latents})
        latents = None if answer is None else answer.get("latents")
        if latents is None or latents is event.latents:
            return
        if np.shape(latents) != event.latents.shape:
            raise RequestError(
                f"The callback returned latents of the shape {np.shape(latents)};"
                f" return {event.latents.shape}."
            )
        # The sampler goes on from this very array.
        event.latents[...] = latents


def _request(given: Mapping[str, Any], embeddings: Embeddings) -> Request:
    """Return what the arguments of a call ask for; those that are None ask for nothing."""
    states, speed = embeddings.prompt_embeds, given["speed"]
    options = {} if speed is None else asdict(speed)
    for name in OPTIONS:
        if given.get(name) is not None:
            options[name] = given[name]
    return Request.of(
        prompts=as_texts(given["prompt"]) if states is None else ("",) * len(states),
        negative_prompts=as_texts(given["negative_prompt"]),
        **options,
    )
