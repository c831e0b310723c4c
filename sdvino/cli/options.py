"""Options that several commands share; their defaults come from the settings classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from sdvino.cli.terminal import USER_PATH
from sdvino.errors import RequestError
from sdvino.folder.hub_files import MAX_DOWNLOAD
from sdvino.inputs.shown import parse_size
from sdvino.settings import (
    COMPONENTS,
    CoreType,
    DeviceSettings,
    PerformanceHint,
    Precision,
    RunSettings,
)

F = TypeVar("F", bound=Callable[..., Any])

DEFAULTS = DeviceSettings()
#: The parameters that `device_options` adds to a command.
DEVICE_OPTIONS = (
    "devices",
    "threads",
    "streams",
    "performance_hint",
    "core_type",
    "pinning",
    "hyper_threading",
    "precision",
    "cache_dir",
    "no_cache",
)


#: The parameters that `model_options` adds to a command.
MODEL_OPTIONS = ("model", "recipe", "gate", "revision", "offline", "max_download")


def model_options(command: F) -> F:
    """Add the options that `model_folder` reads."""
    for option in reversed(
        [
            click.option(
                "-m",
                "--model",
                metavar="FOLDER|FILE|ID",
                help="Model folder, .safetensors checkpoint, diffusers folder, or hub id"
                " (owner/name, owner/name/FILE). What is no OpenVINO model is converted when it is"
                " first used, and kept; see `sdvino models`.  [default: the bundled demo model]",
            ),
            click.option(
                "--recipe",
                metavar="NAME|FILE.toml",
                help="What a checkpoint is converted to: fp16, int8-weights, int8 ... as in"
                " `sdvino convert`.  [default: int8 where NNCF is installed, else fp16]",
            ),
            click.option(
                "--gate/--no-gate",
                default=False,
                help="Compare what was converted with the uncompressed model.  [default: no]",
            ),
            click.option("--revision", help="Branch, tag or commit of a hub model."),
            click.option("--offline", is_flag=True, help="Use only what was downloaded before."),
            download_option,
        ]
    ):
        command = option(command)
    return command


def model_folder(
    *,
    model: str | None,
    recipe: str | None,
    gate: bool,
    revision: str | None,
    offline: bool,
    max_download: int | None,
    quiet: bool = False,
) -> Path:
    """Return the model folder that the values of `model_options` stand for, converted if need be.

    Raises as `sdvino.first_use.resolve.resolve` does. quiet: without a bar.
    """
    from sdvino.first_use.resolve import resolve

    return resolve(
        model,
        recipe=recipe,
        gate=gate,
        revision=revision,
        offline=offline,
        max_download=max_download,
        quiet=quiet,
    )


def download_option(command: F) -> F:
    """Add ``--max-download``, whose value is bytes."""
    option = click.option(
        "--max-download",
        metavar="SIZE",
        callback=lambda _context, option, text: (
            None if text is None else parse_size(text, option.opts[0])
        ),
        help=f"Most that a download from the hub may bring.  [default: {MAX_DOWNLOAD // 10**9}GB]",
    )
    return option(command)


def plugin_option(command: F) -> F:
    """Add ``--plugin``, which makes a vendor's library a device before the command runs."""
    option = click.option(
        "--plugin",
        multiple=True,
        metavar="NAME=LIBRARY",
        expose_value=False,
        is_eager=True,
        callback=lambda context, _, words: _register(context, words),
        help="Load a vendor's OpenVINO plugin, such as an FPGA board's, as the device NAME; may be"
        " repeated.",
    )
    return option(command)


def _register(context: click.Context, words: Sequence[str]) -> None:
    if words and not context.resilient_parsing:
        from sdvino.runtime.plugins import parse_plugin, register_plugin

        for word in words:
            register_plugin(*parse_plugin(word))


def device_options(command: F) -> F:
    """Add the options that `run_settings` reads, and ``--plugin``."""
    for option in reversed(
        [
            click.option(
                "--device",
                "devices",
                multiple=True,
                metavar="[COMPONENT=]DEVICE",
                help="CPU, GPU, NPU, AUTO, HETERO:GPU,CPU ...; repeat with COMPONENT= for one part"
                f" ({', '.join(COMPONENTS)} or vae).  [default: {DEFAULTS.device}]",
            ),
            click.option("--threads", type=int, help="Inference threads.  [default: by the chip]"),
            click.option("--streams", type=int, help="Parallel requests.  [default: 1]"),
            click.option(
                "--performance-hint",
                type=click.Choice(get_args(PerformanceHint)),
                default=DEFAULTS.performance_hint,
                show_default=True,
                help="One picture soon, or many pictures an hour.",
            ),
            click.option(
                "--core-type",
                type=click.Choice(get_args(CoreType)),
                help="Which cores of a hybrid chip.  [default: by the chip; see `sdvino devices`]",
            ),
            click.option("--pinning/--no-pinning", default=None, help="Keep threads on cores."),
            click.option(
                "--hyper-threading/--no-hyper-threading",
                default=None,
                help="Use both hardware threads of a core.",
            ),
            click.option(
                "--precision",
                type=click.Choice(get_args(Precision)),
                help="Arithmetic of float layers.  [default: f32; on a GPU f16; with AMX, and on"
                " AMD's from Zen 4 on beside 8 bits, bf16]",
            ),
            click.option(
                "--cache-dir",
                type=USER_PATH,
                help="Folder of compiled models.  [default: the user's cache folder]",
            ),
            click.option("--no-cache", is_flag=True, help="Do not keep compiled models."),
        ]
    ):
        command = option(command)
    return plugin_option(command)


def run_settings(
    *,
    devices: Sequence[str],
    threads: int | None,
    streams: int | None,
    performance_hint: PerformanceHint,
    core_type: CoreType | None,
    pinning: bool | None,
    hyper_threading: bool | None,
    precision: Precision | None,
    cache_dir: Path | None,
    no_cache: bool,
) -> RunSettings:
    """Turn the values of `device_options` into settings; raises RequestError for a wrong one."""
    default = DeviceSettings(
        num_threads=threads,
        num_streams=streams,
        performance_hint=performance_hint,
        core_type=core_type,
        pinning=pinning,
        hyper_threading=hyper_threading,
        precision=precision,
        cache_dir=cache_dir,
        cache=not no_cache,
    )
    named: dict[str, str] = {}
    for word in devices:
        component, separator, device = word.partition("=")
        if not separator:
            default = replace(default, device=word)
        elif component in named:
            raise RequestError(f"--device names {component} twice; give each component once.")
        else:
            named[component] = device
    components = {name: replace(default, device=device) for name, device in named.items()}
    return RunSettings(default=default, components=components, any_device=not devices)
