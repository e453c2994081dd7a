"""The JSON config file as frozen typed values. Imports no torch."""

from mlora.config.errors import ConfigError, Problem
from mlora.config.job import JobConfig
from mlora.config.load import load_config, parse_adapter, parse_config, resolved
from mlora.config.names import check_name
from mlora.config.options import RunOptions
from mlora.config.run import RunConfig

__all__ = [
    "ConfigError",
    "JobConfig",
    "Problem",
    "RunConfig",
    "RunOptions",
    "check_name",
    "load_config",
    "parse_adapter",
    "parse_config",
    "resolved",
]
