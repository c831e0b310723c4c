"""Runs the float folder and the compressed one on the same prompts and seeds, one at a time.

Both run in sdvino's own pipeline in f32, so what is measured is what users get.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.compress.recording import Arrays, Call, Recorder, Tap, as_floats
from sdvino.compress.similarity import WINDOW, psnr, ssim
from sdvino.compress.thresholds import MAX_PSNR, GatePlan, Speed
from sdvino.diffusion.schedule import train_alphas_cumprod
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.errors import SdvinoError
from sdvino.folder.index import ModelFolder
from sdvino.image.tiling import to_levels
from sdvino.outputs import PictureEvent, StepEvent
from sdvino.pipeline import StableDiffusionPipeline
from sdvino.request import Request, ResolvedRequest
from sdvino.runtime.memory_plan import measure_parts, plan_memory
from sdvino.runtime.timings import Timings
from sdvino.settings import DeviceSettings, RunSettings
from sdvino.weights.numbers import relative_error

Share = Callable[[float], None]
#: The first seed of the gate's pictures. Calibration draws its noise elsewhere.
FIRST_SEED = 20_000
#: Where the UNet is asked to see through noise, as shares of the training timesteps.
_PROBES = (0.25, 0.5, 0.75)
_SETTINGS = RunSettings(default=DeviceSettings(precision="f32", cache=False))
#: Predictions that are asked for at once: of a UNet in pieces, each piece is loaded for all.
_TOGETHER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One UNet evaluation on the way of a float picture."""

    picture: int
    timestep: float
    conditional: bool
    call: Call


@dataclass(slots=True, kw_only=True)
class Reference:
    """What the float folder did."""

    request: ResolvedRequest
    predictions: list[Prediction] = field(default_factory=list)
    #: Component to its calls, the UNet's apart.
    calls: dict[str, list[Call]] = field(default_factory=dict)
    pictures: list[NDArray[np.uint8]] = field(default_factory=list)
    #: Finished latents, float32 [1, C, h, w] each.
    latents: list[NDArray[np.float32]] = field(default_factory=list)
    #: Relative error of the UNet's prediction on noised latents of its own pictures; near 1 for a
    #: UNet that has learnt nothing.
    denoising_error: float = math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class TimestepError:
    """Relative error of the UNet's prediction at one timestep, over the pictures."""

    timestep: float
    conditional: float
    #: None without guidance.
    unconditional: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far the compressed folder is from the float one."""

    #: Component to the relative error of its outputs, root mean square over the calls.
    components: dict[str, float]
    timesteps: tuple[TimestepError, ...]
    #: dB, one a picture, at most 99 (equal pictures); none on weights that draw nothing.
    psnr: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()
    #: PSNR of float latents decoded by the compressed decoder, one a picture.
    decoder_psnr: tuple[float, ...] = ()
    #: The compressed pictures, uint8 [H, W, 3].
    pictures: tuple[NDArray[np.uint8], ...] = field(default=(), compare=False, repr=False)
    #: What it took.
    seconds: float = 0.0


@contextmanager
def opened(
    path: Path, max_memory: int | None = None
) -> Iterator[tuple[StableDiffusionPipeline, Recorder]]:
    """Give the pipeline of a folder and what writes its calls down; unload it afterwards.

    Where a picture of the model's own size would take more than ``max_memory`` bytes, the UNet is
    run in pieces.
    """
    folder = ModelFolder.open(path)
    pipe = StableDiffusionPipeline(folder, _SETTINGS)
    if max_memory is not None and not fits(folder, max_memory):
        pipe = StableDiffusionPipeline(folder, replace(_SETTINGS, low_memory=True))
        # Tiles are no whole pictures to compare decoders on; they are left to where they must be.
        pipe.vae_tiling = False if fits(folder, max_memory, low_memory=True) else None
    taps = Recorder(pipe.components)
    try:
        yield pipe, taps
    finally:
        pipe.components.release()
        del pipe, taps
        gc.collect()


def fits(folder: ModelFolder, max_memory: int, *, low_memory: bool = False) -> bool:
    """Tell whether a picture is made in ``max_memory`` bytes, its decoder not in tiles."""
    sizes = measure_parts(folder, folder.height, folder.width)
    plan = plan_memory(sizes, max_memory, tiling=False, low_memory=low_memory, strict=False)
    return plan.peak <= max_memory


def make_request(
    folder: Path, prompts: Sequence[str], *, steps: int, guidance: float, scheduler: Any
) -> ResolvedRequest:
    """Return the request for one picture of each prompt at the model's own size."""
    return Request.of(
        prompts=tuple(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=FIRST_SEED,
        scheduler=scheduler,
    ).resolve(ModelFolder.open(folder))


def time_folder(pipe: StableDiffusionPipeline, request: ResolvedRequest) -> Speed:
    """Run the first step of the first picture and return what loading and evaluating take."""
    timings = Timings()
    for event in pipe.stream(request, output_type="latent", timings=timings):
        if isinstance(event, StepEvent):
            break
    count = max(1, timings.unet_evaluations)
    return Speed(
        load=1.5 * timings.load,  # the autoencoder is yet to load
        evaluation=timings.denoise / count,
        evaluations_a_step=count,
    )


def run_float(
    pipe: StableDiffusionPipeline,
    taps: Recorder,
    request: ResolvedRequest,
    plan: GatePlan,
    progress: Share,
) -> Reference:
    """Make the float pictures and keep what the components were given and gave."""
    for name in ("unet", "vae_decoder"):
        taps.calls(name).clear()  # of timing; a text is encoded once, and its call is kept
    reference = Reference(request=request)
    begun = 0
    for event in pipe.stream(request, output_type="np"):
        if isinstance(event, StepEvent):
            done = event.job.index + (event.step + 1) / event.steps
            progress(done / len(request.jobs))
            continue
        assert isinstance(event, PictureEvent)
        assert event.pixels is not None
        calls = taps.calls("unet")
        _keep_predictions(reference, event.job.index, calls[begun:], plan)
        begun = len(calls)
        reference.latents.append(np.array(event.latents))
        reference.pictures.append(to_levels(event.pixels))
        if event.job.index + 1 >= plan.replayed:
            taps.taps["unet"].open = False
    reference.calls = {name: list(tap.calls) for name, tap in taps.taps.items() if name != "unet"}
    reference.denoising_error = _denoising_error(pipe, taps, reference)
    _run_more_parts(taps, reference)
    return reference


def _keep_predictions(
    reference: Reference, picture: int, calls: Sequence[Call], plan: GatePlan
) -> None:
    if picture >= plan.replayed:
        return
    times = [float(np.ravel(call.inputs["timestep"])[0]) for call in calls]
    guided = len(times) > 1 and times[::2] == times[1::2]
    for index, call in enumerate(calls):
        reference.predictions.append(
            Prediction(
                picture=picture,
                timestep=times[index],
                # The pipeline asks for the prompt first, then without it.
                conditional=not guided or index % 2 == 0,
                call=call,
            )
        )


def _run_more_parts(taps: Recorder, reference: Reference) -> None:
    """Run what making pictures does not: the encoder on the pictures, the decoder for previews."""
    taps.record(True)
    for name in ("vae_encoder", "tiny_vae"):
        for inputs, part in _more_inputs(taps, name, reference):
            part.infer(inputs)
        if taps.calls(name):
            reference.calls[name] = list(taps.calls(name))
        taps.components.release(name)
    taps.record(False)


def _more_inputs(
    taps: Recorder, name: str, reference: Reference
) -> Iterator[tuple[dict[str, NDArray[Any]], Any]]:
    parts = taps.components
    if name not in parts.folder.components:
        return
    for picture, latents in zip(reference.pictures, reference.latents, strict=True):
        if name == "vae_encoder":
            yield {"sample": picture[None]}, parts.vae_encoder(*picture.shape[:2])
        else:
            yield {"latent_sample": latents}, parts.tiny_vae(*latents.shape[-2:])


def _denoising_error(pipe: StableDiffusionPipeline, taps: Recorder, reference: Reference) -> float:
    """Return how badly the UNet predicts the noise that is put on its own finished latents.

    The median over timesteps of the relative error of the raw prediction to its target; an answer
    that has nothing to do with the question has an error of 1 or more.
    """
    config = SchedulerConfig.from_dict(pipe.folder.scheduler_config).for_sampler("ddim")
    alphas_cumprod = train_alphas_cumprod(config, keep_zero=True)
    x_0 = reference.latents[0]
    epsilon = np.random.default_rng(0).standard_normal(x_0.shape, dtype=np.float32)
    known = next(item.call.inputs for item in reference.predictions if item.conditional)
    asked, targets = [], []
    for share in _PROBES:
        timestep = int(share * len(alphas_cumprod))
        alpha = np.float32(alphas_cumprod[timestep] ** 0.5)
        sigma = np.float32((1 - alphas_cumprod[timestep]) ** 0.5)
        x = alpha * x_0 + sigma * epsilon
        asked.append({**known, "sample": x, "timestep": np.full(known["timestep"].shape, timestep)})
        if config.prediction_type == "v_prediction":
            targets.append(alpha * epsilon - sigma * x_0)
        elif config.prediction_type == "sample":
            targets.append(x_0)
        else:
            targets.append(epsilon)
    taps.record(False)
    results = _in_turn(taps.taps["unet"], asked)
    errors = [
        relative_error(np.array(result["out_sample"]), target)
        for result, target in zip(results, targets, strict=True)
    ]
    return float(np.median(errors))


def _in_turn(tap: Tap, inputs: Sequence[Arrays]) -> Iterator[Arrays]:
    """Give what a component makes of each of ``inputs``; valid until the next is asked for."""
    for start in range(0, len(inputs), _TOGETHER):
        yield from tap.infer_each(inputs[start : start + _TOGETHER])


def compare(
    folder: Path,
    reference: Reference,
    plan: GatePlan,
    clock: Callable[[], float],
    progress: Share,
    max_memory: int | None = None,
) -> Comparison:
    """Run the compressed ``folder`` and return how far it is from ``reference``."""
    began = clock()
    with opened(folder, max_memory) as (pipe, taps):
        taps.record(False)
        pictures = _pictures(pipe, reference, plan, lambda share: progress(0.6 * share))
        timesteps, unet = _replay_unet(taps, reference)
        progress(0.9)
        components = {"unet": unet}
        decoder_psnr: list[float] = []
        for name in reference.calls:
            errors = []
            for call, result in _replay(taps, name, reference):
                errors.append(_call_error(name, call, result))
                if name == "vae_decoder" and _whole(call, reference):
                    decoder_psnr.append(_capped(_picture_psnr(call, result)))
            components[name] = _root_mean_square(errors)
    progress(1.0)
    pairs = list(zip(pictures, reference.pictures, strict=False))
    return Comparison(
        components=dict(sorted(components.items())),
        timesteps=timesteps,
        psnr=tuple(_capped(psnr(one, other)) for one, other in pairs),
        ssim=tuple(ssim(one, other) for one, other in pairs if min(one.shape[:2]) >= WINDOW),
        decoder_psnr=tuple(decoder_psnr) if plan.finished else (),
        pictures=tuple(pictures),
        seconds=clock() - began,
    )


def _pictures(
    pipe: StableDiffusionPipeline, reference: Reference, plan: GatePlan, progress: Share
) -> list[NDArray[np.uint8]]:
    """Make the same pictures; without finished ones in the plan, load what making them loads."""
    pictures = []
    jobs = len(reference.request.jobs)
    try:
        for event in pipe.stream(reference.request, output_type="np"):
            if isinstance(event, PictureEvent):
                assert event.pixels is not None
                pictures.append(to_levels(event.pixels))
            elif not plan.finished:
                break
            else:
                progress((event.job.index + (event.step + 1) / event.steps) / jobs)
    except SdvinoError:
        if not pictures and not plan.finished:
            raise
        # Values that are no numbers: as far from the picture as can be.
        rest = reference.pictures[len(pictures) :]
        pictures += [255 - picture for picture in rest]
    return pictures


def _replay_unet(taps: Recorder, reference: Reference) -> tuple[tuple[TimestepError, ...], float]:
    """Give the float trajectories' inputs to the compressed UNet."""
    unet = taps.taps["unet"]
    errors: dict[float, tuple[list[float], list[float]]] = {}
    results = _in_turn(unet, [item.call.inputs for item in reference.predictions])
    for item, result in zip(reference.predictions, results, strict=True):
        error = _call_error("unet", item.call, result)
        branches = errors.setdefault(item.timestep, ([], []))
        branches[0 if item.conditional else 1].append(error)
    timesteps = tuple(
        TimestepError(
            timestep=timestep,
            conditional=_root_mean_square(cond),
            unconditional=_root_mean_square(uncond) if uncond else None,
        )
        for timestep, (cond, uncond) in sorted(errors.items(), reverse=True)
    )
    everything = [error for pair in errors.values() for branch in pair for error in branch]
    return timesteps, _root_mean_square(everything)


def _replay(taps: Recorder, name: str, reference: Reference) -> Iterator[tuple[Call, Any]]:
    if name in ("vae_encoder", "tiny_vae"):
        parts = _more_inputs(taps, name, reference)
        for call, (inputs, part) in zip(reference.calls[name], parts, strict=False):
            yield call, part.infer(inputs)
        taps.components.release(name)
        return
    if name == "vae_decoder" and name not in taps.taps:
        latents = reference.calls[name][0].inputs["latent_sample"]
        taps.components.vae_decoder(*latents.shape[-2:], pixels=False)
    for call in reference.calls[name]:
        yield call, taps.taps[name].infer(call.inputs)


def _call_error(name: str, call: Call, result: Any) -> float:
    """Return the relative error of one call: the largest of its outputs."""
    # Pictures are measured from grey, as -1 to 1.
    centre = np.float32(0.5 if name in ("vae_decoder", "tiny_vae") else 0.0)
    errors = [
        relative_error(as_floats(result[output]) - centre, value - centre)
        for output, value in call.outputs.items()
        if name != "vae_encoder" or output == "latents"
    ]
    return max(errors, default=0.0)


def _whole(call: Call, reference: Reference) -> bool:
    """Return whether the decoder decoded a whole picture, not a tile."""
    return call.outputs["pixels"].shape[1:] == reference.pictures[0].shape


def _picture_psnr(call: Call, result: Any) -> float:
    return psnr(to_levels(np.asarray(result["pixels"])), to_levels(call.outputs["pixels"]))


def _capped(decibels: float) -> float:
    return min(decibels, MAX_PSNR)


def _root_mean_square(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values else 0.0
