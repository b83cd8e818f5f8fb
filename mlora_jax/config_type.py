"""The type of a resolved config, as annotations name it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # A type checker cannot know the keys: they are data, see `mlora_jax.config.KEYS`.
    from typing import Any as ConfigDict
else:
    from ml_collections import ConfigDict

__all__ = ["ConfigDict"]
