"""Configuration of a FlexKV process: `load()` gives the effective `Settings`. See README.md in this folder."""

from flexkv.config.loader import ConfigError, load, untold
from flexkv.config.setting import Setting, Status
from flexkv.config.settings import NodeTarget, Settings
from flexkv.config.table import TABLE

__all__ = ["TABLE", "ConfigError", "NodeTarget", "Setting", "Settings", "Status", "load", "untold"]
