"""Inputs that are no files of a model: options, the environment, the cache, a work folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence

import click
from fuzz_draw import DRY_RUN, GENERATE, REAL, Draw, Plan
from fuzz_files import PLANTED, SECRET, files_under, make_fifo, make_socket
from fuzz_mutate import NINES
from fuzz_templates import DRAW

from sdvino.cli.main import cli

#: Seconds after which a command that takes an odd option and works is let go.
_ENOUGH = 20.0
_NOBODY = 54321
_BASE: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "generate": (("a red circle",), ("-m", "model", *DRAW, "-o", "picture.png")),
    "info": (("model",), ()),
    "convert": (("source", "out"), ("--dry-run",)),
    "devices": ((), ()),
    "models": ((), ()),
    "tune": ((), ("-m", "model", "--minutes", "0.005", "-q")),
    "bench": ((), ("-m", "model", "-n", "1", "--steps", "1", "--size", "64", "-q")),
}
#: How often each command, of eleven.
_COMMANDS = (*["generate"] * 4, *["convert"] * 3, "info", "devices", "models", "tune", "bench")
_TEXTS = (
    *("", " ", "\x1b]0;owned\x07\x1b[2J", "a\nb", "\udcff", "x" * 300, "x" * 100_000, "--", "-1"),
    *(
        "~nobody/x",
        "~nosuchuser",
        "%s",
        "a=b",
        "=",
        "unet=",
        "=CPU",
        "a/b",
        "../elsewhere",  # where a person says so, things may be written
        "(" * 2000,
    ),
)
_NUMBERS = (
    *(NINES, "-" + NINES, "1e400", "nan", "inf", "-inf", "-1", "0", "1", "7", "1e-320", "0x10"),
    *(
        "9223372036854775808",
        "18446744073709551615",
        "1_000",
        "\u0663",
        "1e308",
        "3.5",
        "2147483648",
    ),
)
#: None of them may be written to by accident: a fuzzer is often run by root.
_PATHS = (
    *("fifo", "loop", "dangling", "socket", "folder", "file", "missing/x", "file/x", "model"),
    *("/dev/zero", "/dev/null/x", "/proc/self/mem", "/proc/x", "fifo.png", "loop.png", "x.png"),
    *("\x1b[2J.png", "x" * 300 + ".png", "%d%d.png", "%.png", "folder.png", "source", "x.xyz"),
)
_PLACES = (
    *("", "relative", "/dev/null", "/dev/null/x", "/proc/x", "~nosuchuser", "fifo", "loop", "file"),
    *("x" * 300, "a\nb", "\x1b[2J", "\udcff"),
)
_ENVIRONMENT: Mapping[str, Sequence[str | None]] = {
    "HOME": (None, *_PLACES),
    "SDVINO_CACHE_DIR": (None, *_PLACES),
    "XDG_CACHE_HOME": _PLACES,
    # Not a FIFO: Python itself waits for it, before any of our lines.
    "PYTHONPATH": ("", "::", "/dev/null", "missing", "loop"),
    "LANG": (None, "C", "POSIX", "xx_YY.bogus", "tr_TR.UTF-8", ""),
    "LC_ALL": ("C", "POSIX", "xx_YY.bogus"),
    "TMPDIR": (None, "missing", "file", "x" * 300),
    "HF_HOME": _PLACES,
    "HF_HUB_CACHE": _PLACES,
    "COLUMNS": ("0", "-1", "nan", NINES),
    "OMP_NUM_THREADS": ("0", "-1", "nan", NINES),
    "PATH": (None, "", "relative"),
    "NO_COLOR": ("1",),
}
_MODULES = (
    *("numpy", "json", "torch", "openvino", "sdvino/__init__", "sdvino/convert/worker", "runpy"),
    *("sitecustomize", "usercustomize", "logging", "safetensors", "encodings/__init__"),
)


def flags(draw: Draw) -> Plan:
    """The options of a command, as click knows them, with values that nobody should give."""
    draw.copy(draw.templates.tiny, "model")
    draw.copy(draw.templates.source, "source")
    _odd_files(draw)
    rng = draw.rng
    name = "generate" if draw.healthy else rng.choice(_COMMANDS)
    words, options = map(list, _BASE[name])
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for _ in range(draw.times()):
        parameter = rng.choice(command.params)
        if isinstance(parameter, click.Option):
            options += _option(draw, parameter)
        elif words:
            words[rng.randrange(len(words))] = rng.choice((*_TEXTS, *_PATHS))
    draw.note("command", " ".join(words + options)[:200])
    return Plan((name, *words, *options), enough=_ENOUGH)


def _option(draw: Draw, option: click.Option) -> list[str]:
    rng = draw.rng
    name = rng.choice((*option.opts, *option.secondary_opts))
    if option.is_flag:
        return [name]
    if isinstance(option.type, click.Choice):
        values: Sequence[str] = (*map(str, option.type.choices), "", "nothing", "\x1b[2J")
    elif isinstance(option.type, click.Path):
        values = (*_PATHS, *_TEXTS)
    elif option.type.name in ("integer", "float"):
        values = _NUMBERS
    else:
        values = (*_TEXTS, *_NUMBERS, *_PATHS)
    # A day of tuning is right, and no use here.
    values = [
        value for value in values if option.name != "minutes" or value not in ("1", "7", "3.5")
    ]
    return [name, *(rng.choice(values) for _ in range(max(1, option.nargs)))]


def _odd_files(draw: Draw) -> None:
    """Make, in the current folder, what the odd paths name."""
    cwd = draw.room.cwd
    for ending in ("", ".png"):
        make_fifo(cwd / f"fifo{ending}")
        (cwd / f"loop{ending}").symlink_to(f"loop{ending}")
        (cwd / f"folder{ending}").mkdir()
    (cwd / "dangling").symlink_to("nothing-there")
    make_socket(cwd / "socket")
    (cwd / "file").write_bytes(b"x")


def environment(draw: Draw) -> Plan:
    """Variables that are missing or odd, in an interpreter of its own; and nobody's account."""
    draw.copy(draw.templates.tiny, "model")
    draw.copy(draw.templates.source, "source")
    _odd_files(draw)
    rng = draw.rng
    for _ in range(draw.times()):
        name = rng.choice(sorted(_ENVIRONMENT))
        value = rng.choice(_ENVIRONMENT[name])
        draw.note(name, repr(value)[:60])
        draw.environment.pop(name, None)
        if value is not None:
            draw.environment[name] = value
    reading: list[Sequence[str]] = [("devices",), ("info", "model"), DRY_RUN]
    # Without a cache folder of its own, a command that writes would write to the real one.
    writes = bool(draw.environment.get("SDVINO_CACHE_DIR"))
    command = GENERATE if draw.healthy else rng.choice([*reading, *([GENERATE] * 2 * writes)])
    if draw.chance(0.2) and _may_become_nobody():
        # An account without an entry, as in containers; its Python is this one, forked.
        for gone in ("HOME", "SDVINO_CACHE_DIR"):
            draw.environment.pop(gone, None)
        draw.note("user", str(_NOBODY))
        return Plan(rng.choice(reading), user=_NOBODY)
    return Plan(command, fresh=True)


def _may_become_nobody() -> bool:
    return sys.platform != "win32" and os.geteuid() == 0


def cache(draw: Draw) -> Plan:
    """Compiled models and profiles that are damaged."""
    # Entries are by the resolved path of the model: it is used in its place, by a link.
    (draw.room.cwd / "model").symlink_to(draw.templates.tiny)
    shutil.copytree(draw.templates.cache, draw.room.cache, dirs_exist_ok=True)
    profiles = draw.room.cache / "profiles"
    draw.damage(profiles if draw.chance(0.5) else draw.room.cache)
    commands = (GENERATE, GENERATE, ("devices",), ("tune", *_BASE["tune"][1]))
    # People keep caches on other disks by links.
    command = GENERATE if draw.healthy else draw.rng.choice(commands)
    return Plan(command, untouched=("cwd/model/",))


def work(draw: Draw) -> Plan:
    """A work folder that somebody left beside the target, with code, links and a wrong state."""
    draw.copy(draw.templates.source, "source")
    rng = draw.rng
    state = {
        "format_version": 1,
        "steps": {
            "metadata": {"key": "0" * 64, "files": {"float/model_index.json": [2, "0" * 64]}},
            "export unet": {"key": "1" * 64, "files": {"float/unet/openvino_model.xml": [0, ""]}},
        },
        "gate": None,
        "delivering": None,
    }
    partial = ".out.sdvino-partial"
    if draw.chance(0.15):
        return _planted(draw, partial)
    for name, value in (("state.json", state), ("plan.json", {"recipe": {}})):
        draw.write(f"{partial}/{name}", json.dumps(value).encode())
    if draw.chance(0.2):
        (draw.room.cwd / partial).rename(draw.room.outside / "work")
        (draw.room.cwd / partial).symlink_to("../outside/work")
        return Plan(rng.choice((DRY_RUN, REAL)), enough=8.0)
    draw.damage(draw.room.cwd / partial)
    return Plan(DRY_RUN)


def _planted(draw: Draw, partial: str) -> Plan:
    """Return a real conversion that finds code, or links, where it works; soon it has run it."""
    for name in draw.rng.sample(_MODULES, 3):
        for folder in (f"{partial}/", ""):
            draw.write(f"{folder}{name}.py", PLANTED.encode())
        draw.note(partial, f"{name}.py")
    kept = draw.room.outside / "kept"
    kept.mkdir()
    (kept / "kept.txt").write_text(SECRET, encoding="utf-8")
    for name in ("tmp", "model", "float", "logs", "lock"):
        if draw.chance(0.2):
            (draw.room.cwd / partial / name).symlink_to("../../outside/kept")
            draw.note(partial, f"{name} is a link outside")
    assert files_under(draw.room.cwd / partial)
    return Plan(REAL, enough=8.0)
