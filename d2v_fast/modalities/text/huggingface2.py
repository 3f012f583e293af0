"""Text encoders of data2vec 2.0 as Transformers folders that carry their model's code.

Both compute the same features: `last_hidden_state` in Transformers is our `last_hidden`, also of padded texts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from d2v_fast.config import MaskedTextConfig, MaskedTextModelConfig
from d2v_fast.config.errors import Section
from d2v_fast.errors import OptionError
from d2v_fast.interop.folders import read_model_config, whole_number
from d2v_fast.interop.formats import HuggingFace
from d2v_fast.interop.remote_folder import CODE, RemoteModel
from d2v_fast.modalities.text.config import POSITION_OFFSET
from d2v_fast.modalities.text.config_finetune import TextFinetuneConfig
from d2v_fast.modalities.text.fairseq2 import MODEL
from d2v_fast.modalities.text.huggingface import padding_id, vocabulary
from d2v_fast.models.student import Student

if TYPE_CHECKING:
    from d2v_fast.modalities.text.tokenizer import Tokenizer


def _card(config: MaskedTextModelConfig) -> dict[str, Any]:
    return {
        "title": f"data2vec 2.0 text encoder, {config.depth} blocks of width {config.width}",
        "task": "feature-extraction",
        "tags": ["data2vec", "data2vec2", "self-supervised", "text"],
        "text": """\
Pre-trained without labels: a student encodes the visible tokens of a text, and a decoder predicts, at the masked ones,
the averaged upper layers of a teacher that is a moving average of the student and reads the whole text (data2vec 2.0,
arXiv 2212.07525).""",
        "use": f"""\
Input: up to {config.max_positions} tokens of the run's tokenizer, begin and end token included. Transformers has no
such model, so this folder holds its code, which `trust_remote_code=True` runs: read it before.

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
encoder = AutoModel.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer(["one text", "and another one"], padding=True, truncation=True, return_tensors="pt")
features = encoder(**inputs).last_hidden_state
```

To fine-tune for text classification:

```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(".", num_labels=2, trust_remote_code=True)
```""",
    }


REMOTE = RemoteModel(
    name="text",
    title="Text",
    heads={"AutoModelForSequenceClassification": "ForSequenceClassification"},
    model=MODEL,
    code=Path(__file__).parent / CODE,
    keys={},
    card=_card,
)


def export_masked_text(
    model: Student | Mapping[str, Tensor],
    config: MaskedTextConfig | TextFinetuneConfig | MaskedTextModelConfig,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> None:
    """Write a folder, with the tokenizer unless it is None.

    Args:
        model, config, folder, options: See `RemoteModel.write`.
        tokenizer: The tokenizer that the model was trained with. None leaves one that is in the folder.
    Raises:
        ValueError: The tokenizer has more tokens than the model, or another padding token. Nothing has been written.
        OptionError: The model has context blocks, which the folder's code has no place for.
    """
    sizes = config if isinstance(config, MaskedTextModelConfig) else cast("MaskedTextModelConfig", config.model)
    if sizes.context_depth:
        raise OptionError(
            f"`d2v.model.context_depth` must be 0 for Transformers, but is {sizes.context_depth} instead: the text "
            "model there has no context blocks."
        )
    if tokenizer is not None:
        tokenizer.fit(sizes)
    more = {
        "vocab_size": sizes.token_rows,
        "max_position_embeddings": sizes.position_rows,
        "embedding_dropout": sizes.dropout,
        "pad_token_id": sizes.padding_row,
    }
    if tokenizer is not None:
        more |= {"bos_token_id": tokenizer.specials.bos, "eos_token_id": tokenizer.specials.eos}

    def write_tokenizer(target: Path) -> None:
        if tokenizer is not None:
            tokenizer.save(target, sizes.max_positions)

    REMOTE.write(model, config, folder, more=more, files=write_tokenizer, **options)


def import_masked_text(
    folder: str | os.PathLike[str], *, decoder: Section | None = None
) -> tuple[Student, MaskedTextModelConfig]:
    """Read a folder; see `RemoteModel.read`. A tokenizer in it is not read; load it with `load_tokenizer(folder)`."""
    raw, where = read_model_config(Path(folder)), str(Path(folder) / "config.json")
    more = {
        "vocab_size": whole_number(raw, "vocab_size", 50_265, where),
        "padding_id": padding_id(raw, where),
        "max_positions": whole_number(raw, "max_position_embeddings", 514, where) - POSITION_OFFSET,
    }
    model, config = REMOTE.read(folder, more, decoder)
    return model, config


FORMAT = HuggingFace(
    REMOTE.kind,
    export_masked_text,
    import_masked_text,
    lambda raw, wanted: {"decoder": wanted.decoder},
    vocabulary=vocabulary,
)
