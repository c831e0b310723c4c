"""Samplers: pure generators, one file each, with diffusers' results.

Every sampler has the signature of ``Sampler`` and yields one ``SamplerStep`` for each of
the grid's steps. Nothing is shown, cancelled or previewed inside: whoever iterates does it.
"""

from __future__ import annotations

from sdvino.diffusion.samplers.ddim import sample_ddim
from sdvino.diffusion.samplers.dpmpp_2m import sample_dpmpp_2m, sample_dpmpp_2m_sde
from sdvino.diffusion.samplers.euler import sample_euler
from sdvino.diffusion.samplers.euler_ancestral import sample_euler_ancestral
from sdvino.diffusion.samplers.heun import sample_heun
from sdvino.diffusion.samplers.lcm import sample_lcm
from sdvino.diffusion.samplers.lms import sample_lms
from sdvino.diffusion.samplers.pndm import sample_pndm
from sdvino.diffusion.samplers.step import Sampler, SamplerStep
from sdvino.diffusion.samplers.tcd import sample_tcd
from sdvino.diffusion.samplers.unipc import sample_unipc
from sdvino.errors import RequestError
from sdvino.settings import SamplerName

__all__ = ["Sampler", "SamplerStep", "get_sampler"]

_SAMPLERS: dict[SamplerName, Sampler] = {
    "ddim": sample_ddim,
    "euler": sample_euler,
    "euler_ancestral": sample_euler_ancestral,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "unipc": sample_unipc,
    "lms": sample_lms,
    "pndm": sample_pndm,
    "lcm": sample_lcm,
    "tcd": sample_tcd,
}


def get_sampler(name: SamplerName) -> Sampler:
    """Return the generator function of sampler ``name``.

    Raises:
        RequestError: there is no such sampler.
    """
    if name not in _SAMPLERS:
        raise RequestError(f"Unknown scheduler {name!r}; choose one of: {', '.join(_SAMPLERS)}.")
    return _SAMPLERS[name]
