"""Configuration: closed, frozen models, YAML presets and dotted overrides."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

PRESETS = Path(__file__).resolve().parent.parent / "workflows" / "presets"


class Config(BaseModel):
    """Base of every configuration: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


def override(values: dict[str, Any], assignment: str) -> None:
    """Set one dotted key in place.

    Parameters
    ----------
    values : dict
        Nested settings as read from YAML; changed in place.
    assignment : str
        ``path.to.key=value``; the value is read as YAML, so ``3e-4``, ``true`` and ``[64, 64]`` work.

    Raises
    ------
    ValueError
        The assignment has no ``=``, its value is not valid YAML, or its path runs through a plain value.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ValueError(f"an override reads path.to.key=value, got {assignment!r}")
    *parents, key = path.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"override {assignment!r}: {parent!r} is a plain value, not a section")
    try:
        node[key] = _plain(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {assignment!r}: the value is not valid YAML: {error}") from error


def _plain(text: str) -> Any:
    """Read a YAML scalar; YAML 1.1 takes ``3e-4`` for a string, people mean a number."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load_preset(model: type[C], preset: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a preset, apply overrides and validate the result.

    Parameters
    ----------
    model : type
        The configuration class to validate against.
    preset : str or Path
        A file, or the name of a file in ``workflows/presets`` without its ending.
    overrides : sequence of str
        Dotted assignments, applied in order.

    Raises
    ------
    FileNotFoundError
        Neither a file nor a known preset; the message lists the known ones.
    ValueError
        The settings do not fit; the message names the file, every key and its rule.
    """
    path = Path(preset)
    if not path.is_file():
        path = PRESETS / f"{preset}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise FileNotFoundError(f"no preset {str(preset)!r}: give a YAML file or one of {known}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a preset is a mapping of settings, got {type(values).__name__}")
    for assignment in overrides:
        override(values, assignment)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        rules = "\n".join(f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path}: settings that do not fit {model.__name__}:\n{rules}") from error


def load_named(model: type[C], variable: str, default: Path) -> C:
    """Read the file that an environment variable names, or the default.

    Parameters
    ----------
    model : type
        The configuration class to validate against.
    variable : str
        Environment variable; unset or empty means the default.
    default : Path
        The shipped file.

    Raises
    ------
    FileNotFoundError
        The variable names no file.
    ValueError
        A setting does not fit; the message names file and key.
    """
    named = os.environ.get(variable)
    if named and not Path(named).is_file():
        raise FileNotFoundError(f"{variable}={named}: no such file")
    return load_preset(model, named or default)


def describe(model: type[Config], prefix: str = "") -> list[str]:
    """List every key below a configuration, dotted, with its default and its meaning, a line each.

    Where a section is chosen by ``kind``, the keys of each kind follow with the kind in brackets.
    """
    lines = []
    for name, field in model.model_fields.items():
        if name == "kind":  # stands in the brackets already
            continue
        inner = [t for t in _members(field.annotation) if isinstance(t, type) and issubclass(t, Config)]
        meaning = " ".join((field.description or "").split())
        if not inner:
            default = (
                "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
            )
            lines.append(f"{prefix}{name} = {default}: {meaning}".rstrip(": "))
            continue
        lines.append(f"{prefix}{name}: {meaning}".rstrip(": "))
        for member in inner:
            kind = member.model_fields.get("kind")
            mark = f"{prefix}{name}[{kind.default}]." if kind is not None else f"{prefix}{name}."
            lines += describe(member, mark)
    return lines


def _members(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows."""
    parts = get_args(annotation)
    return [m for part in parts for m in _members(part)] if parts else [annotation]


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless the condition holds."""
    if not condition:
        raise ValueError(message)
