"""What a CUDA device draws and how fast it runs, as nvidia-smi tells."""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass, field
from statistics import mean

QUERY = "power.draw.instant,clocks.sm"
MILLISECONDS = 40


@dataclass
class PowerMeter:
    """Reads power and clock of the first device while the `with` block runs.

    Attributes:
        readings: time in seconds, as `time.monotonic`; watts; MHz.
    """

    readings: list[tuple[float, float, float]] = field(default_factory=list)

    def __enter__(self) -> PowerMeter:
        command = ["nvidia-smi", "-i", "0", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
        command += ["-lms", str(MILLISECONDS)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            try:
                watts, megahertz = (float(figure) for figure in line.split(","))
            except ValueError:  # a line that was cut off
                continue
            self.readings.append((time.monotonic(), watts, megahertz))

    def between(self, start: float, end: float) -> tuple[float, float]:
        """Mean watts and MHz of the readings between two times; NaN where there are none."""
        found = [reading[1:] for reading in self.readings if start <= reading[0] <= end]
        return tuple(mean(column) for column in zip(*found, strict=True)) if found else (float("nan"),) * 2
