"""The secrets of a user, who has none."""


class SecretNotFoundError(Exception):
    """A secret does not exist, as in Colab's module."""


def get(key: str) -> str:
    """Raises SecretNotFoundError."""
    raise SecretNotFoundError(key)
