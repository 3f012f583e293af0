"""Encoded images, and data sets of folders of them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from d2v_fast.config import VisionConfig
from d2v_fast.modalities.vision.batches import image_dataset
from d2v_fast.modalities.vision.decode import Limits, center_box, read_square
from d2v_fast.modalities.vision.images import ImagesDataset

LIMITS = Limits(max_pixels=64_000_000, max_bytes=256_000_000, min_side=2)


def make_config(folder: Path, channels: int = 3, image_size: int = 16, **data: object) -> VisionConfig:
    data = {"kind": "images", "path": str(folder), "num_workers": 0, "mean": [0.5], "std": [0.25], **data}
    model = {"image_size": image_size, "patch_size": image_size // 4, "channels": channels}
    return VisionConfig.model_validate({"model": model, "mask": {"num_patches": 10, "min_patches": 4}, "data": data})


def make_dataset(folder: Path, channels: int = 3, image_size: int = 16, **data: object) -> ImagesDataset:
    config = make_config(folder, channels, image_size, **data)
    dataset = image_dataset(config)
    assert isinstance(dataset, ImagesDataset)
    return dataset


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Return a smooth, colorful image, which JPEG and resizing change little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def levels(path: Path, size: int = 16, channels: int = 3) -> np.ndarray:
    return np.asarray(read_square(str(path), size, channels, center_box, LIMITS)).astype(int)


def expected_levels(image: Image.Image, size: int = 16) -> np.ndarray:
    left, top, width, height = center_box(*image.size)
    box = (left, top, left + width, top + height)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box)).astype(int)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
