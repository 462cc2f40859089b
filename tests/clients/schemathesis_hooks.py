"""Names that the server knows, where made-up bodies and paths hold others: they would all end in 404."""

from typing import Any

import schemathesis

MODEL = "stub"


@schemathesis.hook  # type: ignore[untyped-decorator]
def map_body(context: Any, body: Any) -> Any:
    """The model that is served."""
    return {**body, "model": MODEL} if isinstance(body, dict) and isinstance(body.get("model"), str) else body


@schemathesis.hook  # type: ignore[untyped-decorator]
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    """Every other model's name is the one that is served."""
    name = (path_parameters or {}).get("name")
    return {**path_parameters, "name": MODEL} if isinstance(name, str) and len(name) % 2 else path_parameters
