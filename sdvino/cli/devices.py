"""`sdvino devices`: what can run a model on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from sdvino.cli.options import plugin_option
from sdvino.cli.terminal import echo


@click.command("devices")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_option
def devices_command(as_json: bool) -> None:
    """Show the devices that OpenVINO finds, the processor and the memory."""
    from sdvino.compress.targets import target_of
    from sdvino.runtime.devices import describe_machine

    machine = describe_machine()
    if as_json:
        echo(json.dumps(asdict(machine), indent=2, default=str))
        return
    memory = machine.memory
    echo(f"OpenVINO {machine.openvino}")
    if memory.total is not None:
        free = "" if memory.available is None else f", {memory.available / 1e9:.1f} GB free"
        echo(f"memory {memory.total / 1e9:.1f} GB{free}")
    for device in machine.devices:
        echo(f"\n{device.device:6} {device.full_name}")
        if device.problem is not None:
            echo(f"       cannot be used: {device.problem}")
            continue
        echo(f"       arithmetic: {', '.join(device.precisions)}")
        for name, value in device.facts.items():
            echo(f"       {name}: {value}")
        for name, value in device.defaults.items():
            echo(f"       default {name}: {value}")
        target = target_of(device.device, machine.cpu.isa)
        if target is not None:
            echo(f"       convert for it: --target {target.name} ({target.summary})")
    if machine.profiles:
        echo("\nprofiles of this machine and OpenVINO")
        for line in machine.profiles:
            echo(f"       {line}")
    else:
        echo("\nno profile for this machine and OpenVINO yet; make one with `sdvino tune`")
