"""What the tests of presets share."""

import pytest

from psa_presets import PresetError


def write_file(folder, content, name="mine.yaml"):
    """Write a preset file of text or bytes and return its path."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def message_of(action):
    """The message of the PresetError that an action raises; it must be one line of bounded length."""
    with pytest.raises(PresetError) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 2500, message
    assert caught.value.__cause__ is None and isinstance(caught.value, ValueError)
    return message
