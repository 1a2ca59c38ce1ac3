"""`--config FILE.yaml --section.field value` for the training scripts; an unknown field is an error that names it."""

import re
import sys
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

Config = TypeVar("Config", bound=BaseModel)


def parse_config(config_class: type[Config], description: str, arguments: list[str] | None = None) -> Config:
    """The configuration that the command line names. Bad input ends with one line on stderr and exit code 2."""
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            line = re.sub(r"For further information visit \S+", "", " ".join(message.split()))
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(2)

    parser = Parser(description=description)
    parser.add_argument("--config", action="config", help="YAML file; later arguments, another file too, override it")
    parser.add_class_arguments(config_class, as_group=False)
    try:
        said = parser.parse_args(arguments, defaults=False)  # what is not said is for the class to settle
    except UnicodeDecodeError as error:
        return parser.error(f"--config names a file that is not UTF-8 text ({error}): save it as UTF-8")
    said.pop("config", None)
    try:
        return config_class.model_validate(said.as_dict())
    except ValidationError as error:  # fields that are right each for itself, but not together
        fault = error.errors()[0]
        return parser.error(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}")
