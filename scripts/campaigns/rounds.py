"""The loop of every campaign: one seed a round, what failed, and one line of JSON at the end."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from collections.abc import Callable


def parser(about: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all campaigns have."""
    found = argparse.ArgumentParser(description=about)
    found.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    found.add_argument("--seed", type=int, default=None, help="of the first round; by default a fresh one")
    found.add_argument("--minutes", type=float, default=None, help="stop after this time")
    return found


def campaign(check: Callable[[int], str], options: argparse.Namespace) -> int:
    """Call `check(seed)` for every round; it raises what is wrong, and returns a word for what happened.

    Prints one JSON document: rounds, seconds, how often each word came, the seeds that failed. Returns the exit code.
    """
    first = random.randrange(2**31) if options.seed is None else options.seed
    started, words, failures = time.monotonic(), {}, []
    done = 0
    for seed in range(first, first + options.rounds):
        if options.minutes is not None and time.monotonic() - started > 60 * options.minutes:
            break
        try:
            word = check(seed)
        except Exception:
            word = "failed"
            failures.append(seed)
            print(f"seed {seed}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        words[word] = words.get(word, 0) + 1
        done += 1
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"rounds": done, "first_seed": first, "seconds": seconds, "outcomes": words, "failed": failures}))
    return 1 if failures else 0
