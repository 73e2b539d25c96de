"""A config file: YAML that holds each setting once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qdora.errors import ConfigError, reason, shown

__all__ = ["read_config"]

_MOST_VALUES = 10_000
_MERGED = "tag:yaml.org,2002:merge"


class _OnceLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys in silence; this one takes neither."""

    _depth = 0

    def compose_mapping_node(self, anchor: Any) -> Any:
        self._depth += 1
        node = super().compose_mapping_node(anchor)
        self._depth -= 1
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGED:
                # Flags may be spelled in two ways.
                name = key.value.replace("-", "_") if self._depth == 0 else key.value
                line = key.start_mark.line + 1
                if name in lines:
                    raise yaml.YAMLError(f"{shown(name)} is set in line {lines[name]} and in line {line}; keep one")
                lines[name] = line
        return node


def read_config(name: str) -> Mapping[str, Any]:
    """The settings of a config file, by the names of flags.

    Raises:
        ConfigError: there is none, it is not YAML that holds settings, or one of them is set twice.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"no config file at {path}; write its settings there, or give flags alone")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_OnceLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; let it be read, or name another") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {reason(error)}") from None
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{path} must hold settings such as `learning_rate: 2e-4`, one a line")
    if not _is_small(settings):
        raise ConfigError(f"{path} holds more than {_MOST_VALUES:,} values, or a value within itself; it is no config")
    return settings


def _is_small(settings: Mapping[Any, Any]) -> bool:
    """Written out, that is: YAML's aliases let a few lines stand for billions, and for endless ones."""
    waiting: list[Any] = [settings]
    for _ in range(_MOST_VALUES):
        if not waiting:
            return True
        value = waiting.pop()
        waiting += value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return not waiting
