"""YAML that people write: plain values, keys that are text and given once, and nothing that a reader chokes on."""

import itertools
import re
from typing import Any

import yaml

from scalefold.errors import ConfigError

_MAX_DEPTH = 32
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """Plain values only, and no whole number that is too long to be printed."""


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) > 40:
        raise yaml.MarkedYAMLError(problem="a number of more than 40 digits", problem_mark=node.start_mark)
    return loader.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, place: str) -> tuple[Any, Any]:
    """Value and node tree of YAML text. Raises ConfigError naming ``place`` and the line.

    What a few lines can do to a reader is refused first: depth, aliases (they stand for gigabytes), text that no file
    name or log can hold.
    """
    brackets = (1 if letter in "[{" else -1 for letter in text if letter in "[]{}")
    if max(itertools.accumulate(brackets), default=0) > 10 * _MAX_DEPTH:  # the scanner alone would take seconds
        raise ConfigError(f"{place}: not valid YAML: nested more than {_MAX_DEPTH} levels deep")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            _check_event(event, depth)
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_keys(node, place)
        return (None if node is None else loader.construct_document(node)), node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{place}{line}: not valid YAML: {reason}") from None
    except (ValueError, TypeError, OverflowError, AttributeError) as error:  # the 31st of June
        raise ConfigError(f"{place}: not valid YAML: {error}") from None


def _check_event(event: yaml.Event, depth: int) -> None:
    problem = None
    if isinstance(event, yaml.AliasEvent):
        problem = "aliases (*name) are not read"
    elif depth > _MAX_DEPTH:
        problem = f"nested more than {_MAX_DEPTH} levels deep"
    elif isinstance(event, yaml.ScalarEvent) and _UNUSABLE.search(event.value):
        problem = "a value holds NUL or half of a surrogate pair"
    if problem:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _check_keys(node: Any, place: str) -> None:
    """Raises ConfigError for a key that is no text, in lists too, and for one that is given twice."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, place)
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        at = f"{place}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            text = key.value if isinstance(key, yaml.ScalarNode) else key.id
            raise ConfigError(f"{at}: key `{str(text)[:40]}` must be text; put it in quotes if it is meant as text")
        if key.value in seen:
            raise ConfigError(f"{at}: key `{key.value}` is given twice")
        seen.add(key.value)
        _check_keys(value, place)
