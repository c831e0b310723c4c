"""Plugins that vendors make for OpenVINO: a library becomes a device of this process.

OpenVINO loads devices from libraries; a board whose vendor ships one (an FPGA card, say) is reached
by naming it. Source: OpenVINO, ov::Core::register_plugin.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import openvino as ov

from sdvino.errors import DeviceError
from sdvino.inputs.files import user_path
from sdvino.runtime.core import shared_core, short_reason

#: Devices that OpenVINO itself brings, or makes of others.
OWN_DEVICES = frozenset({"CPU", "GPU", "NPU", "AUTO", "HETERO", "MULTI", "BATCH"})
_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,31}")

#: Device -> library, of the shared core.
_registered: dict[str, Path] = {}


def parse_plugin(text: str) -> tuple[str, Path]:
    """Return name and library of ``NAME=LIBRARY``; raises DeviceError for anything else."""
    name, separator, library = text.partition("=")
    if not separator or not library.strip():
        raise DeviceError(
            f"--plugin {text} is not understood; write NAME=LIBRARY, such as"
            " --plugin FPGA=libvendor_plugin.so."
        )
    return name, user_path(library.strip())


def register_plugins(plugins: Mapping[str, str | Path]) -> None:
    """Make the devices ``plugins``, name to library, known to this process.

    The name is the plugin's own, or contains it; `--device` then takes it. Registering the same
    again does nothing. Raises DeviceError for a name that cannot be, a file that is none, and a
    library that does not load or finds no device.
    """
    for name, library in plugins.items():
        register_plugin(name, library)


def register_plugin(name: str, library: str | Path) -> str:
    """Make ``library`` the device ``name`` of this process; see `register_plugins`.

    Returns the name as `--device` takes it.
    """
    device = name.strip().upper()
    path = _checked(device, name, Path(library))
    if device in _registered:
        if _registered[device] == path:
            return device
        raise DeviceError(
            f"{device} is the plugin {_registered[device]} already; give the other one another name"
            f" that contains {device}, such as {device}2."
        )
    # Tried on a Core of its own: one that a plugin failed in cannot take the name again.
    _try(ov.Core(), device, path)
    shared_core().register_plugin(str(path), device)
    _registered[device] = path
    return device


def _checked(device: str, asked: str, library: Path) -> Path:
    if _NAME.fullmatch(device) is None:
        raise DeviceError(
            f"A plugin cannot be called {asked!r}; take letters, digits and _, such as FPGA."
        )
    if device in OWN_DEVICES:
        raise DeviceError(
            f"{device} is a device of OpenVINO's own; give the plugin another name that contains"
            f" its own, such as X{device}."
        )
    if not library.exists():
        raise DeviceError(f"There is no plugin {library}; give the path of the vendor's library.")
    if not library.is_file():
        raise DeviceError(f"{library} is no file; give the path of the plugin's library itself.")
    return library.resolve()


def _try(core: ov.Core, device: str, library: Path) -> None:
    try:
        core.register_plugin(str(library), device)
        core.get_property(device, "SUPPORTED_PROPERTIES")
    except RuntimeError as error:
        version = ov.get_version().partition("-")[0]
        raise DeviceError(
            f"{library} does not load as the plugin {device} ({short_reason(error)}); a plugin"
            f" must be built for the OpenVINO that is running, {version}, and its own name be part"
            " of the one given: get it for that version from its vendor."
        ) from error
    if not any(found.partition(".")[0] == device for found in core.available_devices):
        raise DeviceError(
            f"The plugin {device} loads but finds no device here; see that the board is plugged in"
            " and its driver is running."
        )
