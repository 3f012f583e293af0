"""Models of Transformers' BEiT, and the comparison of their features with ours."""

from __future__ import annotations

from typing import Any

import torch

from d2v_fast.modalities.vision.encoder import VisionModel

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 60}


def reference(**changes: Any) -> Any:
    """Return a random `Data2VecVisionModel` for images of 5 x 5 patches of 4 x 4 pixels."""
    import transformers

    options = {
        "image_size": 20,
        "patch_size": 4,
        "layer_norm_eps": 1e-6,
        "use_mask_token": True,
        "use_mean_pooling": False,
        "use_shared_relative_position_bias": True,
        **changes,
    }
    torch.manual_seed(0)
    theirs = transformers.Data2VecVisionModel(transformers.Data2VecVisionConfig(**SIZES, **options)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return theirs


@torch.no_grad()
def assert_same_features(model: VisionModel, theirs: Any, size: int = 20, masks: bool = True) -> None:
    model.eval()
    pixels = torch.randn(2, 3, size, size)
    masked = torch.rand(2, model.num_patches) < 0.5
    for mask in (None, masked) if masks else (None,):
        rows = None if mask is None else mask.flatten().nonzero()[:, 0]
        ours = model(pixels, rows).last_hidden
        their = theirs(pixels, bool_masked_pos=mask, output_hidden_states=True)
        assert (their.hidden_states[-1] - ours).abs().max() < 1e-5
        if isinstance(theirs.layernorm, torch.nn.LayerNorm):
            assert (their.last_hidden_state - model.norm(ours)).abs().max() < 1e-5


PER_BLOCK = {"use_shared_relative_position_bias": False, "use_relative_position_bias": True}


NEITHER = {"use_shared_relative_position_bias": False, "use_absolute_position_embeddings": True}


UNSCALED = {"layer_scale_init_value": 0.0}
