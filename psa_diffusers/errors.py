"""The one error that commands turn into a line instead of a traceback, and what such lines share."""

import importlib.util

# Packages that only some models or options need, by the name of their import, and the extra that brings them.
EXTRAS = {
    "matplotlib": "plots",
    "lpips": "lpips",
    "cosmos_guardrail": "cosmos",
    "torchvision": "torchvision",
    "torchao": "quantised",
    "bitsandbytes": "quantised",
    "gguf": "quantised",
    "sentencepiece": "tokenizers",
    "tiktoken": "tokenizers",
}


class InputError(ValueError):
    """What was asked cannot be done; the message is one line that names the thing, its value and what is allowed."""


def printable(text: str) -> str:
    """What a user gave, as a message shows it: not too long, and without what is not UTF-8."""
    shown = text if len(text) <= 200 else text[:197] + "..."
    return shown.encode("utf-8", "backslashreplace").decode()


def how_to_install(package: str) -> str:
    """The command that brings a package of `EXTRAS`; others are installed by their own name."""
    return f"pip install 'psa-diffusers[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"


def with_extra(message: str) -> str:
    """What a library said, and how to install the package that it may have missed."""
    words = message.lower()
    missing = [name for name in EXTRAS if name in words and importlib.util.find_spec(name) is None]
    return f"{message} ({how_to_install(missing[0])})" if missing else message
