"""Settings as frozen dataclasses: what to generate, and how to run each component.

Command-line defaults are read from these classes, so a default is written once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from sdvino.errors import RequestError

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """Which sampler, on which grid of noise levels. None means what the model folder says."""

    #: Sampler, by the name diffusers and k-diffusion give it.
    scheduler: SamplerName | None = None
    #: Spacing of the sigmas between the ends of the grid.
    sigma_schedule: SigmaScheduleName | None = None
    #: How the training timesteps are thinned out to the steps asked for.
    timestep_spacing: TimestepSpacing | None = None
    #: Share of fresh noise in each DDIM (or stochasticity of each TCD) step, 0 to 1.
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_choice("scheduler", self.scheduler, SAMPLERS)
        check_choice("sigma schedule", self.sigma_schedule, SIGMA_SCHEDULES)
        check_choice("timestep spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if not 0.0 <= self.eta <= 1.0:
            raise RequestError(f"eta is {self.eta}; give a number from 0 to 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedSettings:
    """What makes a picture sooner at a price in likeness to the exact one; the defaults are exact.

    docs/fast.md holds what each costs, measured on the demo model.
    """

    #: How guidance asks for its two predictions: one after the other, as one batch, or side by side
    #: in two streams. None: what suits the UNet's device. The pictures differ by rounding alone.
    guidance_mode: GuidanceMode | None = None
    #: Guide only in this part of the steps, as fractions from start to end (arXiv:2404.07724).
    guidance_interval: tuple[float, float] | None = None
    #: Keys and values of the largest self-attentions, thinned so many times along each side
    #: (ToDo, arXiv:2402.13573); with 4 the next level is thinned 2 times. 1: all of them.
    token_downsampling: int = 1
    #: Run the deep part of the UNet at every so many timesteps only (DeepCache, arXiv:2312.00858).
    cache_interval: int = 1
    #: Where that part begins: the number of the skip connection, from the outermost, that the
    #: steps in between still enter by; 0 is the fastest.
    cache_branch: int = 0
    #: Decode with the folder's tiny decoder. None: where the folder has one.
    tiny_vae: bool | None = False

    def __post_init__(self) -> None:
        check_choice("guidance mode", self.guidance_mode, GUIDANCE_MODES)
        if self.guidance_interval is not None:
            start, end = self.guidance_interval
            if not 0.0 <= start < end <= 1.0:
                raise RequestError(
                    f"The guidance interval is {start:g} to {end:g}; give two fractions of the"
                    " steps from 0 to 1, the smaller first."
                )
        if self.token_downsampling not in TOKEN_FACTORS:
            raise RequestError(
                f"The token downsampling is {self.token_downsampling}; give 1 (off), 2 or 4."
            )
        if not 1 <= self.cache_interval <= MAX_CACHE_INTERVAL:
            raise RequestError(
                f"The cache interval is {self.cache_interval}; give a whole number from 1 (off) to"
                f" {MAX_CACHE_INTERVAL}."
            )
        if not 0 <= self.cache_branch <= MAX_CACHE_BRANCH:
            raise RequestError(
                f"The cache branch is {self.cache_branch}; give the number of a skip connection of"
                " the UNet, from 0 (the outermost)."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """How OpenVINO runs a component. None leaves the choice to sdvino's defaults for the device.

    Sources: OpenVINO's device properties for CPU, GPU and AUTO.
    """

    #: Any name OpenVINO takes: CPU, GPU, GPU.1, NPU, AUTO, AUTO:GPU,CPU, HETERO:GPU,CPU.
    device: str = "CPU"
    #: Threads for inference; None: a physical core each, by the topology (`cpu_defaults`).
    num_threads: int | None = None
    #: Parallel requests; None: one (the least latency and memory).
    num_streams: int | None = None
    #: Latency of one picture, or throughput over many.
    performance_hint: PerformanceHint = "latency"
    #: Which cores of a hybrid chip; None: the performance cores, or all where those are few.
    core_type: CoreType | None = None
    #: Keep threads on their cores; None: the device's default.
    pinning: bool | None = None
    #: Use both hardware threads of a core; None: the device's default (off for latency).
    hyper_threading: bool | None = None
    #: Arithmetic of float layers; None: f32 on CPUs without AMX (bf16 is slower there, but on AMD's
    #: from Zen 4 on, which have it in UNet and autoencoder beside 8 bits), f16 on GPU.
    precision: Precision | None = None
    #: How a CPU runs linear layers in 8 bits; None: without VNNI as convolutions of one pixel,
    #: which have faster kernels there, else as products. Other devices run products.
    linear_kernel: LinearKernel | None = None
    #: Folder of compiled-model blobs; None: the user's cache folder.
    cache_dir: Path | None = None
    #: Keep compiled models between runs.
    cache: bool = True
    #: The cache is trimmed, least recently used first, to this many bytes.
    cache_limit_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        if not self.device.strip():
            raise RequestError("The device name is empty; run `sdvino devices` to see the names.")
        for name in ("num_threads", "num_streams"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1024:
                what = name.removeprefix("num_")
                raise RequestError(f"{what} is {value}; give a whole number from 1 to 1024.")
        check_choice("performance hint", self.performance_hint, get_args(PerformanceHint))
        check_choice("core type", self.core_type, get_args(CoreType))
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("linear kernel", self.linear_kernel, get_args(LinearKernel))
        if self.cache_limit_bytes < 0:
            raise RequestError("The cache limit is negative; give a number of bytes from 0 up.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """One set of device settings for the whole pipeline, with exceptions by component."""

    default: DeviceSettings = field(default_factory=DeviceSettings)
    #: Component name (see COMPONENTS) to its own settings.
    components: dict[str, DeviceSettings] = field(default_factory=dict)
    #: Nobody asked for a device, so that the profile of `sdvino tune` may name one.
    any_device: bool = False
    #: How guidance runs its two predictions, as measured; None: not measured, the default stands.
    guidance_mode: GuidanceMode | None = None
    #: Bytes that this process may take at its peak; None: what the machine has.
    max_memory: int | None = None
    #: Hold one piece of the UNet at a time: a fraction of the memory, several times the seconds.
    low_memory: bool = False

    def __post_init__(self) -> None:
        check_choice("guidance mode", self.guidance_mode, GUIDANCE_MODES)
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


def check_choice(what: str, value: str | None, known: tuple[str, ...]) -> None:
    """Raise RequestError, naming the choices, unless ``value`` is None or one of ``known``."""
    if value is not None and value not in known:
        raise RequestError(f"Unknown {what} {value!r}; choose one of: {', '.join(known)}.")


#: What ``--fast`` asks for; docs/fast.md holds what it costs. The tiny decoder is no part of it: it
#: costs more than all of the others.
FAST = SpeedSettings(
    guidance_interval=(0.0, 0.8),
    token_downsampling=2,
    cache_interval=2,
)
