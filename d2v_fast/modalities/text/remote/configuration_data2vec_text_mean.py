"""Configuration of a data2vec text encoder with a head that reads the mean of its tokens."""

from __future__ import annotations

from transformers import Data2VecTextConfig


class Data2VecTextMeanConfig(Data2VecTextConfig):
    """That of `Data2VecTextConfig`. The name of its own keeps Transformers from loading another head."""

    model_type = "data2vec-text-mean"
