"""The model of a configuration: the one place that chooses the objective."""

from __future__ import annotations

from typing import Any

from d2v_fast.config import D2VConfig, PretrainConfig
from d2v_fast.objectives.base import Objective
from d2v_fast.objectives.classify import Classify
from d2v_fast.objectives.ctc import Ctc
from d2v_fast.objectives.data2vec import Data2Vec
from d2v_fast.objectives.data2vec2 import Data2Vec2
from d2v_fast.objectives.regress import Regress

PRETRAINING: dict[str, type[Data2Vec]] = {"data2vec": Data2Vec, "data2vec2": Data2Vec2}
OBJECTIVES: dict[str, type[Any]] = {**PRETRAINING, "classify": Classify, "ctc": Ctc, "regress": Regress}


def build_objective(config: D2VConfig) -> Objective:
    """Create the model of `d2v.objective` with the published initialization. Seed torch before."""
    made: Objective = OBJECTIVES[config.objective](config)
    return made


def build_model(config: PretrainConfig) -> Data2Vec:
    """Create the model of a configuration of pre-training; see `build_objective`."""
    return PRETRAINING[config.objective](config)
