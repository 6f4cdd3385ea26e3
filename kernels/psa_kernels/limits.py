"""Limits of the kernels, in a file that needs no compiler."""

from __future__ import annotations

# A row of the lists has to fit into the registers of one program.
MAX_KEY_BLOCKS = 16384
# Key representatives of a block that fit one tile of the importance.
MAX_BLOCK_SAMPLES = 128
# The kernel for Hopper has an argument for every level of keys, and of values; its smallest copy has that many rows.
MAX_HOPPER_LEVELS = 5
MIN_HOPPER_ROWS = 8
