"""Configuration of the text encoder of data2vec 2.0."""

from __future__ import annotations

from transformers import PretrainedConfig


class Data2Vec2TextConfig(PretrainedConfig):
    """Sizes and rates of the encoder. The defaults are those of the published Base model.

    Args:
        vocab_size: Rows of the token table.
        max_position_embeddings: Rows of the position table, two more than the longest text has tokens: the first token
            has row 2.
        pad_token_id: Its row of the token table is zero.
        hidden_size, intermediate_size, num_attention_heads, num_hidden_layers: Sizes of the blocks.
        layer_norm_eps: Of the norms of the blocks; that of the embeddings has 1e-5.
        hidden_dropout_prob, attention_probs_dropout_prob, activation_dropout: Rates of dropout on the branches, on the
            attention weights, and inside the MLP.
        embedding_dropout: Rate of dropout of the embeddings.
        classifier_dropout: Rate of dropout before and inside a classifier.
        pooling: What a classifier reads: the begin "token", or the "mean" of all tokens.
        initializer_range: Deviation of new weights.
    """

    model_type = "data2vec2-text"

    def __init__(
        self,
        vocab_size=50265,
        max_position_embeddings=514,
        pad_token_id=1,
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=12,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        activation_dropout=0.0,
        embedding_dropout=0.1,
        classifier_dropout=0.0,
        pooling="token",
        initializer_range=0.02,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.activation_dropout = activation_dropout
        self.embedding_dropout = embedding_dropout
        self.classifier_dropout = classifier_dropout
        self.pooling = pooling
        self.initializer_range = initializer_range
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id
