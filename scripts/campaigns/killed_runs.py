"""psa-generate killed at random moments over a prompts file, then run again: as if nothing had happened.

    python scripts/campaigns/killed_runs.py --rounds 100

A round stops a run by SIGKILL or SIGTERM, up to three times in a row, and then lets it finish.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
from pathlib import Path

from forked_runs import check_equal, generate, prepare, videos
from rounds import campaign, parser


class KilledRuns:
    """The undisturbed run, and the check that holds others against it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        self.arguments = prepare(folder)
        outcome = generate([*self.arguments, "--output", str(folder / "undisturbed")], self.log)
        assert outcome.code == 0, outcome.said
        self.seconds = outcome.seconds
        self.expected = videos(folder / "undisturbed")

    def check(self, seed: int) -> str:
        """One disturbed run; the word is how it was stopped."""
        chance = random.Random(seed)
        output = self.folder / f"run-{seed}"
        arguments = [*self.arguments, "--output", str(output)]
        by = chance.choice([signal.SIGKILL, signal.SIGTERM])
        stopped = 0
        for _ in range(chance.choice([1, 1, 2, 3])):
            outcome = generate(arguments, self.log, stop_after=chance.uniform(0, 1.1 * self.seconds), by=by)
            assert outcome.code in (0, -by, 130), (outcome.code, outcome.said)
            # Where Python is in a callback it says that it ignores the exception; the run stops at the next step then.
            assert "Traceback" not in outcome.said or "Exception ignored in" in outcome.said, outcome.said
            stopped += outcome.code != 0
            if output.exists():
                videos(output)
        outcome = generate(arguments, self.log)
        assert outcome.code == 0, outcome.said
        check_equal(output, self.expected)
        return f"{signal.Signals(by).name}, stopped {stopped} times"


def main() -> int:
    options = parser(__doc__, 20).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return campaign(KilledRuns(Path(folder)).check, options)


if __name__ == "__main__":
    sys.exit(main())
