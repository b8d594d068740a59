"""Settings as text: "vecinfer:bits=2,residual=0" names a class of a table and gives its fields."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vecinfer_jax.errors import InputError


def parse[T](text: str, table: Mapping[str, type[T]], what: str, **defaults: Any) -> T:
    """Makes what "name" or "name:field=value,field=value" says; several values of a field are joined by "+",
    and so are the settings of a method within a method: "tailorkv:quantised=vecinfer:bits=2+residual=64".

    `defaults` are settings from elsewhere (None: not given), which the text overrules. Raises `InputError` where the
    name or a field is unknown, a field is given twice or a value is not of its kind.
    """
    name, _, rest = text.partition(":")
    if name not in table:
        raise InputError(f"unknown {what} {name!r}: choose from {', '.join(table)}")
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        field, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"{what} {text!r}: {part!r} is not field=value")
        if field in given:
            raise InputError(f"{what} {text!r}: {field} is given twice")
        given[field] = value
    fields = {f.name: f for f in dataclasses.fields(table[name]) if f.init}  # type: ignore[arg-type]
    settings = {key: value for key, value in defaults.items() if value is not None} | given
    for key in settings:
        if key not in fields:
            shown = f"--{key.replace('_', '-')}" if key in defaults and key not in given else key
            raise InputError(f"{what} {name!r} has no {shown}: it has {', '.join(fields) or 'no settings'}")
    values = {
        key: parse(value.replace("+", ","), table, what)
        if _is_method(fields[key], value)
        else _value(fields[key], value)
        for key, value in settings.items()
    }
    missing = [f.name for f in fields.values() if _required(f) and f.name not in values]
    if missing:
        raise InputError(f"{what} {name!r} needs {missing[0]}=...")
    return table[name](**values)


def _is_method(field: Any, value: Any) -> bool:
    return "CacheMethod" in str(field.type) and isinstance(value, str)


def _required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(field: Any, value: Any) -> Any:
    """A field's value from text; a value that is no text is taken as it is, whole floats as integers."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{field.name}={value} is not a number that can be used here")
        return int(value) if value.is_integer() else value
    if not isinstance(value, str):
        return value
    annotation = str(field.type)
    if "Path" in annotation:
        return Path(value)
    if "tuple" in annotation or isinstance(field.default, tuple):
        return tuple(_scalar(field.name, part, annotation) for part in value.split("+"))
    return _scalar(field.name, value, annotation)


def _scalar(name: str, text: str, annotation: str) -> Any:
    if text.lower() == "none" and "None" in annotation:
        return None
    if "str" in annotation and "int" not in annotation and "float" not in annotation:
        return text
    if text.lower() in ("true", "false") and "bool" in annotation:
        return text.lower() == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if not math.isfinite(number):
            break
        return int(number) if float(number).is_integer() else number
    raise InputError(f"{name}={text!r} is not a number")
