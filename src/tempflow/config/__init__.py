"""A run's configuration: one frozen, strict tree, the same for Python, YAML and the command line.

Every message names the field, the value and the nearest valid one.
"""

from tempflow.config.algorithm import AlgorithmConfig, algorithm_config
from tempflow.config.files import MAX_YAML_BYTES, load_config, parse_config, read_config
from tempflow.config.guards import GuardsConfig
from tempflow.config.parts import (
    OWN_REWARD,
    CheckpointConfig,
    CompositionConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    ScorerConfig,
)
from tempflow.config.stages import Stages, load_stages, parse_recipe, parse_stages, to_yaml
from tempflow.config.track import TrackConfig
from tempflow.config.tree import Config
from tempflow.strict import ConfigError

__all__ = [
    "MAX_YAML_BYTES",
    "OWN_REWARD",
    "AlgorithmConfig",
    "CheckpointConfig",
    "CompositionConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "GuardsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RewardConfig",
    "ScorerConfig",
    "Stages",
    "TrackConfig",
    "algorithm_config",
    "load_config",
    "load_stages",
    "parse_config",
    "parse_recipe",
    "parse_stages",
    "read_config",
    "to_yaml",
]
