"""Settings as frozen dataclasses: what to generate, and how to run each component.

A field is said once: its default, its check, its option on the command line and its key in a
picture's text stand beside it; see `sdvino.inputs.fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from sdvino.errors import RequestError
from sdvino.inputs.fields import (
    Choice,
    Folder,
    Interval,
    Number,
    Switch,
    Whole,
    option,
    take_fields,
)

NoiseName = Literal["torch", "cuda"]
SamplerName = Literal[
    "ddim",
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "unipc",
    "lms",
    "pndm",
    "lcm",
    "tcd",
]
SigmaScheduleName = Literal["default", "karras", "exponential"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]
PerformanceHint = Literal["latency", "throughput"]
CoreType = Literal["any", "performance", "efficient"]
Precision = Literal["f32", "f16", "bf16"]
#: OpenVINO's operation for linear layers whose weights and inputs are in 8 bits.
LinearKernel = Literal["matmul", "convolution"]
#: One prediction after the other, one batch of two, or two streams at once.
GuidanceMode = Literal["sequential", "batch", "streams"]

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
SIGMA_SCHEDULES: tuple[SigmaScheduleName, ...] = get_args(SigmaScheduleName)
TIMESTEP_SPACINGS: tuple[TimestepSpacing, ...] = get_args(TimestepSpacing)
NOISES: tuple[NoiseName, ...] = get_args(NoiseName)
GUIDANCE_MODES: tuple[GuidanceMode, ...] = get_args(GuidanceMode)
#: How many times fewer keys and values a self-attention may read along each side.
TOKEN_FACTORS = (1, 2, 4)
MAX_CACHE_INTERVAL = 100
MAX_CACHE_BRANCH = 64

#: A component of the pipeline, named as its sub-folder is.
COMPONENTS: tuple[str, ...] = (
    "text_encoder",
    "text_encoder_2",
    "unet",
    "vae_decoder",
    "vae_encoder",
    "tiny_vae",
)

MAX_SEED = 2**63 - 1
MIN_SEED = -(2**63)


#: A1111's names of the samplers, as pictures carry them.
SAMPLER_TITLES: Mapping[SamplerName, str] = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lms": "LMS",
    "pndm": "PLMS",
    "lcm": "LCM",
    "tcd": "TCD",
}
#: Names elsewhere, without what is no letter or digit: k-diffusion, diffusers, sd.cpp, ComfyUI.
SAMPLER_ALIASES: Mapping[str, SamplerName] = {
    "keuler": "euler",
    "eulerdiscrete": "euler",
    "keulera": "euler_ancestral",
    "keulerancestral": "euler_ancestral",
    "eulerancestraldiscrete": "euler_ancestral",
    "kheun": "heun",
    "heundiscrete": "heun",
    "dpmsolvermultistep": "dpmpp_2m",
    "kdpmpp2m": "dpmpp_2m",
    "kdpmpp2msde": "dpmpp_2m_sde",
    "dpmpp2msdegpu": "dpmpp_2m_sde",
    "unipcmultistep": "unipc",
    "unipcbh2": "unipc",
    "klms": "lms",
    "lmsdiscrete": "lms",
}
#: A1111's schedule types; "Uniform" is the sampler's own grid.
SCHEDULE_TITLES: Mapping[SigmaScheduleName, str] = {
    "default": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """Which sampler, on which grid of noise levels. None means what the model folder says."""

    #: Sampler, by the name diffusers and k-diffusion give it.
    scheduler: SamplerName | None = option(
        Choice(SAMPLERS, SAMPLER_TITLES, SAMPLER_ALIASES),
        "Sampler.  [default: the model's]",
        "--scheduler",
        "--sampler",
        a1111="Sampler",
    )
    #: Spacing of the sigmas between the ends of the grid.
    sigma_schedule: SigmaScheduleName | None = option(
        Choice(SIGMA_SCHEDULES, SCHEDULE_TITLES),
        "Spacing of the noise levels.",
        a1111="Schedule type",
    )
    #: How the training timesteps are thinned out to the steps asked for.
    timestep_spacing: TimestepSpacing | None = option(
        Choice(TIMESTEP_SPACINGS), "Which timesteps.", key="Timestep spacing"
    )
    #: Share of fresh noise in each DDIM (or stochasticity of each TCD) step.
    eta: float = option(
        Number(0.0, 1.0),
        "Fresh noise in each step, 0 to 1 (ddim, tcd).  [default: 0]",
        a1111="Eta",
        default=0.0,
    )

    def __post_init__(self) -> None:
        take_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSettings:
    """What makes a picture sooner at a price in likeness to the exact one; the defaults are exact.

    docs/fast.md holds what each costs, measured on the demo model.
    """

    #: Guide only in this part of the steps, as fractions from start to end (arXiv:2404.07724).
    guidance_interval: tuple[float, float] | None = option(
        Interval(),
        "Guide only in this part of the steps, as fractions.  [default: 0 1]",
        key="Guidance interval",
    )
    #: How guidance asks for its two predictions: one after the other, as one batch, or side by side
    #: in two streams. None: what suits the UNet's device. The pictures differ by rounding alone.
    guidance_mode: GuidanceMode | None = option(
        Choice(GUIDANCE_MODES),
        "Two predictions one by one, in one batch, or in two streams.",
        key="Guidance mode",
    )
    #: Keys and values of the largest self-attentions, thinned so many times along each side
    #: (ToDo, arXiv:2402.13573); with 4 the next level is thinned 2 times. 1: all of them.
    token_downsampling: int = option(
        Choice(TOKEN_FACTORS),
        "Thin what large self-attentions read: 2 or 4.  [default: 1, off]",
        key="Token downsampling",
        default=1,
    )
    #: Run the deep part of the UNet at every so many timesteps only (DeepCache, arXiv:2312.00858).
    cache_interval: int = option(
        Whole(1, MAX_CACHE_INTERVAL),
        "Run the deep part of the UNet every so many steps.  [default: 1, off]",
        key="Cache interval",
        default=1,
    )
    #: Where that part begins: the number of the skip connection, from the outermost, that the
    #: steps in between still enter by; 0 is the fastest.
    cache_branch: int = option(
        Whole(0, MAX_CACHE_BRANCH),
        "Skip connection where that part begins; 0 is fastest.  [default: 0]",
        key="Cache branch",
        default=0,
    )
    #: Decode with the folder's tiny decoder. None: where the folder has one.
    tiny_vae: bool | None = option(
        Switch(),
        "Decode with the model's tiny decoder.  [default: no]",
        key="Tiny VAE",
        default=False,
    )

    def __post_init__(self) -> None:
        take_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """How OpenVINO runs a component. None leaves the choice to sdvino's defaults for the device.

    Sources: OpenVINO's device properties for CPU, GPU and AUTO.
    """

    #: Any name OpenVINO takes: CPU, GPU, GPU.1, NPU, AUTO, AUTO:GPU,CPU, HETERO:GPU,CPU.
    device: str = "CPU"
    #: Threads for inference; None: a physical core each, by the topology (`cpu_defaults`).
    num_threads: int | None = option(
        Whole(1, 1024), "Inference threads.  [default: by the chip]", "--threads"
    )
    #: Parallel requests; None: one (the least latency and memory).
    num_streams: int | None = option(
        Whole(1, 1024), "Parallel requests.  [default: 1]", "--streams"
    )
    #: Latency of one picture, or throughput over many.
    performance_hint: PerformanceHint = option(
        Choice(get_args(PerformanceHint)),
        "One picture soon, or many pictures an hour.  [default: latency]",
        default="latency",
    )
    #: Which cores of a hybrid chip; None: the performance cores, or all where those are few.
    core_type: CoreType | None = option(
        Choice(get_args(CoreType)),
        "Which cores of a hybrid chip.  [default: by the chip; see `sdvino devices`]",
    )
    #: Keep threads on their cores; None: the device's default.
    pinning: bool | None = option(Switch(), "Keep threads on cores.")
    #: Use both hardware threads of a core; None: the device's default (off for latency).
    hyper_threading: bool | None = option(Switch(), "Use both hardware threads of a core.")
    #: Arithmetic of float layers; None: f32 on CPUs without AMX (bf16 is slower there, but on AMD's
    #: from Zen 4 on, which have it in UNet and autoencoder beside 8 bits), f16 on GPU.
    precision: Precision | None = option(
        Choice(get_args(Precision)),
        "Arithmetic of float layers.  [default: f32; on a GPU f16; with AMX, and on AMD's from"
        " Zen 4 on beside 8 bits, bf16]",
    )
    #: How a CPU runs linear layers in 8 bits; None: without VNNI as convolutions of one pixel,
    #: which have faster kernels there, else as products. Other devices run products.
    linear_kernel: LinearKernel | None = option(Choice(get_args(LinearKernel)))
    #: Folder of compiled-model blobs; None: the user's cache folder.
    cache_dir: Path | None = option(
        Folder(), "Folder of compiled models.  [default: the user's cache folder]"
    )
    #: Keep compiled models between runs.
    cache: bool = option(Switch(), "Keep compiled models.  [default: yes]", default=True)
    #: The cache is trimmed, least recently used first, to this many bytes.
    cache_limit_bytes: int = option(Whole(0, 2**62), default=4 * 2**30)

    def __post_init__(self) -> None:
        if not self.device.strip():
            raise RequestError("The device name is empty; run `sdvino devices` to see the names.")
        take_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """One set of device settings for the whole pipeline, with exceptions by component."""

    default: DeviceSettings = field(default_factory=DeviceSettings)
    #: Component name (see COMPONENTS) to its own settings.
    components: dict[str, DeviceSettings] = field(default_factory=dict)
    #: Nobody asked for a device, so that the profile of `sdvino tune` may name one.
    any_device: bool = False
    #: How guidance runs its two predictions, as measured; None: not measured, the default stands.
    guidance_mode: GuidanceMode | None = option(Choice(GUIDANCE_MODES))
    #: Bytes that this process may take at its peak; None: what the machine has.
    max_memory: int | None = None
    #: Hold one piece of the UNet at a time: a fraction of the memory, several times the seconds.
    low_memory: bool = False

    def __post_init__(self) -> None:
        take_fields(self)
        if self.max_memory is not None and self.max_memory <= 0:
            raise RequestError(f"The memory limit is {self.max_memory}; give a number of bytes.")
        for name in self.components:
            if name != "vae":
                check_choice("component", name, COMPONENTS)

    def for_component(self, name: str) -> DeviceSettings:
        """Return the settings of component ``name``; ``vae`` stands for every VAE part."""
        if name in self.components:
            return self.components[name]
        if name in ("vae_decoder", "vae_encoder", "tiny_vae") and "vae" in self.components:
            return self.components["vae"]
        return self.default

    def on(self, device: str | Mapping[str, str]) -> RunSettings:
        """Return these settings on a device, or on devices by component and ``default``."""
        named = {"default": device} if isinstance(device, str) else dict(device)
        default = replace(self.default, device=named.pop("default", self.default.device))
        components = {
            name: replace(self.for_component(name), device=value) for name, value in named.items()
        }
        components = {**self.components, **components}
        return replace(self, default=default, components=components, any_device=False)


def check_choice(what: str, value: str | None, known: tuple[str, ...]) -> None:
    """Raise RequestError, naming the choices, unless ``value`` is None or one of ``known``."""
    if value is not None:
        Choice(known).take(what, value)


#: What ``--fast`` asks for; docs/fast.md holds what it costs. The tiny decoder is no part of it: it
#: costs more than all of the others.
FAST = SpeedSettings(guidance_interval=(0.0, 0.8), token_downsampling=2, cache_interval=2)
