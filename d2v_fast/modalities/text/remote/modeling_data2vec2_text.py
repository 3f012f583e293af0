"""The text encoder of data2vec 2.0 (arXiv 2212.07525) for Transformers, in plain PyTorch.

Names of tensors are those of the checkpoints of the published code, without the decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from .configuration_data2vec2_text import Data2Vec2TextConfig
from .modeling_data2vec2_blocks import Data2Vec2Block, init_weights

EPS = 1e-5
# row of the position table that the first token has, after padding's
FIRST_ROW = 2


class Data2Vec2Embeddings(nn.Module):
    """The normalized sum of token and position embeddings."""

    def __init__(self, config: Data2Vec2TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layernorm_embedding = nn.LayerNorm(config.hidden_size, eps=EPS)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Map tokens `[B, T]` to `[B, T, D]`; positions count the tokens that are not padding."""
        most = self.embed_positions.num_embeddings - FIRST_ROW
        if tokens.shape[1] > most:
            raise ValueError(f"`input_ids` must be [B, T] with T <= {most}, but T is {tokens.shape[1]} instead.")
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0) + FIRST_ROW
        return self.dropout(self.layernorm_embedding(self.embed_tokens(tokens) + self.embed_positions(positions)))


class Data2Vec2TextEncoder(nn.Module):
    """Everything before the blocks."""

    def __init__(self, config: Data2Vec2TextConfig) -> None:
        super().__init__()
        self.local_encoder = Data2Vec2Embeddings(config)


class Data2Vec2TextPreTrainedModel(PreTrainedModel):
    """What the models of this file share."""

    config_class = Data2Vec2TextConfig
    base_model_prefix = "data2vec2_text"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["Data2Vec2Block"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        else:
            init_weights(module, self.config.initializer_range)


class Data2Vec2TextModel(Data2Vec2TextPreTrainedModel):
    """The encoder. It reads whole texts: masks, noise and decoder belong to pre-training."""

    def __init__(self, config: Data2Vec2TextConfig) -> None:
        super().__init__(config)
        self.modality_encoders = nn.ModuleDict({"TEXT": Data2Vec2TextEncoder(config)})
        self.blocks = nn.ModuleList(Data2Vec2Block(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token table."""
        return self.modality_encoders["TEXT"].local_encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.modality_encoders["TEXT"].local_encoder.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput | tuple:
        """Encode texts.

        Args:
            input_ids: int64 `[B, T]`, begin and end token included, padded on either side.
            attention_mask: `[B, T]`, 1 at tokens and 0 at padding; None finds the padding token.
            output_hidden_states: Also return the input of the first block and every block's output.
            return_dict: False returns a tuple.
        Returns:
            `last_hidden_state` `[B, T, D]`, without meaning at padding.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        x = self.modality_encoders["TEXT"].local_encoder(input_ids, attention_mask)
        bias = x.new_zeros(attention_mask.shape).masked_fill(attention_mask == 0, torch.finfo(x.dtype).min)
        states = [x]
        for block in self.blocks:
            x = block(x, bias[:, None, None, :])
            if output_hidden_states:
                states.append(x)
        output = BaseModelOutput(last_hidden_state=x, hidden_states=tuple(states) if output_hidden_states else None)
        return output.to_tuple() if return_dict is False else output


class Data2Vec2ClassificationHead(nn.Module):
    """Two linear maps of the pooled output, with a tanh between them."""

    def __init__(self, config: Data2Vec2TextConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        """Map `[B, D]` to `[B, labels]`."""
        x = torch.tanh(self.dense(self.dropout(features)))
        return self.out_proj(self.dropout(x))


class Data2Vec2TextForSequenceClassification(Data2Vec2TextPreTrainedModel):
    """The encoder with a classifier on the first token, or on the mean of the tokens."""

    def __init__(self, config: Data2Vec2TextConfig) -> None:
        super().__init__(config)
        self.data2vec2_text = Data2Vec2TextModel(config)
        self.classifier = Data2Vec2ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput | tuple:
        """Classify texts.

        Args:
            input_ids, attention_mask, output_hidden_states, return_dict: See `Data2Vec2TextModel`.
            labels: int64 `[B]`; with a single label, the values of a regression `[B]`.
        Returns:
            `logits` `[B, labels]`, and the loss if labels are given.
        """
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        encoded = self.data2vec2_text(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        logits = self.classifier(self.pooled(encoded.last_hidden_state, attention_mask == 0))
        loss = None
        if labels is not None:
            is_regression = self.config.num_labels == 1
            loss = (
                F.mse_loss(logits[:, 0], labels.to(logits.dtype)) if is_regression else F.cross_entropy(logits, labels)
            )
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output.to_tuple() if return_dict is False else output

    def pooled(self, hidden: Tensor, is_padding: Tensor) -> Tensor:
        """Map `[B, T, D]` and bool `[B, T]` to what the classifier reads, `[B, D]`."""
        if self.config.pooling == "token":
            return hidden[:, 0]
        return hidden.masked_fill(is_padding[:, :, None], 0.0).sum(1) / (~is_padding).sum(1)[:, None].to(hidden.dtype)
