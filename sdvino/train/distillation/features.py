"""What the blocks of a teacher and its student give, for a loss on it."""

from __future__ import annotations

from typing import Any


class Features:
    """Keeps the last output of each block of a teacher and of a student.

    Blocks are those on the way down, in the middle and on the way up, where both have one.
    """

    def __init__(self, teacher: Any, student: Any) -> None:
        names = [name for name in block_names(teacher) if name in block_names(student)]
        self.teacher: dict[str, Any] = {}
        self.student: dict[str, Any] = {}
        self._handles = [
            module.get_submodule(name).register_forward_hook(_keeper(kept, name))
            for module, kept in ((teacher, self.teacher), (student, self.student))
            for name in names
        ]

    def close(self) -> None:
        """Take the hooks off, and forget what they kept."""
        for handle in self._handles:
            handle.remove()
        self.teacher.clear()
        self.student.clear()


def block_names(unet: Any) -> list[str]:
    """Return the names of the blocks of diffusers' UNet2DConditionModel."""
    names = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    if unet.mid_block is not None:
        names.append("mid_block")
    return names + [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]


def feature_loss(features: Features) -> Any:
    """Return the mean over the blocks of ||student - teacher||^2 / ||teacher||^2, a tensor.

    Blocks whose shapes differ are left out.
    """
    import torch

    losses = []
    for name, wanted in features.teacher.items():
        given = features.student.get(name)
        if given is not None and given.shape == wanted.shape:
            scale = wanted.float().square().mean().clamp_min(1e-12)
            losses.append((given.float() - wanted.float()).square().mean() / scale)
    return torch.stack(losses).mean()


def _keeper(kept: dict[str, Any], name: str) -> Any:
    def keep(module: Any, args: Any, output: Any) -> None:
        # The way down gives its states, and those of the skips.
        kept[name] = output[0] if isinstance(output, tuple) else output

    return keep
