"""What all tests of the operator share."""

from seeds import fresh_inputs

__all__ = ["fresh_inputs"]
