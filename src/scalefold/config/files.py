"""From YAML files and overrides to a ``Config`` of which every value knows where it came from, and back."""

import difflib
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from scalefold.config.sections import PhaseConfig
from scalefold.config.whole import Config
from scalefold.errors import ConfigError
from scalefold.textfile import read_text
from scalefold.yamlfile import parse_yaml


@dataclass(frozen=True)
class Origin:
    """Where a value was written: file and line, or the command line."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class LoadedConfig:
    """A validated configuration with the origin of every value that is not a default."""

    config: Config
    origins: dict[str, Origin]


def load_config(file: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> LoadedConfig:
    """Read ``file`` with its parents, apply ``key.sub=value`` overrides, validate.

    Raises:
        ConfigError: naming file, line and key of the first problem, and the nearest known key.
    """
    values, origins = _read_with_parents(Path(file), seen=())
    for override in overrides:
        _apply_override(values, origins, override)
    _refuse_unknown_keys(values, origins)
    try:
        return LoadedConfig(Config.model_validate(values), origins)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, origins, file)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, without ``base``: loading it gives the same Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_config(loaded: LoadedConfig) -> list[tuple[str, str, str]]:
    """Every value as (key, value, origin) rows, ``default`` where no file says anything."""
    rows = _flatten(loaded.config.model_dump(mode="json"))
    return [(key, _plain(value), str(_origin(key, value, loaded.origins))) for key, value in rows]


def _origin(key: str, value: Any, origins: dict[str, Origin]) -> Origin | str:
    in_list = key.startswith("phases.") and value is not None  # lines are kept for mappings, not inside lists
    return origins.get(key) or (_parent_origin(key, origins) if in_list else "default")


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()


def _parent_origin(key: str, origins: dict[str, Origin]) -> Origin | str:
    parents = [key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)]
    return next((origins[parent] for parent in parents if parent in origins), "default")


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                rows += _flatten(item, f"{prefix}{key}.{index}.")
        else:
            rows.append((prefix + key, value))
    return rows


def _read_with_parents(file: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, Origin]]:
    if file.resolve() in seen:
        raise ConfigError(f"{file}: base: names a file that is already its own child")
    values, origins = _read_yaml(file)
    base = values.pop("base", None)
    origin = origins.pop("base", None)
    if base is None:
        return values, origins
    parent_file = file.parent / str(base)
    if not parent_file.is_file():
        raise ConfigError(f"{origin}: base: {parent_file}: no such file; it is sought beside {file.name}")
    parent, parent_origins = _read_with_parents(parent_file, (*seen, file.resolve()))
    return _merge(parent, values), parent_origins | origins


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, Origin]]:
    values, node = parse_yaml(read_text(file, ConfigError, "configuration"), str(file))
    if not isinstance(values, dict):
        found = "found none" if values is None else f"found {type(values).__name__}"
        raise ConfigError(f"{file}: must hold `key: value` lines, {found}")
    origins: dict[str, Origin] = {}
    _collect_lines(node, "", str(file), origins)
    return values, origins


def _collect_lines(node: Any, prefix: str, file: str, origins: dict[str, Origin]) -> None:
    for key_node, value_node in node.value:
        path = f"{prefix}{key_node.value}"
        if path in origins:
            raise ConfigError(f"{file}:{key_node.start_mark.line + 1}: key `{path}` is given twice")
        origins[path] = Origin(file, key_node.start_mark.line + 1)
        if isinstance(value_node, yaml.MappingNode):
            _collect_lines(value_node, f"{path}.", file, origins)


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], origins: dict[str, Origin], override: str) -> None:
    key, equals, text = override.partition("=")
    shown = f"override `{override[:80]}{'...' * (len(override) > 80)}`"
    if not (equals and key.strip()):
        raise ConfigError(f"{shown} must look like key.sub=value")
    *parents, last = key.strip().split(".")
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{shown}: `{parent}` is a value, not a section")
    target[last], _ = parse_yaml(text, shown)
    origins[key.strip()] = Origin("command line", 0)


def _refuse_unknown_keys(values: dict[str, Any], origins: dict[str, Origin]) -> None:
    known = _known_keys(Config)
    for numbered, _ in _flatten(values):
        key = re.sub(r"\.\d+\.", ".", numbered)
        if key in known or any(key.startswith(f"{free}.") for free in known if known[free]):
            continue
        prefix, _, name = key.rpartition(".")
        while prefix and prefix not in known and not any(k.startswith(f"{prefix}.") for k in known):
            prefix, _, name = prefix.rpartition(".")
        bad = f"{prefix}.{name}" if prefix else name
        sections = {".".join(k.split(".")[: n + 1]) for k in known for n in range(k.count("."))}
        near = difflib.get_close_matches(bad, [*known, *sections], n=1, cutoff=0.0)
        origin = origins.get(key) or origins.get(bad) or _parent_origin(bad, origins)
        if bad in sections:
            keys = ", ".join(k.removeprefix(f"{bad}.") for k in known if k.startswith(f"{bad}."))
            raise ConfigError(f"{origin}: `{bad}` is a section and takes no value of its own; its keys are {keys}")
        raise ConfigError(f"{origin}: unknown key `{bad}`; the nearest known key is `{near[0]}`")


def _known_keys(section: type[BaseModel], prefix: str = "") -> dict[str, bool]:
    """Every legal leaf key -> whether it is a free-form mapping."""
    keys: dict[str, bool] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if name == "phases":
            kind = PhaseConfig
            keys["phases"] = False
        if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and issubclass(kind, BaseModel):
            keys |= _known_keys(kind, f"{prefix}{name}.")
        else:
            keys[prefix + name] = get_origin(kind) is dict or any(get_origin(a) is dict for a in get_args(kind))
    return keys


def _first_problem(error: ValidationError, origins: dict[str, Origin], file: Path | str) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    message = " ".join(str(problem["msg"]).removeprefix("Value error, ").split())
    if not key:
        return f"{file}: {message}"
    origin = origins.get(key) or _parent_origin(key, origins)
    return f"{origin if origin != 'default' else file}: {key}: {message} (found {_shown(problem.get('input'))})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
