"""Configuration sections of the vision modality.

The defaults are the published ViT-B run (arXiv 2202.03555, section 4.1, and its released recipe).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from d2v_fast.config.errors import MAX_SIZE, MAX_WORKERS, PathText, Problem, Section, problem_of_heads, refuse_if
from d2v_fast.config.probe import ProbeConfig
from d2v_fast.config.schema import (
    D2VConfig,
    DataSection,
    GuardConfig,
    LossConfig,
    ModelSection,
    PretrainConfig,
    ScheduleConfig,
    TargetConfig,
    TeacherConfig,
)

# a rate of stochastic depth that uses the training code path and drops no sample
_NEVER = 1e-12


class ImageModelSection(ModelSection):
    """What every image encoder has.

    Attributes:
        image_size: Side of the square input in pixels.
        patch_size: Side of a patch in pixels; it divides `image_size`.
        channels: Color channels: 3, or 1 for gray.
    """

    required: ClassVar[tuple[str, ...]] = ()

    image_size: int = Field(default=224, ge=1, le=MAX_SIZE)
    patch_size: int = Field(default=16, ge=1, le=MAX_SIZE)
    channels: int = Field(default=3, ge=1, le=MAX_SIZE)

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches in the image, without the CLS token."""
        return self.grid_size**2

    def num_places(self, shape: Sequence[int]) -> int:
        """See `ModelSection`."""
        return self.num_patches

    @model_validator(mode="after")
    def _check_patches(self) -> Self:
        if self.image_size % self.patch_size:
            size = max(1, round(self.image_size / self.patch_size)) * self.patch_size
            hint = f"The nearest image size that fits is {size}."
            must = f"be a multiple of `patch_size` ({self.patch_size})"
            refuse_if([Problem("image_size", must, self.image_size, hint)])
        return self


class VisionModelConfig(ImageModelSection):
    """The image encoder: a Transformer on patches, with an attention bias for relative positions.

    Attributes:
        heads: Attention heads; they divide `width`.
        mlp_ratio: Hidden width of the MLP over `width`.
        drop_path: Rate of stochastic depth in the last block; it falls linearly to 0 at the first.
        attention_dropout: Dropout of attention weights.
        dropout: Dropout of tokens and branches.
        layer_scale: Initial factor on every residual branch.
        norm_eps: Added to the variance in every norm.
        absolute_position: Add learned position embeddings to the tokens. The published models have none; small models
            on small images learn faster with them.
        position_bias: One table of relative positions for all blocks ("shared", as in the published pre-training) or
            one per block (as in the published fine-tuned models).
        attention: On a GPU, "stock" is PyTorch's attention, "fused" the kernels of this library, which sum the gradient
            of the position bias over the batch, and "xformers" that package's; a CPU always uses PyTorch's.
        gradient_checkpointing: Recompute each block in the backward pass to save memory.
    """

    width: int = Field(default=768, ge=1, le=MAX_SIZE)
    depth: int = Field(default=12, ge=1, le=MAX_SIZE)
    heads: int = Field(default=12, ge=1, le=MAX_SIZE)
    mlp_ratio: float = Field(default=4.0, gt=0, le=MAX_SIZE)
    drop_path: float = Field(default=0.25, ge=0, lt=1)
    attention_dropout: float = Field(default=0.05, ge=0, lt=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    layer_scale: float = Field(default=1e-4, gt=0, le=1e6)
    norm_eps: float = Field(default=1e-6, gt=0, le=1)
    absolute_position: bool = False
    position_bias: Literal["shared", "per_block"] = "shared"
    attention: Literal["stock", "fused", "xformers"] = "stock"
    gradient_checkpointing: bool = False

    def without_skipping(self) -> Self:
        """See `ModelSection`."""
        return self.model_copy(update={"drop_path": min(self.drop_path, _NEVER)})

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = problem_of_heads(self.width, self.heads)
        if int(self.width * self.mlp_ratio) < 1:
            problems.append(Problem("mlp_ratio", "leave at least one hidden unit", self.mlp_ratio))
        refuse_if(problems)
        return self


class BlockMaskConfig(Section):
    """Rectangles of patches are masked until enough patches are.

    Attributes:
        kind: Kind of the masks.
        num_patches: Patches that are masked in an image.
        min_patches: Smallest area of a rectangle, in patches.
        max_patches: Largest area of a rectangle; null allows all that remain to be masked.
        min_aspect: Aspect ratios lie between this and its inverse.
    """

    kind: Literal["block"] = "block"
    num_patches: int = Field(default=120, ge=1)
    min_patches: int = Field(default=16, ge=1)
    max_patches: int | None = Field(default=None, ge=1, le=MAX_SIZE**2)
    min_aspect: float = Field(default=0.3, gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.min_patches > self.num_patches:
            problems.append(Problem("min_patches", f"be <= `num_patches` ({self.num_patches})", self.min_patches))
        if self.max_patches is not None and self.max_patches < self.min_patches:
            problems.append(Problem("max_patches", f"be >= `min_patches` ({self.min_patches})", self.max_patches))
        refuse_if(problems)
        return self


class VisionDataConfig(DataSection):
    """Where the images come from, and how they are augmented.

    Attributes:
        kind: "images" is a folder tree of image files, "digits" the sample set of scikit-learn.
        path: With "images": the folder.
        mean: Mean per channel that is subtracted, of pixels in [0, 1]; one value serves all channels.
        std: Standard deviation per channel that is divided by.
        crop_scale: Smallest and largest area of a random crop, as a share of the image.
        flip_prob: Probability of a horizontal flip.
        color_jitter: Strength of random brightness, contrast, saturation.
        rotation_degrees: Largest random rotation of a digit.
        zoom: Largest random change of a digit's size; 0.1 is 10 %.
        shift_pixels: Largest random shift of a digit.
        test_fraction: Share of the digits that is held out for the probe.
        max_image_pixels: An image with more pixels (width times height) counts as unreadable. A decoder needs up to 24
            bytes per pixel in each worker.
        max_image_bytes: A larger file counts as unreadable.
        min_image_side: An image with a shorter side in pixels counts as unreadable.
        follow_outside: Follow links that lead out of `path`; otherwise they are left out.
        resampler: What resizes a crop of whole pixels, with cubic filters against aliasing. "torch" resizes the crop by
            itself, as the published code does, in a third of the time; its levels may differ by one between kinds of
            processors. "pillow" also weighs pixels beyond the crop's edge, and gives the same levels everywhere. A JPEG
            that is decoded at half of its size or less, and an image without augmentation, always take "pillow".
        bit_depth: Bits of the values in PNG and TIFF files that store them in more, such as 12 in a 16-bit file. Null
            takes what a file records of itself, else all bits, and warns if the images are dark.
    """

    # keys that only one kind reads
    # for a user's own images, in a message
    own_preset: ClassVar[str] = "images_small"
    only_for: ClassVar[dict[str, tuple[str, ...]]] = {
        "digits": ("rotation_degrees", "zoom", "shift_pixels", "test_fraction"),
        "images": (
            *("crop_scale", "flip_prob", "color_jitter", "max_bad_fraction", "strict"),
            *("max_image_pixels", "max_image_bytes", "min_image_side", "follow_outside", "resampler"),
        ),
    }

    kind: Literal["digits", "images"] = "digits"
    path: PathText | None = None
    on_change: Literal["refuse", "accept"] = "refuse"
    num_workers: int = Field(default=2, ge=0, le=MAX_WORKERS)
    mean: tuple[float, ...] = Field(default=(0.485, 0.456, 0.406), strict=False)
    std: tuple[float, ...] = Field(default=(0.229, 0.224, 0.225), strict=False)
    crop_scale: tuple[float, float] = Field(default=(0.08, 1.0), strict=False)
    flip_prob: float = Field(default=0.5, ge=0, le=1)
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    rotation_degrees: float = Field(default=0.0, ge=0, le=180)
    zoom: float = Field(default=0.0, ge=0, lt=1)
    shift_pixels: float = Field(default=0.0, ge=0, le=MAX_SIZE)
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    strict: bool = False
    # Pillow refuses twice its own limit, whatever is asked for
    max_image_pixels: int = Field(default=64_000_000, ge=1, le=178_956_970)
    max_image_bytes: int = Field(default=256_000_000, ge=1, le=10**15)
    min_image_side: int = Field(default=2, ge=1, le=MAX_SIZE)
    follow_outside: bool = False
    resampler: Literal["torch", "pillow"] = "torch"
    bit_depth: int | None = Field(default=None, ge=1, le=16)

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.kind == "images" and not self.path:
            hint = "Name the folder that holds the images: `--set d2v.data.path=/my/images`."
            problems.append(Problem("path", 'be a folder with `kind` "images"', self.path, hint))
        if self.kind == "digits" and self.path is not None:
            hint = f'Your own images are `kind` "images", for which the preset `{self.own_preset}` is made.'
            problems.append(Problem("path", 'be null with `kind` "digits", a sample set', self.path, hint))
        if any(value <= 0 for value in self.std):
            problems.append(Problem("std", "be > 0 in every channel", self.std))
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            problems.append(Problem("crop_scale", "be [low, high] with 0 < low <= high <= 1", self.crop_scale))
        refuse_if(problems)
        return self


class VisionProbeConfig(ProbeConfig):
    """Probe of image features.

    Attributes:
        grid: Features are averaged over each cell of a `grid` x `grid` division of the image; 1 averages over all
            patches.
    """

    grid: int = Field(default=1, ge=1)


class ImageInputsConfig(D2VConfig):
    """What every run on images has."""

    modality: Literal["vision"] = "vision"
    model: ImageModelSection
    data: VisionDataConfig

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """See `D2VConfig`."""
        model, data = sections.get("model"), sections.get("data")
        yield from super().problems_across(sections)
        for name in ("mean", "std"):
            if model and data and len(getattr(data, name)) not in (1, model.channels):
                hint = f"One value per channel (`d2v.model.channels` is {model.channels}), or a single one for all."
                yield Problem(f"data.{name}", f"hold {model.channels} values", getattr(data, name), hint)

    def problems_of_a_run(self) -> list[Problem]:
        """See `D2VConfig`."""
        if self.data.kind != "digits" or self.model.channels == 1:
            return []
        must = 'be 1 with `d2v.data.kind` "digits"'
        return [Problem("model.channels", must, self.model.channels, "The digits are gray.")]


class ImagesConfig(ImageInputsConfig, PretrainConfig):
    """What every pre-training on images has."""

    # the first base has it of any run
    guard: GuardConfig = GuardConfig()
    probe: VisionProbeConfig

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        """See `D2VConfig`."""
        model, probe = sections.get("model"), sections.get("probe")
        yield from super().problems_across(sections)
        if model and probe and probe.grid > model.grid_size:
            must = f"be in [1, {model.grid_size}]"
            hint = f"An image has {model.grid_size} x {model.grid_size} patches."
            yield Problem("probe.grid", must, probe.grid, hint)


class VisionConfig(ImagesConfig):
    """Images. The defaults are the published ViT-B run."""

    objective: Literal["data2vec"] = "data2vec"
    model: VisionModelConfig = VisionModelConfig()
    mask: BlockMaskConfig = BlockMaskConfig()
    target: TargetConfig = TargetConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    schedule: ScheduleConfig = ScheduleConfig(epochs=800, warmup_epochs=10, final_lr_ratio=0.005)
    data: VisionDataConfig = VisionDataConfig()
    probe: VisionProbeConfig = VisionProbeConfig()

    @classmethod
    def problems_across(cls, sections: Mapping[str, Any]) -> Iterator[Problem]:
        model, mask = sections.get("model"), sections.get("mask")
        if model and mask and mask.num_patches >= model.num_patches:
            must = f"be in [1, {model.num_patches - 1}]"
            hint = f"An image has {model.grid_size} x {model.grid_size} patches, and at least one must stay visible."
            yield Problem("mask.num_patches", must, mask.num_patches, hint)
        yield from super().problems_across(sections)
