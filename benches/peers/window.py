"""The laps of a contender and what it prints of them, a line of JSON each: the names of
`noblink bench pipeline --lap`. It goes on until it is ended."""

import json
import time
from pathlib import Path

WARM_UP = 20  # frames before the first lap, as in noblink


class Window:
    def __init__(self, lap, **engine):
        self.lap, self.seen, self.latencies = lap, 0, []
        print(json.dumps(engine), flush=True)

    def frame(self, seconds):
        """A frame was worked on for so long, from the decoded picture to its boxes."""
        self.seen += 1
        if self.seen <= WARM_UP:
            self.start()
            return
        self.latencies.append(1e3 * seconds)
        wall = time.perf_counter() - self.wall
        if wall < self.lap:
            return
        status = Path("/proc/self/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        print(json.dumps({
            "began": self.began,
            "seconds": wall,
            "cpu_s": time.process_time() - self.cpu,
            "latency_ms": self.latencies,
            "rss_mb": int(resident.split()[1]) * 1024 / 1e6,
        }), flush=True)
        self.start()

    def start(self):
        self.latencies = []
        self.began, self.wall, self.cpu = time.time(), time.perf_counter(), time.process_time()
