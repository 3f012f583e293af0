"""Mixed images: mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899) and random erasing (arXiv 1708.04896).

Neighbors in the order of an optimizer step form a pair, and each image of a pair is mixed with the other one. So the
result does not depend on how the step is divided among micro-steps and processes, and an even number of samples per
micro-step reads each image once.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d2v_fast.data.order import MicroStep
from d2v_fast.masking.streams import MIX, stream_keys, uniforms
from d2v_fast.modalities.vision.config_finetune import LabeledImagesConfig

__all__ = ["Mixing"]

# of an erased box: share of the area, and aspect ratio, which lies between this and its inverse
ERASE_AREA, ERASE_ASPECT = (0.02, 1 / 3), 0.3
ERASE_TRIES = 10
# epoch of the streams of erasing: those of mixing have the same purpose
_ERASING = 1 << 40


class Mixing:
    """Mix the images of a step.

    Args:
        data: which ways are used, and how often.
        num_classes: C.
    """

    def __init__(self, data: LabeledImagesConfig, num_classes: int) -> None:
        self._data, self._num_classes = data, num_classes
        self._mixes = data.mix_prob > 0 and (data.mixup > 0 or data.cutmix > 0)
        self.changes = self._mixes or data.erase_prob > 0

    def partners(self, micro: MicroStep) -> npt.NDArray[np.int64]:
        """Return the sample that each one of a micro-step is mixed with, int64 `[B]`; itself if none."""
        if not self._mixes:
            return micro.sample_ids
        return self._pairs(micro)[0]

    def apply(
        self,
        pixels: Tensor,
        read: npt.NDArray[np.int64],
        partners: npt.NDArray[np.int64],
        classes: npt.NDArray[np.int64],
        micro: MicroStep,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """Return images `[B, C, H, W]` and their targets: classes int64 `[B]`, or with mixing their shares fp32.

        Args:
            pixels: normalized fp32, of the samples `read`; changed in place.
            read: int64, ascending: the samples of the micro-step, and their partners.
            partners: int64 `[B]`, of `partners`.
            classes: int64, of all samples of the data set.
            micro: the micro-step.
            seed: of the run.
        """
        self._erase(pixels, read, micro.epoch, seed)
        own = np.searchsorted(read, micro.sample_ids)
        if not self._mixes:
            return pixels[torch.from_numpy(own)], torch.from_numpy(classes[micro.sample_ids])
        other = np.searchsorted(read, partners)
        mixed = pixels[torch.from_numpy(own)]
        shares = np.ones(len(own))
        # one draw for both images of a pair
        keys = stream_keys(seed, MIX, micro.epoch, self._pairs(micro)[1])
        numbers = uniforms(keys, 4)
        for row, (key, drawn) in enumerate(zip(keys.tolist(), numbers.tolist(), strict=True)):
            if drawn[0] < self._data.mix_prob and own[row] != other[row]:
                shares[row] = self._mix(mixed[row], pixels[int(other[row])], key, drawn[1:])
        targets = torch.zeros(len(own), self._num_classes)
        kept = torch.from_numpy(shares).float()[:, None]
        targets.scatter_add_(1, torch.from_numpy(classes[micro.sample_ids])[:, None], kept)
        targets.scatter_add_(1, torch.from_numpy(classes[partners])[:, None], 1 - kept)
        return mixed, targets

    def _pairs(self, micro: MicroStep) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return partners, and the first sample of each pair, whose stream decides how the pair is mixed."""
        step = micro.step_sample_ids
        places = np.argsort(step, kind="stable")
        own = places[np.searchsorted(step[places], micro.sample_ids)]
        other = own ^ 1
        # the last one of an odd number has no partner
        other = np.where(other < len(step), other, own)
        return step[other], step[np.minimum(own, other)]

    def _mix(self, image: Tensor, other: Tensor, key: int, drawn: list[float]) -> float:
        """Mix `other` into `image`, both `[C, H, W]`, in place; returns the share of `image` that is left."""
        data = self._data
        cuts = data.cutmix > 0 and (data.mixup == 0 or drawn[0] < 0.5)
        strength = data.cutmix if cuts else data.mixup
        share = float(np.random.Generator(np.random.Philox(key=key)).beta(strength, strength))
        if not cuts:
            image.mul_(share).add_(other, alpha=1 - share)
            return share
        height, width = image.shape[1:]
        side = math.sqrt(1 - share)
        top, bottom = _span(drawn[1], side, height)
        left, right = _span(drawn[2], side, width)
        image[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        return 1 - (bottom - top) * (right - left) / (height * width)

    def _erase(self, pixels: Tensor, read: npt.NDArray[np.int64], epoch: int, seed: int) -> None:
        """Replace a box of some images by normal noise, in place."""
        if self._data.erase_prob == 0:
            return
        keys = stream_keys(seed, MIX, epoch + _ERASING, read)
        numbers = uniforms(keys, 1 + 4 * ERASE_TRIES)
        height, width = pixels.shape[2:]
        for image, key, (chance, *drawn) in zip(pixels, keys.tolist(), numbers.tolist(), strict=True):
            if chance >= self._data.erase_prob:
                continue
            for start in range(0, len(drawn), 4):
                share, ratio, down, across = drawn[start : start + 4]
                area = height * width * (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * share)
                aspect = ERASE_ASPECT ** (1 - 2 * ratio)
                tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if 0 < tall < height and 0 < wide < width:
                    top, left = int(down * (height - tall + 1)), int(across * (width - wide + 1))
                    noise = np.random.Generator(np.random.Philox(key=key)).standard_normal((len(image), tall, wide))
                    image[:, top : top + tall, left : left + wide] = torch.from_numpy(noise)
                    break


def _span(center: float, share: float, size: int) -> tuple[int, int]:
    """Return the ends of a stretch of a share of `size` around a point, cut at the edges."""
    middle, half = int(center * size), int(size * share) // 2
    return max(0, middle - half), min(size, middle + half)
