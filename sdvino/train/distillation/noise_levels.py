"""The diffusion process in torch: noise levels, and what a prediction means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdvino.diffusion.schedule import train_alphas_cumprod
from sdvino.diffusion.scheduler_config import SchedulerConfig
from sdvino.errors import RequestError
from sdvino.train.distillation.settings import check_steps

# Min-SNR (Hang et al. 2023).
_GAMMA = 5.0


class NoiseLevels:
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps for whole timesteps t; t = -1 is x0 itself.

    Timesteps are int64 tensors [n], latents float32 [n, C, h, w].
    """

    def __init__(self, scheduler: Mapping[str, Any], device: Any = "cpu") -> None:
        """``scheduler``: a scheduler_config.json."""
        import torch

        config = SchedulerConfig.from_dict(dict(scheduler)).for_sampler("ddim")
        self.prediction_type = config.prediction_type
        alphas = train_alphas_cumprod(config, keep_zero=True)
        if self.prediction_type == "epsilon" and alphas[-1] == 0.0:
            raise RequestError(
                "A model that predicts noise learns nothing where all is noise, as the scheduler of"
                " this one ends (rescale_betas_zero_snr); correct its scheduler_config.json."
            )
        self.train_timesteps = len(alphas)
        # The last entry, which -1 points at, is the picture.
        self._alphas = torch.from_numpy(np.append(alphas, np.float32(1.0))).to(device)

    def grid(self, steps: int) -> list[int]:
        """Return the timesteps of ``steps`` trailing DDIM steps, falling, and -1 at the end.

        They are those of `sdvino.diffusion.layout` for timestep_spacing trailing: each step of the
        sampler ends where the next begins. Raises RequestError where they do not divide evenly.
        """
        check_steps(steps, self.train_timesteps)
        stride = self.train_timesteps // steps
        return [stride * i - 1 for i in range(steps, -1, -1)]

    def split(self, t: Any) -> tuple[Any, Any]:
        """Return sqrt(a_t) and sqrt(1 - a_t), [n, 1, 1, 1]."""
        alphas = self._alphas[t][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def noised(self, x0: Any, noise: Any, t: Any) -> Any:
        """Return x_t."""
        a, s = self.split(t)
        return a * x0 + s * noise

    def x0_and_eps(self, output: Any, x: Any, t: Any) -> tuple[Any, Any]:
        """Return the picture and the noise that ``output``, of the UNet, sees in ``x`` at ``t``."""
        a, s = self.split(t)
        if self.prediction_type == "v_prediction":
            return a * x - s * output, a * output + s * x
        if self.prediction_type == "epsilon":
            return (x - s * output) / a, output
        return output, (x - a * output) / s

    def jump(self, output: Any, x: Any, t: Any, to: Any) -> Any:
        """Return DDIM's x at ``to`` (Song et al. 2021, equation 12, eta 0)."""
        x0, eps = self.x0_and_eps(output, x, t)
        a, s = self.split(to)
        return a * x0 + s * eps

    def x0_for_jump(self, x: Any, t: Any, x_to: Any, to: Any) -> Any:
        """Return the picture that a DDIM step from ``x`` must see in order to end at ``x_to``.

        Salimans & Ho 2022, "Progressive Distillation", algorithm 2.
        """
        a, s = self.split(t)
        a_to, s_to = self.split(to)
        return (x_to - s_to / s * x) / (a_to - s_to / s * a)

    def weights(self) -> NDArray[np.float64]:
        """Return how often each timestep is trained on when all are, float64 [T], of sum 1.

        Half by the Min-SNR weights of the model's prediction, half evenly.
        """
        alphas = self._alphas[:-1].double().cpu().numpy()
        snr = alphas / (1 - alphas)
        weights = np.minimum(snr, _GAMMA)
        if self.prediction_type == "v_prediction":
            weights = weights / (snr + 1)
        elif self.prediction_type == "epsilon":
            weights = weights / np.maximum(snr, 1e-12)
        result: NDArray[np.float64] = 0.5 * weights / weights.sum() + 0.5 / len(weights)
        return result


def draw_timesteps(
    weights: NDArray[np.float64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return ``count`` timesteps distributed as ``weights``, one from each stratum of them."""
    strata = (np.arange(count) + rng.random(count)) / count
    found = np.searchsorted(weights.cumsum(), strata)
    return np.minimum(found, len(weights) - 1).astype(np.int64)
