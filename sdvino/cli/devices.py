"""`sdvino devices`: what can run a model on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict

import click


@click.command("devices")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def devices_command(as_json: bool) -> None:
    """Show the devices that OpenVINO finds, the processor and the memory."""
    from sdvino.runtime.devices import describe_machine

    machine = describe_machine()
    if as_json:
        click.echo(json.dumps(asdict(machine), indent=2, default=str))
        return
    memory = machine.memory
    click.echo(f"OpenVINO {machine.openvino}")
    if memory.total is not None:
        free = "" if memory.available is None else f", {memory.available / 1e9:.1f} GB free"
        click.echo(f"memory {memory.total / 1e9:.1f} GB{free}")
    for device in machine.devices:
        click.echo(f"\n{device.device:6} {device.full_name}")
        if device.problem is not None:
            click.echo(f"       cannot be used: {device.problem}")
            continue
        click.echo(f"       arithmetic: {', '.join(device.precisions)}")
        for name, value in device.facts.items():
            click.echo(f"       {name}: {value}")
