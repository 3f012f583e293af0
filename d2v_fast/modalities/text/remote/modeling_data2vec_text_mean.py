"""A classifier of texts on the mean of their tokens, for Transformers, in plain PyTorch.

Encoder and head are those of `Data2VecTextForSequenceClassification`, whose head reads the first token alone.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from transformers import Data2VecTextForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration_data2vec_text_mean import Data2VecTextMeanConfig


class Data2VecTextMeanForSequenceClassification(Data2VecTextForSequenceClassification):
    """The encoder with a classifier on the mean of the tokens."""

    config_class = Data2VecTextMeanConfig

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
            input_ids: int64 `[B, T]`, begin and end token included, padded on either side.
            attention_mask: `[B, T]`, 1 at tokens and 0 at padding; None finds the padding token.
            labels: int64 `[B]`; with a single label, the values of a regression `[B]`.
            output_hidden_states: Also return the embeddings and every block's output.
            return_dict: False returns a tuple.
        Returns:
            `logits` `[B, labels]`, and the loss if labels are given.
        """
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        encoded = self.data2vec_text(
            input_ids, attention_mask=attention_mask, output_hidden_states=output_hidden_states, return_dict=True
        )
        hidden, is_padding = encoded.last_hidden_state, attention_mask == 0
        mean = hidden.masked_fill(is_padding[:, :, None], 0.0).sum(1) / (~is_padding).sum(1)[:, None].to(hidden.dtype)
        # the head reads the first of the places that it is given
        logits = self.classifier(mean[:, None])
        loss = None
        if labels is not None:
            is_regression = self.config.num_labels == 1
            loss = (
                F.mse_loss(logits[:, 0], labels.to(logits.dtype)) if is_regression else F.cross_entropy(logits, labels)
            )
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output.to_tuple() if return_dict is False else output
