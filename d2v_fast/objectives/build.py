"""The model of a configuration: the one place that chooses the objective."""

from __future__ import annotations

from d2v_fast.config import D2VConfig
from d2v_fast.objectives.data2vec import Data2Vec
from d2v_fast.objectives.data2vec2 import Data2Vec2

OBJECTIVES: dict[str, type[Data2Vec]] = {"data2vec": Data2Vec, "data2vec2": Data2Vec2}


def build_model(config: D2VConfig) -> Data2Vec:
    """Create the model of `d2v.objective` with the published initialization. Seed torch before."""
    return OBJECTIVES[config.objective](config)
