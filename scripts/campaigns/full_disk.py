"""psa-generate where only so much can be written, then with room again: one clear line, and nothing lost or half.

    python scripts/campaigns/full_disk.py --rounds 100

A round limits either the size of each file, or (as root on Linux) the whole file system, to a random number of bytes.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from forked_runs import check_equal, generate, prepare, videos
from rounds import campaign, parser


class FullDisk:
    """The undisturbed run, and the check that holds others against it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        self.arguments = prepare(folder)
        output = folder / "undisturbed"
        outcome = generate([*self.arguments, "--output", str(output)], self.log)
        assert outcome.code == 0, outcome.said
        self.expected = videos(output)
        sizes = [path.stat().st_size for path in output.rglob("*") if path.is_file()]
        self.largest, self.total = max(sizes), sum(sizes)

    def check(self, seed: int) -> str:
        """One run without room and one with it."""
        chance = random.Random(seed)
        output = self.folder / f"run-{seed}"
        arguments = [*self.arguments, "--output", str(output)]
        # In pages of 4 KiB; folders and files take one each.
        room = chance.randrange(1, self.total // 4096 + 30) * 4
        if chance.random() < 0.5 and _mount(output, f"size={room}k"):
            try:
                word = self._judge(generate(arguments, self.log), output)
                _mount(output, "remount,size=64m")
                again = generate(arguments, self.log)
                assert again.code == 0, again.said
                check_equal(output, self.expected)
            finally:
                subprocess.run(["umount", str(output)], check=True)
            return f"file system: {word}"
        outcome = generate(arguments, self.log, most=chance.randrange(int(1.2 * self.largest)))
        word = self._judge(outcome, output)
        again = generate(arguments, self.log)
        assert again.code == 0, again.said
        check_equal(output, self.expected)
        shutil.rmtree(output)
        return f"file size: {word}"

    def _judge(self, outcome, output: Path) -> str:
        if outcome.code == 0:
            check_equal(output, self.expected)
            return "enough room"
        errors = [line for line in outcome.said.splitlines() if line.startswith("psa-generate: error: ")]
        assert len(errors) == 1 and "Traceback" not in outcome.said, outcome.said
        if output.exists():
            videos(output)
        return "refused" if outcome.code == 2 else "stopped"


def _mount(folder: Path, options: str) -> bool:
    """Make a folder a file system in memory; false where this process may not."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def main() -> int:
    options = parser(__doc__, 20).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return campaign(FullDisk(Path(folder)).check, options)


if __name__ == "__main__":
    sys.exit(main())
