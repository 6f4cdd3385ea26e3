"""What the process imports from which those of tests fork; no look for garbage in it, there or in any of them."""

import gc
from importlib import import_module

import torch

# OpenMP's threads do not survive a fork, and a process that forked beside them would wait for them for ever.
torch.set_num_threads(1)
gc.disable()
import_module("psa_testing.parallel_ranks")
gc.freeze()
gc.enable()
