"""YAML as recipes use it: plain data only, no key twice, and what is written reads back the same."""

import re
from typing import Any

import yaml

_FLOAT = re.compile(
    r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
)
_INTEGER = re.compile(r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+|0b[01_]+)$")


def load(text: str) -> Any:
    """The value that ``text`` is: None, bool, int, float, str, or lists and mappings of them.

    Raises:
        ValueError: If it is not YAML, with line and column; or a key is given twice, or a value is none of these.
    """
    try:
        return _plain(yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(f"{where}not valid YAML: {problem}") from error
    except RecursionError as error:
        raise ValueError("not valid YAML: nested too deeply, or in itself") from error


def dump(data: Any) -> str:
    """``data`` as YAML that :func:`load` reads as equal data, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def inline(data: Any) -> str:
    """``data`` as YAML on one line, for messages and help."""
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31, default_flow_style=True
    ).partition("\n")[0]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is not None and not isinstance(value, (str, int, float)):
        raise yaml.YAMLError(f"a {type(value).__name__} is not plain data")
    return value


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different, and plain."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML without anchors, quoting what :class:`_Loader` would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that occurs twice out twice."""
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Text; escaped if anything in it is invisible, which YAML might take for a line break."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)

# YAML 1.1 reads 1e-3 as text, 12:30:00 as 45000, 017 as 15 and 2026-01-01 as a date: unwanted in a recipe.
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
