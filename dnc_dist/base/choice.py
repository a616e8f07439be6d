"""A key of the configuration whose value chooses a part: by its name, or by a mapping of the name and options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import SerializationInfo, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.base.parts import Named


class Choice:
    """Annotation of a key whose value chooses a part: its name, or a mapping of ``name`` and options. It becomes a ``Named``.

    Args:
        kind: of part.
        default: the name where a mapping has none.
        section: whether it is written as a mapping always, or as the plain name where all options have their defaults.
    """

    def __init__(self, kind: str, default: str, *, section: bool = False) -> None:
        self.kind, self.default, self.section = kind, default, section

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        serialize = core_schema.plain_serializer_function_ser_schema(self._plain, info_arg=True)
        return core_schema.no_info_plain_validator_function(self._chosen, serialization=serialize)

    def _chosen(self, value: Any) -> Named:
        if isinstance(value, Named):
            value = value.model_dump()
        values = {"name": value} if isinstance(value, str) else value
        if not isinstance(values, Mapping):
            raise PydanticCustomError("part_type", "must be a name, or `name` with options")
        values = {"name": self.default, **values}
        if not isinstance(name := values["name"], str) or not name:
            raise _at_name("must be the name of one, or module:Class", name)
        try:
            cls = parts.named_class(self.kind, name)
        except InputError as error:
            raise _at_name(str(error), name) from None
        return cls.model_validate(values)

    def _plain(self, chosen: Named, info: SerializationInfo) -> Any:
        if not self.section and chosen.model_dump(exclude_defaults=True).keys() == {"name"}:
            return chosen.name
        return chosen.model_dump(mode=info.mode)


def _at_name(message: str, value: Any) -> ValidationError:
    # As a template, pydantic would look for its own fields in braces.
    problem = PydanticCustomError("part_name", "{text}", {"text": message})
    return ValidationError.from_exception_data("part", [InitErrorDetails(type=problem, loc=("name",), input=value)])
