"""The configuration: one JSON file per run, validated by pydantic models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from d2v_fast.config.schema import (
    EARLIER_VALUES,
    BatchSplit,
    ConfigError,
    D2VConfig,
    DataSection,
    DeepSpeedConfig,
    GuardConfig,
    LossConfig,
    ModelSection,
    PretrainConfig,
    ProbeConfig,
    RunConfig,
    RunSection,
    ScheduleConfig,
    StepGuardConfig,
    TargetConfig,
    TeacherConfig,
    apply_overrides,
    changed_keys,
    check_d2v,
    load_config,
    parse_config,
)

if TYPE_CHECKING:
    from d2v_fast.modalities.speech.config import (
        SpanMaskConfig,
        SpeechConfig,
        SpeechDataConfig,
        SpeechModelConfig,
    )
    from d2v_fast.modalities.speech.config2 import BlockMask1DConfig, MaskedSpeechConfig, MaskedSpeechModelConfig
    from d2v_fast.modalities.text.config import (
        TextConfig,
        TextDataConfig,
        TextModelConfig,
        TextProbeConfig,
        TokenMaskConfig,
    )
    from d2v_fast.modalities.text.config2 import MaskedTextConfig, MaskedTextModelConfig, RandomMaskConfig
    from d2v_fast.modalities.vision.config import (
        BlockMaskConfig,
        VisionConfig,
        VisionDataConfig,
        VisionModelConfig,
        VisionProbeConfig,
    )
    from d2v_fast.modalities.vision.config2 import InverseBlockMaskConfig, MaskedVisionConfig, MaskedVisionModelConfig

__all__ = [
    "EARLIER_VALUES",
    "BatchSplit",
    "BlockMask1DConfig",
    "BlockMaskConfig",
    "ConfigError",
    "D2VConfig",
    "DataSection",
    "DeepSpeedConfig",
    "GuardConfig",
    "InverseBlockMaskConfig",
    "LossConfig",
    "MaskedSpeechConfig",
    "MaskedSpeechModelConfig",
    "MaskedTextConfig",
    "MaskedTextModelConfig",
    "MaskedVisionConfig",
    "MaskedVisionModelConfig",
    "ModelSection",
    "PretrainConfig",
    "ProbeConfig",
    "RandomMaskConfig",
    "RunConfig",
    "RunSection",
    "ScheduleConfig",
    "SpanMaskConfig",
    "SpeechConfig",
    "SpeechDataConfig",
    "SpeechModelConfig",
    "StepGuardConfig",
    "TargetConfig",
    "TeacherConfig",
    "TextConfig",
    "TextDataConfig",
    "TextModelConfig",
    "TextProbeConfig",
    "TokenMaskConfig",
    "VisionConfig",
    "VisionDataConfig",
    "VisionModelConfig",
    "VisionProbeConfig",
    "apply_overrides",
    "changed_keys",
    "check_d2v",
    "load_config",
    "parse_config",
]

# classes of one modality, which import this package themselves
_OF_MODALITY = {
    "vision.config": ("BlockMaskConfig", "VisionConfig", "VisionDataConfig", "VisionModelConfig", "VisionProbeConfig"),
    "vision.config2": ("InverseBlockMaskConfig", "MaskedVisionConfig", "MaskedVisionModelConfig"),
    "speech.config": ("SpanMaskConfig", "SpeechConfig", "SpeechDataConfig", "SpeechModelConfig"),
    "speech.config2": ("BlockMask1DConfig", "MaskedSpeechConfig", "MaskedSpeechModelConfig"),
    "text.config": ("TextConfig", "TextDataConfig", "TextModelConfig", "TextProbeConfig", "TokenMaskConfig"),
    "text.config2": ("MaskedTextConfig", "MaskedTextModelConfig", "RandomMaskConfig"),
}


def __getattr__(name: str) -> Any:
    """Import the configuration class of a modality when it is asked for."""
    for module, classes in _OF_MODALITY.items():
        if name in classes:
            return getattr(import_module(f"d2v_fast.modalities.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
