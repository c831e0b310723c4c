"""What was measured and learnt on this machine about one model, kept between runs.

A profile is a JSON file in the user's cache folder. It belongs to a machine (processor, cores,
GPUs, operating system), an OpenVINO version and a model: with another of any, none is found.
Whoever deletes or damages it loses the measurements, never the work.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import openvino as ov

from sdvino.errors import SdvinoError
from sdvino.folder.index import ModelFolder
from sdvino.folder.manifest import MANIFEST_FILE
from sdvino.inputs.files import MAX_JSON_BYTES, read_bytes, read_json, replace_file
from sdvino.inputs.ir import read_xml
from sdvino.runtime.cache import cache_key, default_cache_dir
from sdvino.runtime.core import shared_core
from sdvino.runtime.topology import read_cpu
from sdvino.settings import DeviceSettings, GuidanceMode

_log = logging.getLogger("sdvino")
_FORMAT = 1
#: What a profile says about running a component; the rest of `DeviceSettings` is the user's.
TUNED_FIELDS = (
    "device",
    "num_threads",
    "num_streams",
    "core_type",
    "pinning",
    "hyper_threading",
    "precision",
    "linear_kernel",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """Whose profile it is."""

    #: In words: processor, cores, GPUs and operating system.
    machine: str
    openvino: str
    #: SHA-256 of the manifest, or of what stands for it.
    model: str

    @property
    def file_name(self) -> str:
        """The name of the profile's file."""
        return cache_key(self.machine, self.openvino, self.model) + ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedComponent:
    """The fastest settings found for a component."""

    #: Fields of `TUNED_FIELDS`; what is not here is left at its default.
    settings: Mapping[str, Any]
    #: Seconds of one run with them, and with the defaults.
    seconds: float
    default_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """A component gave wrong numbers, or was slow, and where it runs since."""

    #: Where it was, and in which precision (None: the device's choice).
    from_device: str
    from_precision: str | None
    device: str
    precision: str
    #: What was seen, as in "it gave values that are not numbers".
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The content of a profile's file."""

    key: ProfileKey
    #: The model's name, for people.
    name: str
    #: When it was tuned, YYYY-MM-DD; None: it never was.
    tuned: str | None = None
    #: Of the pictures that it was tuned for.
    width: int | None = None
    height: int | None = None
    components: Mapping[str, TunedComponent] = field(default_factory=dict)
    #: "batch", "sequential" or "streams"; None: not measured.
    guidance_mode: GuidanceMode | None = None
    #: Component -> where it runs instead.
    fallbacks: Mapping[str, Fallback] = field(default_factory=dict)
    #: Component and device (`unet on GPU`) -> how a first comparison with the CPU went well.
    trusted: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps({"format_version": _FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Profile:
        """Take a parsed file; raises KeyError, TypeError or ValueError where it is none of ours."""
        if value["format_version"] != _FORMAT:
            raise ValueError("another format")
        components = {
            str(name): TunedComponent(
                settings=_checked_settings(entry["settings"]),
                seconds=float(entry["seconds"]),
                default_seconds=float(entry["default_seconds"]),
            )
            for name, entry in value["components"].items()
        }
        fallbacks = {str(name): Fallback(**entry) for name, entry in value["fallbacks"].items()}
        for fallback in fallbacks.values():
            _checked_settings({"device": fallback.device, "precision": fallback.precision})
        if value["guidance_mode"] not in (None, *get_args(GuidanceMode)):
            raise ValueError("no way to guide")
        return cls(
            key=ProfileKey(**value["key"]),
            name=str(value["name"]),
            tuned=None if value["tuned"] is None else str(value["tuned"]),
            width=value["width"],
            height=value["height"],
            components=components,
            guidance_mode=value["guidance_mode"],
            fallbacks=fallbacks,
            trusted={str(name): str(text) for name, text in value["trusted"].items()},
        )


class ProfileStore:
    """The profiles of this user."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_cache_dir() / "profiles" if folder is None else folder

    def read(self, key: ProfileKey, name: str = "") -> Profile:
        """Return the profile of ``key``; an empty one for the model ``name`` where none is."""
        found = self._load(self.folder / key.file_name)
        return found if found is not None and found.key == key else Profile(key=key, name=name)

    def write(self, profile: Profile) -> bool:
        """Keep ``profile``; return whether that worked."""
        path = self.folder / profile.key.file_name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, profile.to_json())
        except OSError as error:
            _log.info("The profile cannot be written to %s (%s).", path, error.strerror)
            return False
        return True

    def all(self) -> list[Profile]:
        """Return every profile that can be read, by name."""
        try:
            paths = sorted(self.folder.glob("*.json"))
        except OSError:
            return []
        found = [profile for path in paths if (profile := self._load(path)) is not None]
        return sorted(found, key=lambda profile: profile.name)

    def _load(self, path: Path) -> Profile | None:
        try:
            if not os.path.lexists(path):
                return None
            return Profile.from_dict(read_json(path, path.name))
        except (OSError, SdvinoError, KeyError, TypeError, ValueError, AttributeError):
            _set_aside(path)
            return None


def _set_aside(path: Path) -> None:
    """Give a damaged profile another name: it is said once, and the next one can be written."""
    aside = path.with_name(f"{path.stem}.damaged")
    if path.parent.is_symlink():  # what lies elsewhere is not ours to move
        return
    try:
        path.replace(aside)
    except OSError as error:
        _log.info("The profile %s cannot be read, nor moved (%s).", path, error.strerror)
        return
    _log.warning(
        "What was measured on this machine is damaged and was set aside (%s); `sdvino tune`"
        " measures again.",
        aside,
    )


class ProfileMemory:
    """One profile, read once, to which things learnt are added as they come."""

    def __init__(self, store: ProfileStore, key: ProfileKey, name: str) -> None:
        self.store = store
        self.profile = store.read(key, name)
        self._key, self._name = key, name

    def remember(self, component: str, fallback: Fallback) -> None:
        """Keep where ``component`` runs from now on."""
        latest = self.store.read(self._key, self._name)
        self._write(replace(latest, fallbacks={**latest.fallbacks, component: fallback}))

    def trust(self, component: str, device: str, how: str) -> None:
        """Keep that ``component`` was compared with the CPU on ``device`` and did well."""
        latest = self.store.read(self._key, self._name)
        self._write(replace(latest, trusted={**latest.trusted, f"{component} on {device}": how}))

    def trusts(self, component: str, device: str) -> bool:
        """Return whether that comparison was made before."""
        return f"{component} on {device}" in self.profile.trusted

    def _write(self, profile: Profile) -> None:
        self.profile = profile
        self.store.write(profile)


def profile_key(folder: ModelFolder, core: ov.Core | None = None) -> ProfileKey:
    """Return the key of ``folder`` on this machine."""
    return ProfileKey(
        machine=machine_name(core), openvino=str(ov.get_version()), model=model_hash(folder)
    )


def machine_name(core: ov.Core | None = None) -> str:
    """Describe this machine as far as speed depends on it."""
    core = shared_core() if core is None else core
    names = [_full_name(core, device) for device in core.available_devices]
    cpu = read_cpu()
    counts = [cpu.performance_cores, cpu.efficient_cores, cpu.low_power_cores]
    cores = "+".join(str(count) for count in counts if count)
    granted = cpu.usable if cpu.quota is None else min(cpu.usable, cpu.quota)
    threads = f"{granted} of {cpu.threads} threads"
    return f"{', '.join(names)}; {cores} cores, {threads}; {platform.system()}"


def _full_name(core: ov.Core, device: str) -> str:
    try:
        return str(core.get_property(device, "FULL_DEVICE_NAME")).strip()
    except RuntimeError:  # a device that does not answer is not run on either
        return device


def model_hash(folder: ModelFolder) -> str:
    """Return what tells ``folder`` from other models: its manifest, which lists every checksum.

    Without a manifest, the graphs and the sizes of their weights.
    """
    digest = hashlib.sha256()
    manifest = folder.path / MANIFEST_FILE
    if folder.manifest is not None:
        digest.update(read_bytes(manifest, MANIFEST_FILE, limit=MAX_JSON_BYTES))
        return digest.hexdigest()
    for name, files in sorted(folder.components.items()):
        digest.update(f"{name}\0{files.bytes}\0".encode())
        digest.update(read_xml(files.xml, name))
    return digest.hexdigest()


def _checked_settings(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``value`` once `DeviceSettings` has taken it; raises TypeError or ValueError."""
    settings = {str(name): entry for name, entry in value.items()}
    if not set(settings) <= set(TUNED_FIELDS):
        raise ValueError("a setting that is not tuned")
    DeviceSettings(**settings)
    return settings
