"""The window in which a contender's frames count, and what it prints of them: the names of
`noblink bench pipeline --json`."""

import json
import time
from pathlib import Path

WARM_UP = 20  # frames before the clock starts, as in noblink


class Window:
    def __init__(self, frames):
        self.frames, self.seen, self.latencies = frames, 0, []
        self.wall = self.cpu = None

    def open(self):
        """Whether more frames are wanted."""
        if self.seen == WARM_UP:
            self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self.seen < WARM_UP + self.frames

    def frame(self, seconds):
        """A frame was worked on for so long, from the decoded picture to its boxes."""
        self.seen += 1
        if self.seen > WARM_UP:
            self.latencies.append(1e3 * seconds)

    def tell(self, **more):
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        ordered = sorted(self.latencies)
        quantile = {f"p{q}": ordered[round((len(ordered) - 1) * q / 100)] for q in (50, 99)}
        status = Path("/proc/self/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        print(json.dumps({
            "frames_per_s": self.frames / wall,
            "cpu_ms_per_frame": 1e3 * cpu / self.frames,
            "latency_ms": quantile,
            "rss_mb": int(resident.split()[1]) * 1024 / 1e6,
            **more,
        }))
