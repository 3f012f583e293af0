"""Configuration of the speech encoder of data2vec 2.0."""

from __future__ import annotations

from transformers import PretrainedConfig


class Data2Vec2AudioConfig(PretrainedConfig):
    """Sizes and rates of the encoder. The defaults are those of the published Base model.

    Args:
        hidden_size, intermediate_size, num_attention_heads: Sizes of every block.
        num_context_layers: Blocks of the context encoder, before the others.
        num_hidden_layers: The other blocks.
        layer_norm_eps: Of the norms of context encoder and blocks; the others have 1e-5.
        conv_dim: Channels of the convolutions over the waveform.
        conv_kernel, conv_stride: Kernel and stride of each, in elements of its input.
        conv_pos_kernel_size, num_conv_pos_layers, num_conv_pos_groups: Of the positional convolutions.
        hidden_dropout_prob, attention_probs_dropout_prob, activation_dropout: Rates of dropout on the branches, on the
            attention weights, and inside the MLP.
        context_dropout: Rate of dropout after the context norm.
        layerdrop: Probability of skipping a block in training.
        final_dropout: Rate of dropout before a head.
        vocab_size, pad_token_id: Of the tokenizer of a model for CTC, whose blank is the padding token.
        ctc_loss_reduction, ctc_zero_infinity: As in `torch.nn.functional.ctc_loss`.
        classifier_proj_size: Width of the projection in a model that classifies recordings.
        initializer_range: Deviation of new weights, such as a head's.
    """

    model_type = "data2vec2-audio"

    def __init__(
        self,
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_context_layers=0,
        num_hidden_layers=12,
        layer_norm_eps=1e-5,
        conv_dim=512,
        conv_kernel=(10, 3, 3, 3, 3, 2, 2),
        conv_stride=(5, 2, 2, 2, 2, 2, 2),
        conv_pos_kernel_size=19,
        num_conv_pos_layers=5,
        num_conv_pos_groups=16,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        activation_dropout=0.0,
        context_dropout=0.1,
        layerdrop=0.05,
        final_dropout=0.0,
        vocab_size=32,
        pad_token_id=0,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=False,
        classifier_proj_size=256,
        initializer_range=0.02,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_context_layers = num_context_layers
        self.num_hidden_layers = num_hidden_layers
        self.layer_norm_eps = layer_norm_eps
        self.conv_dim = conv_dim
        self.conv_kernel = list(conv_kernel)
        self.conv_stride = list(conv_stride)
        self.conv_pos_kernel_size = conv_pos_kernel_size
        self.num_conv_pos_layers = num_conv_pos_layers
        self.num_conv_pos_groups = num_conv_pos_groups
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.activation_dropout = activation_dropout
        self.context_dropout = context_dropout
        self.layerdrop = layerdrop
        self.final_dropout = final_dropout
        self.vocab_size = vocab_size
        self.ctc_loss_reduction = ctc_loss_reduction
        self.ctc_zero_infinity = ctc_zero_infinity
        self.classifier_proj_size = classifier_proj_size
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id
