"""What the process imports from which those of tests fork; no look for garbage in it, there or in any of them."""

import gc
from importlib import import_module

gc.disable()
import_module("psa_testing.parallel_ranks")
gc.freeze()
gc.enable()
