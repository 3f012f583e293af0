"""Configuration of the image encoder of data2vec 2.0."""

from __future__ import annotations

from transformers import PretrainedConfig


class Data2Vec2VisionConfig(PretrainedConfig):
    """Sizes and rates of the encoder. The defaults are those of ViT-B.

    Args:
        image_size, patch_size: Sides of the square image and of a patch, in pixels.
        num_channels: 3, or 1 for gray images.
        hidden_size, intermediate_size, num_attention_heads: Sizes of every block.
        num_context_layers: Blocks of the context encoder, before the others.
        num_hidden_layers: The other blocks.
        layer_norm_eps: Of all norms.
        hidden_dropout_prob, attention_probs_dropout_prob, activation_dropout: Rates of dropout on the branches, on the
            attention weights, and inside the MLP.
        initializer_range: Deviation of new weights, such as a classifier's.
        pooling: What a classifier reads: the "mean" of the patches, or the class "token".
    """

    model_type = "data2vec2-vision"

    def __init__(
        self,
        image_size=224,
        patch_size=16,
        num_channels=3,
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_context_layers=2,
        num_hidden_layers=10,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        activation_dropout=0.0,
        initializer_range=0.02,
        pooling="mean",
        **kwargs,
    ):
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_context_layers = num_context_layers
        self.num_hidden_layers = num_hidden_layers
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.activation_dropout = activation_dropout
        self.initializer_range = initializer_range
        self.pooling = pooling
        super().__init__(**kwargs)
