"""Read and write text checkpoints of fairseq's data2vec 2.0, without importing fairseq."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2v_fast.config import MaskedTextConfig, MaskedTextModelConfig
from d2v_fast.errors import OptionError
from d2v_fast.interop.fairseq_multi import Kind, Parts, dimension
from d2v_fast.interop.fairseq_multi_model import MultiModel
from d2v_fast.interop.fairseq_recipe import Gathered
from d2v_fast.modalities.text.config import POSITION_OFFSET
from d2v_fast.modalities.text.encoder2 import MaskedTextModel
from d2v_fast.modalities.text.fairseq import SPECIAL_IDS, check_ids
from d2v_fast.modalities.text.layout2 import ROWS, TOKENS, masked_text_layout

KIND = Kind(
    name="TEXT",
    wanted="a data2vec 2.0 text model",
    fine_tuned="model.",
    arguments="pretrained_model_args",
    encoder={
        "num_extra_tokens": 0,
        # fairseq averages the main blocks only, and this library all of them
        "prenet_depth": 0,
        "use_alibi_encoder": False,
        "learned_pos": True,
        "no_scale_embedding": True,
        "layernorm_embedding": True,
        "no_token_positional_embeddings": False,
    },
    step={"ema_local_encoder": False, "mask_length": 1, "inverse_mask": False},
    model_step={"ema_encoder_only": True, "cls_loss": 0.0},
    known=frozenset({"max_source_positions", "dropout"}),
    averages_blocks_only=True,
)


def _values(parts: Parts, own: Mapping[str, Any], task: Mapping[str, Any], gathered: Gathered) -> dict[str, Any]:
    """Return the sizes of the tables, which the tensors show.

    Raises:
        ValueError: The embeddings have another dropout than the blocks.
    """
    dropout = gathered.values["dropout"]
    if own.get("dropout", dropout) != dropout:
        raise ValueError(
            f"`modalities.text.dropout` must be as `encoder_dropout` ({dropout}), because there is one rate for both "
            f"here, but is {own['dropout']} instead."
        )
    return {
        "vocab_size": dimension(parts.encoder, TOKENS, 0),
        "padding_id": SPECIAL_IDS[1],
        "max_positions": dimension(parts.encoder, ROWS, 0) - POSITION_OFFSET,
    }


def _own(config: MaskedTextConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of `modalities.text` that only text has, and the section `task`."""
    model = config.model
    own = {"mask_length": 1, "max_source_positions": model.max_positions, "dropout": model.dropout}
    task = {"_name": "masked_lm", "data": "", "tokens_per_sample": config.data.block_size, "rebuild_batches": True}
    return own, {**task, "skip_masking": True, "d2v2_multi": True}


def _sections(own: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the sections of a run's configuration need besides the shared keys."""
    longest = own.get("max_source_positions")
    return {} if longest is None else {"data": {"block_size": longest}}


def _check(config: MaskedTextConfig) -> None:
    """Refuse what fairseq's dictionaries or its average cannot hold."""
    sizes = config.model
    if sizes.padding_row != SPECIAL_IDS[1]:
        raise OptionError(
            f"`d2v.model.padding_id` must be {SPECIAL_IDS[1]} for fairseq, as in all its dictionaries, but is "
            f"{sizes.padding_row} instead. Export with `--format transformers`."
        )
    if sizes.context_depth:
        raise OptionError(
            f"`d2v.model.context_depth` must be 0 for fairseq, whose teacher averages no context block of text, but is "
            f"{sizes.context_depth} instead."
        )
    check_ids(config)


MODEL = MultiModel(
    kind=KIND,
    config=MaskedTextModelConfig,
    encoder=lambda: MaskedTextModel,
    values=_values,
    layout=masked_text_layout,
    own=_own,
    sections=_sections,
    check=_check,
)
FORMAT = MODEL.format()
