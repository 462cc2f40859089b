"""JSON schemas as libraries write them, rewritten in the keywords that llguidance follows.

https://json-schema.org/draft/2020-12/json-schema-validation. What constrains nothing is left out, and what can be said
in other keywords is. Nothing is loosened but by `loosened`.
"""

import re
from typing import Any

Schema = dict[str, Any]

# Those that llguidance enforces; any other is a remark, as the specification has it.
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
# The newest draft, which many schemas name as theirs; llguidance has the drafts by their own names only.
NEWEST_DRAFT = ("https://json-schema.org/schema", "http://json-schema.org/schema")
# Where schemas are in a schema: alone or in a list, and by name.
NESTED = ("additionalProperties", "additionalItems", "items", "prefixItems", "allOf", "anyOf", "oneOf")
NAMED = ("properties", "patternProperties", "$defs", "definitions")
APPLICATORS = ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "dependencies", "contains")
OF_TYPE = {
    "array": ("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"),
    "object": ("propertyNames", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties",
               "minProperties", "maxProperties"),
}  # fmt: skip
NOT_FOLLOWED = ("not", "if", "then", "else", *OF_TYPE["array"], *OF_TYPE["object"])
# Of regular expressions: look-around, back references and word boundaries, behind an even number of backslashes.
NOT_REGULAR = re.compile(r"(?<!\\)(?:\\\\)*(?:\(\?<?[=!]|\\[bB1-9k])")
BOUNDS = {"minimum": -1, "exclusiveMinimum": -1, "maximum": 1, "exclusiveMaximum": 1}
LARGEST = 10**18  # llguidance cannot say a larger bound of a number, as the range of a float has


def rewritten(schema: Any, lenient: bool = False) -> Any:
    """A schema that allows the same; `schema` itself, which is not changed, if there is nothing to do. With `lenient`
    it may allow more: what llguidance cannot follow is left out.
    """
    changed = False
    root = [schema]
    todo: list[tuple[Any, Any, Schema]] = [(root, 0, {})]  # a schema's place, and what its references begin at
    while todo:
        container, key, base = todo.pop()
        if not isinstance(old := container[key], dict):
            continue
        base = old if not base or "$id" in old else base
        new = simplified(old, base)
        if new is not None and lenient:
            new = loosened(new)
        changed |= new != old
        if new is None:
            container[key] = False
            continue
        container[key] = new
        for name in (*NESTED, *NAMED):
            inner = new.get(name)
            if isinstance(inner, list) or (name in NAMED and isinstance(inner, dict)):
                new[name] = inner = inner.copy()
                todo += [(inner, each, base) for each in (inner if isinstance(inner, dict) else range(len(inner)))]
            elif isinstance(inner, dict):
                todo.append((new, name, base))
    return root[0] if changed else schema


def simplified(schema: Schema, base: Schema) -> Schema | None:
    """The same of one schema, leaving alone those in it; None where nothing is allowed."""
    if trivial(schema.get("not")):
        return None
    rest = {key: value for key, value in schema.items() if not constrains_nothing(key, value, schema)}
    if isinstance(pattern := rest.get("pattern"), str) and "format" in rest and NOT_REGULAR.search(pattern):
        del rest["pattern"]  # libraries write the format once more as a pattern
    if rest.get("type") != "integer":
        for key, sign in BOUNDS.items():
            value = rest.get(key)
            if isinstance(value, (int, float)) and sign * value > LARGEST:
                rest[key] = sign * LARGEST
    if rest.get("unevaluatedProperties") is False and not any(key in rest for key in APPLICATORS):
        del rest["unevaluatedProperties"]
        rest.setdefault("additionalProperties", False)
    return with_names(rest, base) if "propertyNames" in rest and "patternProperties" not in rest else rest


def constrains_nothing(key: str, value: Any, schema: Schema) -> bool:
    types = schema.get("type")
    given = [types] if isinstance(types, str) else types
    if isinstance(given, list) and any(key in OF_TYPE[kind] for kind in OF_TYPE if kind not in given):
        return True
    match key:
        case "format":
            return isinstance(value, str) and value not in FORMATS
        case "$schema":
            return isinstance(value, str) and value.rstrip("#") in NEWEST_DRAFT
        case "uniqueItems":
            return value is False or schema.get("maxItems") in (0, 1)
        case "contains" | "minContains" | "maxContains":
            none_needed = schema.get("minContains") == 0 and "maxContains" not in schema
            return none_needed or "contains" not in schema
        case "if":
            return all(trivial(schema.get(name, True)) for name in ("then", "else"))
        case "then" | "else":
            return "if" not in schema or trivial(value)
        case "not":
            return value is False
        case "propertyNames" | "unevaluatedProperties" | "unevaluatedItems":
            return trivial(value) or (key == "propertyNames" and value == {"type": "string"})
        case "dependentSchemas" | "dependentRequired" | "dependencies":
            required = schema.get("required")
            there = required if isinstance(required, list) else []
            rules = value.values() if isinstance(value, dict) else [None]
            return all(trivial(rule) or (isinstance(rule, list) and all(n in there for n in rule)) for rule in rules)
    return key == "$dynamicAnchor"


def trivial(schema: Any) -> bool:
    return schema is True or (isinstance(schema, dict) and not schema)


def with_names(schema: Schema, base: Schema) -> Schema:
    """A schema whose `propertyNames` are a list, a pattern or a length, said by properties; else the same."""
    names, properties = schema["propertyNames"], schema.get("properties", {})
    values = schema.get("additionalProperties", True)
    if isinstance(names, dict) and isinstance(reference := names.get("$ref"), str):
        names = referred(base, reference)
    if not isinstance(names, dict) or not isinstance(properties, dict):
        return schema
    said = {key: value for key, value in names.items() if key not in ("title", "description")}
    if said.get("type") == "string":
        del said["type"]
    closed = {key: value for key, value in schema.items() if key != "propertyNames"} | {"additionalProperties": False}
    listed = said["enum"] if said.keys() == {"enum"} else [said["const"]] if said.keys() == {"const"} else None
    if isinstance(listed, list):
        return closed | {"properties": {name: properties.get(name, values) for name in listed if isinstance(name, str)}}
    pattern = said.get("pattern") if said.keys() == {"pattern"} else None
    sized = all(key in ("minLength", "maxLength") and type(size) is int and size >= 0 for key, size in said.items())
    if said and sized:
        pattern = rf"^[\s\S]{{{said.get('minLength', 0)},{said.get('maxLength', '')}}}$"
    return closed | {"patternProperties": {pattern: values}} if isinstance(pattern, str) and not properties else schema


def referred(base: Schema, reference: str) -> Any:
    """What a reference within a schema points to; None where it points elsewhere."""
    found: Any = base
    first, *path = reference.split("/")
    for part in path:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found if first == "#" else None


def loosened(schema: Schema) -> Schema:
    rest = {key: value for key, value in schema.items() if key not in NOT_FOLLOWED}
    if isinstance(pattern := rest.get("pattern"), str) and NOT_REGULAR.search(pattern):
        del rest["pattern"]
    if isinstance(patterns := rest.get("patternProperties"), dict):
        rest["patternProperties"] = {name: value for name, value in patterns.items() if not NOT_REGULAR.search(name)}
    if "oneOf" in rest and "anyOf" not in rest:
        rest["anyOf"] = rest.pop("oneOf")
    return rest
