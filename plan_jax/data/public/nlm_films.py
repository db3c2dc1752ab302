"""The folders of the NLM's two sets of tuberculosis: films, and a reading of each as a text."""

import posixpath
import re

from plan_jax.data.public.facts import Facts
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.types import UserError

TUBERCULOSIS = "Tuberculosis"
ABSENT = "a film with a reading or masks is not there"


def list_films(
    source: SourceFolder, name_pattern: re.Pattern[str], example: str, facts: Facts
) -> dict[str, str]:
    """Returns the path of each film by its name; copies keep those of both sets in one folder.

    Raises:
      UserError: there is none.
    """
    folder = source.find_folder("CXR_png", "images")
    films = {}
    for file in source.list_names(folder) if folder else []:
        stem, suffix = posixpath.splitext(file)
        if suffix.lower() == ".png" and name_pattern.fullmatch(stem):
            films[stem] = posixpath.join(folder, file)
    if not films:
        raise UserError(
            f"{source.root} has no folder CXR_png with films like {example}; download them "
            f"from {facts.page}"
        )
    source.tables[folder] = None
    return films


def read_reading(source: SourceFolder, path: str) -> list[str]:
    """Returns the lines of a radiologist's reading; none if there is no such file."""
    source.tables[path] = None
    try:
        return (source.read_text(path) or "").splitlines()
    except ValueError:
        source.drop("a reading is not UTF-8, so its film has no text", path)
        return []
