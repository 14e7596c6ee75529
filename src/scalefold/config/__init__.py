"""One YAML file per system becomes one strict, frozen ``Config``; every value knows where it came from.

A file may name one parent with ``base:``; its keys override the parent's, ``key.sub=value`` overrides from the command
line override both. Unknown keys, wrong types and impossible combinations raise ``ConfigError`` with file and line.
"""

from scalefold.config.files import LoadedConfig, Origin, describe_config, dump_config, load_config
from scalefold.config.layout import RankLayout
from scalefold.config.sections import (
    DataConfig,
    EvoformerConfig,
    FeatureConfig,
    HeadsConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    ProfileConfig,
    StructureConfig,
    TemplateConfig,
    TrainingConfig,
)
from scalefold.config.whole import Config

__all__ = [
    "Config",
    "DataConfig",
    "EvoformerConfig",
    "FeatureConfig",
    "HeadsConfig",
    "LoadedConfig",
    "LossConfig",
    "ModelConfig",
    "Origin",
    "ParallelConfig",
    "ProfileConfig",
    "RankLayout",
    "StructureConfig",
    "TemplateConfig",
    "TrainingConfig",
    "describe_config",
    "dump_config",
    "load_config",
]
