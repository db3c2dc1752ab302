"""The builder that all public datasets share."""

import abc
from collections.abc import Iterator
from typing import ClassVar

from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import Facts
from plan_jax.data.public.items import Item
from plan_jax.data.public.source_folder import SourceFolder
from plan_jax.data.tfds import tfds


class PublicBuilder(tfds.core.dataset_builder.FileReaderBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds a public dataset from the folder that it was downloaded to.

    A subclass has a table of facts, and yields the images of a folder.
    """

    facts: ClassVar[Facts]
    builder_config: PublicConfig

    @abc.abstractmethod
    def read_items(self, source: SourceFolder) -> Iterator[Item]:
        """Yields the images that the tables list, in any order.

        Rows that cannot be used are dropped by `source.drop`.

        Raises:
          UserError: the tables cannot be read, or hold what they cannot mean.
        """
        ...
