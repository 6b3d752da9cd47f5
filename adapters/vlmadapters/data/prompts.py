"""Class prompts: templates filled with class names."""

from __future__ import annotations

from collections.abc import Iterable

from vlmlayers.errors import UserError

TEMPLATE = "a photo of a {}."


def class_prompts(class_names: Iterable[str], template: str) -> list[str]:
    """Fill a template with class names; underscores become spaces.

    Raises:
        UserError: The template has no `{}`.
    """
    if template.count("{}") != 1:
        raise UserError(f"the template {template!r} needs exactly one {{}} for the class name")
    return [template.replace("{}", name.replace("_", " ")) for name in class_names]
