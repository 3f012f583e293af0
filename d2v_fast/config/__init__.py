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
    ProbeConfig,
    RunConfig,
    RunSection,
    ScheduleConfig,
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
    from d2v_fast.modalities.text.config import (
        TextConfig,
        TextDataConfig,
        TextModelConfig,
        TextProbeConfig,
        TokenMaskConfig,
    )
    from d2v_fast.modalities.vision.config import (
        BlockMaskConfig,
        VisionConfig,
        VisionDataConfig,
        VisionModelConfig,
        VisionProbeConfig,
    )

__all__ = [
    "EARLIER_VALUES",
    "BatchSplit",
    "BlockMaskConfig",
    "ConfigError",
    "D2VConfig",
    "DataSection",
    "DeepSpeedConfig",
    "GuardConfig",
    "LossConfig",
    "ModelSection",
    "ProbeConfig",
    "RunConfig",
    "RunSection",
    "ScheduleConfig",
    "SpanMaskConfig",
    "SpeechConfig",
    "SpeechDataConfig",
    "SpeechModelConfig",
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
    "vision": ("BlockMaskConfig", "VisionConfig", "VisionDataConfig", "VisionModelConfig", "VisionProbeConfig"),
    "speech": ("SpanMaskConfig", "SpeechConfig", "SpeechDataConfig", "SpeechModelConfig"),
    "text": ("TextConfig", "TextDataConfig", "TextModelConfig", "TextProbeConfig", "TokenMaskConfig"),
}


def __getattr__(name: str) -> Any:
    """Import the configuration class of a modality when it is asked for."""
    for modality, classes in _OF_MODALITY.items():
        if name in classes:
            return getattr(import_module(f"d2v_fast.modalities.{modality}.config"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
