"""Options that several commands share; what is a field of the settings is made from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from sdvino.cli.terminal import USER_PATH
from sdvino.errors import RequestError
from sdvino.folder.hub_files import MAX_DOWNLOAD
from sdvino.inputs.fields import Choice, Folder, Interval, Number, Option, Switch, options_of
from sdvino.inputs.shown import parse_size
from sdvino.request import OPTIONS
from sdvino.settings import COMPONENTS, FAST, DeviceSettings, RunSettings, SpeedSettings

F = TypeVar("F", bound=Callable[..., Any])

_DEVICE_FIELDS = {name: one for name, one in options_of(DeviceSettings).items() if one.help}
#: The parameters that `device_options`, `model_options` and `speed_options` add to a command.
DEVICE_OPTIONS = ("devices", *_DEVICE_FIELDS)
MODEL_OPTIONS = ("model", "recipe", "gate", "revision", "offline", "max_download")
SPEED_OPTIONS = tuple(options_of(SpeedSettings))
#: Option -> how many times as fast it draws the demo model's pictures, and the points by which
#: fewer (-) or more (+) of them are right: docs/fast.md, which says how sure that is.
MEASURED: Mapping[str, tuple[float, float]] = {
    "--fast": (1.5, -0.6),
    "--guidance-interval 0 0.8": (1.1, 0.8),
    "--token-downsampling 2": (0.9, -1.6),
    "--cache-interval 2": (1.5, -0.8),
    "--tiny-vae": (0.9, -13.0),
}


def request_options(*names: str, help: str | None = None) -> Callable[[F], F]:
    """Add the options of these fields of a request, of its sampler or of its speed."""
    options = [
        OPTIONS[name] if help is None else replace(OPTIONS[name], help=help) for name in names
    ]
    return _all([_click_option(name, one) for name, one in zip(names, options, strict=True)])


def _click_option(name: str, one: Option) -> Callable[[F], F]:
    """Return click's option of a field; its value is None where it is not given."""
    flags, kind = one.flags, one.kind
    attributes: dict[str, Any] = {"type": int}
    if not flags:
        word = name.replace("_", "-")
        flags = (f"--{word}/--no-{word}",) if isinstance(kind, Switch) else (f"--{word}",)
    if isinstance(kind, Choice) and isinstance(kind.names[0], str):
        attributes["type"] = click.Choice(kind.names)
    elif isinstance(kind, Interval):
        attributes |= {"type": (float, float), "metavar": "START END"}
    elif isinstance(kind, Number):
        attributes["type"] = float
    elif isinstance(kind, Switch):
        attributes = {"default": None}
    elif isinstance(kind, Folder):
        attributes["type"] = USER_PATH
    return click.option(*flags, name, help=_with_cost(flags[0], one.help), **attributes)


def _with_cost(flag: str, help: str) -> str:
    """Return the help with what the option was found to gain and to cost, before its default."""
    spelled = flag.partition("/")[0]
    measured = next((option for option in MEASURED if option.split()[0] == spelled), None)
    if measured is None:
        return help
    said, space, default = help.partition("  [")
    return f"{said} {_measured(measured)}{space}{default}"


def _all(options: Iterable[Callable[[F], F]]) -> Callable[[F], F]:
    """Return the decorator that adds options in this order."""

    def add(command: F) -> F:
        for option in reversed(list(options)):
            command = option(command)
        return command

    return add


def speed_options(command: F) -> F:
    """Add ``--fast`` and the options that it is made of."""
    start, end = (0.0, 1.0) if FAST.guidance_interval is None else FAST.guidance_interval
    fast = click.option(
        "--fast",
        is_flag=True,
        help=f"Sooner, and a little off: --guidance-interval {start:g} {end:g}"
        f" --token-downsampling {FAST.token_downsampling}"
        f" --cache-interval {FAST.cache_interval}. {_measured('--fast')}",
    )
    return fast(request_options(*SPEED_OPTIONS)(command))


def _measured(option: str) -> str:
    """Return what an option was found to gain and to cost, as a sentence."""
    faster, points = MEASURED[option]
    values = option.partition(" ")[2]
    which = f" with {values}" if values else ""
    # That model is small: what takes work from large pictures gains it nothing.
    gain = f"{faster:.1f} x as fast" if faster > 1.0 else "too small to gain time"
    return f"The demo model{which}: {gain}, prompt adherence {points:+.1f} points."


def size_option(name: str, help: str) -> Callable[[F], F]:
    """Return an option whose value is bytes, such as 3GB."""
    return click.option(
        name,
        metavar="SIZE",
        callback=lambda _context, option, text: (
            None if text is None else parse_size(text, option.opts[0])
        ),
        help=help,
    )


def memory_options(command: F) -> F:
    """Add ``--max-memory``, whose value is bytes, and ``--low-memory``."""
    options = [
        size_option("--max-memory", "Stay under so much memory, such as 3GB, at a cost in time."),
        click.option(
            "--low-memory",
            is_flag=True,
            help="Hold one piece of the UNet at a time: least memory, several times slower.",
        ),
    ]
    return _all(options)(command)


def download_option(command: F) -> F:
    """Add ``--max-download``, whose value is bytes."""
    default = f"{MAX_DOWNLOAD // 10**9}GB"
    help = f"Most that a download from the hub may bring.  [default: {default}]"
    return size_option("--max-download", help)(command)


def model_options(command: F) -> F:
    """Add the options that `model_folder` takes."""
    options = [
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
    return _all(options)(command)


def model_folder(model: str | None, *, quiet: bool = False, **options: Any) -> Path:
    """Return the model folder that `model_options` stand for, converted if need be.

    Raises as `sdvino.first_use.resolve.resolve` does. quiet: without a bar.
    """
    from sdvino.first_use.resolve import ModelOptions, resolve

    return resolve(model, ModelOptions(quiet=quiet, **options))


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
    """Add the options that `run_settings` takes, and ``--plugin``."""
    devices = click.option(
        "--device",
        "devices",
        multiple=True,
        metavar="[COMPONENT=]DEVICE",
        help="CPU, GPU, NPU, AUTO, HETERO:GPU,CPU ...; repeat with COMPONENT= for one part"
        f" ({', '.join(COMPONENTS)} or vae).  [default: {DeviceSettings().device}]",
    )
    options = [_click_option(name, one) for name, one in _DEVICE_FIELDS.items()]
    return plugin_option(_all([devices, *options])(command))


def run_settings(devices: Sequence[str], **fields: Any) -> RunSettings:
    """Turn the values of `device_options` into settings; raises RequestError for a wrong one."""
    given = {name: value for name, value in fields.items() if value is not None}
    named: dict[str, str] = {}
    for word in devices:
        component, separator, device = word.partition("=")
        if not separator:
            component, device = "default", word
        elif component in named:
            raise RequestError(f"--device names {component} twice; give each component once.")
        named[component] = device
    settings = RunSettings(default=DeviceSettings(**given))
    return settings.on(named) if named else replace(settings, any_device=True)


def taken(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take the parameters ``names`` out of a command's."""
    return {name: options.pop(name) for name in names}
