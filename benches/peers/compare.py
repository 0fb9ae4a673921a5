#!/usr/bin/env python3
"""`make bench`: noblink beside what a user would otherwise run, and beside what can't be undercut.

On the same clip, model and cores. In each round all contenders are started anew; then they take turns of
some seconds, all others standing still (SIGSTOP), so that a busy moment of the machine hits all of
them. Of a turn those laps count that began in it. Ratios are taken within a round; of them the median,
and the 95 % interval of its bootstrap over the rounds.

Contenders: noblink (with each --provider, and with --int8), plain Python (OpenCV, ONNX Runtime), Ultralytics with
the ONNX file, Ultralytics with OpenVINO. The limit is what is left when everything is left out that can be: a
run of the model over and over, and the decoder into a sink.

Needs, of PYTHON: onnxruntime (the version that noblink has), opencv-python-headless, numpy; ultralytics
and openvino for their rows. What is missing is named as NOT MEASURED. None of them is part of noblink.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from draw import plot

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / "target/bench"
LAP = 1  # seconds
LAPS = 2  # of a turn
DECODING = "bare decoding"
DECODED = 300  # frames of a bare decoding
PATIENCE = 300  # seconds until a contender's next lap: `auto` measures before its first
BEGIN, END = "<!-- made by `make bench` -->", "<!-- until here -->"


def fail(text):
    sys.exit(f"bench: {text}")


class NotMeasured(Exception):
    pass


def last_line(text):
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


class Contender:
    """A program that prints of itself and then lap after lap, in lines of JSON. It stands still but in its
    turns, and ends with this one."""

    def __init__(self, command, env=None):
        self.log = tempfile.TemporaryFile("w+")
        self.program = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *map(str, command)], stdout=subprocess.PIPE,
                                        stderr=self.log, env={**os.environ, **(env or {})})
        self.laps, self.ready = [], b""
        try:
            self.engine = self.line()
            self.line()
            self.program.send_signal(signal.SIGSTOP)
        except BaseException:
            self.end()
            raise

    def line(self):
        """The next line of JSON; libraries log on the same output."""
        while not (line := self.any_line()).startswith(b"{"):
            pass
        return json.loads(line)

    def any_line(self):
        out = self.program.stdout.fileno()
        while b"\n" not in self.ready:
            if not select.select([out], [], [], PATIENCE)[0]:
                raise NotMeasured(f"it said nothing for {PATIENCE} s")
            some = os.read(out, 1 << 16)
            if not some:
                self.log.seek(0)
                raise NotMeasured(last_line(self.log.read()))
            self.ready += some
        line, _, self.ready = self.ready.partition(b"\n")
        return line

    def turn(self, laps):
        began = time.time()
        self.program.send_signal(signal.SIGCONT)
        while laps > 0:
            lap = self.line()
            if lap["began"] >= began:
                self.laps.append(lap)
                laps -= 1
        self.program.send_signal(signal.SIGSTOP)

    def figures(self):
        latencies = sorted(ms for lap in self.laps for ms in lap["latency_ms"])
        quantile = {f"p{q}": latencies[round((len(latencies) - 1) * q / 100)] for q in (50, 99)}
        return {"frames": len(latencies),
                "frames_per_s": len(latencies) / sum(lap["seconds"] for lap in self.laps),
                "cpu_ms_per_frame": 1e3 * sum(lap["cpu_s"] for lap in self.laps) / len(latencies),
                "latency_ms": quantile, "rss_mb": self.laps[-1]["rss_mb"], **self.engine}

    def end(self):
        self.program.kill()
        self.program.wait()
        self.program.stdout.close()
        self.log.close()


def make_clip():
    """The demo's clip as a 1080p camera sends it: 30/s, a key frame a second, no B-frames."""
    clip = OUT / "clip-1080p30.mp4"
    if not clip.exists():
        draft = clip.with_suffix(".part")
        made = subprocess.run(
            ["gst-launch-1.0", "-q", "-e", "filesrc", f"location={ROOT / 'models/clips/line-a.mp4'}", "!", "decodebin",
             "!", "videorate", "!", "videoscale", "!", "video/x-raw,width=1920,height=1080,framerate=30/1", "!",
             "x264enc", "key-int-max=30", "bframes=0", "bitrate=6000", "!", "h264parse", "!", "mp4mux",
             "!", "filesink", f"location={draft}"], capture_output=True, text=True)
        if made.returncode != 0:
            fail(f"the clip can't be made: {last_line(made.stderr)}. `scripts/setup --tests` installs the encoder; "
                 "or name a clip: CLIP=clip.mp4 make bench")
        draft.rename(clip)
    return clip


def decode_cpu_s(clip, frames):
    """CPU seconds of the decoder and its process on the first frames of a clip."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(["gst-launch-1.0", "-q", "filesrc", f"location={clip}", "!", "decodebin3", "!", "identity",
                           f"eos-after={frames}", "!", "fakevideosink", "sync=false"], capture_output=True, text=True)
    if done.returncode != 0:
        raise NotMeasured(last_line(done.stderr))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bare_decode(clip):
    """By a difference, so that the start of the process is not in it."""
    few = 30
    return {"cpu_ms_per_frame": 1e3 * (decode_cpu_s(clip, few + DECODED) - decode_cpu_s(clip, few)) / DECODED}


def openvino_folder(model):
    """The ONNX file as Ultralytics' OpenVINO export would lay it down, with the same metadata."""
    import onnx
    import openvino
    folder = OUT / f"{model.stem}_openvino_model"
    folder.mkdir(exist_ok=True)
    openvino.save_model(openvino.convert_model(model), folder / f"{model.stem}.xml", compress_to_fp16=False)
    metadata = {p.key: p.value for p in onnx.load(model, load_external_data=False).metadata_props}
    (folder / "metadata.yaml").write_text("".join(
        f"{key}: {value if key in ('names', 'imgsz', 'stride', 'batch') else json.dumps(value)}\n"
        for key, value in metadata.items()))
    return folder


def contenders(args, clip):
    """Name -> its start, in the order of the table."""
    usual = ["--clip", clip, "--lap", LAP, "--model"]

    def noblink(model, provider, library):
        return lambda: Contender(
            [args.noblink, "bench", "pipeline", "--model", model, "--source", f"file://{clip}", "--provider", provider,
             "--threads", args.threads, "--lap", LAP], {"ORT_DYLIB_PATH": library} if library else None)

    found = {}
    for provider in args.provider:
        provider, _, library = provider.partition("=")
        found[f"noblink, {provider}"] = noblink(args.model, provider, library)
        if args.int8:
            found[f"noblink, {provider}, int8"] = noblink(args.int8, provider, library)
    plain = [sys.executable, HERE / "python_onnxruntime.py", "--threads", args.threads, *usual, args.model]
    found["Python, ONNX Runtime"] = lambda: Contender(plain)
    ultralytics = [sys.executable, HERE / "ultralytics_predict.py", *usual]
    found["Ultralytics, ONNX"] = lambda: Contender([*ultralytics, args.model])
    found["Ultralytics, OpenVINO"] = lambda: Contender([*ultralytics, openvino_folder(args.model)])
    found["bare run"] = lambda: Contender([*plain, "--bare"])
    return found


WANTED = {"Python, ONNX Runtime": ["onnxruntime", "cv2", "numpy"], "bare run": ["onnxruntime", "cv2", "numpy"],
          "Ultralytics, ONNX": ["ultralytics", "onnxruntime"],
          "Ultralytics, OpenVINO": ["ultralytics", "openvino", "onnx"]}


def take_turns(starts, turns, failed):
    """The figures of all that are started and keep going; of the others `failed` hears."""
    running = {}
    try:
        for name, start in starts.items():
            try:
                running[name] = start()
            except NotMeasured as why:
                failed(name, why)
        for turn in range(turns):
            names = list(running)
            first = turn % max(1, len(names))
            for name in names[first:] + names[:first]:
                try:
                    running[name].turn(LAPS)
                except NotMeasured as why:
                    running.pop(name).end()
                    failed(name, why)
        return {name: contender.figures() for name, contender in running.items()}
    finally:
        for contender in running.values():
            contender.end()


def measure(args, clip):
    """By contender the figures of each round; and why some have none."""
    found, missing, rounds = contenders(args, clip), {}, {}
    for name in args.only or []:
        if name not in [*found, DECODING]:
            fail(f"--only {name}: there are {', '.join([*found, DECODING])}")
    decoding = DECODING in (args.only or [DECODING])
    found = {name: start for name, start in found.items() if name in (args.only or found)}
    for name in found:
        gone = [m for m in WANTED.get(name, []) if importlib.util.find_spec(m) is None]
        if gone:
            missing[name] = f"this Python has no {', '.join(gone)} (PYTHON=… make bench)"

    def failed(name, why):
        missing[name] = str(why).replace(f"{ROOT}/", "").rstrip(".")
        rounds.pop(name, None)
        print(f"  {name}: NOT MEASURED, {why}", flush=True)

    for number in range(args.rounds):
        starts = {name: start for name, start in found.items() if name not in missing}
        figures = take_turns(starts, args.turns, failed)
        if decoding and DECODING not in missing:
            try:
                figures[DECODING] = bare_decode(clip)
            except NotMeasured as why:
                failed(DECODING, why)
        for name, of in figures.items():
            rounds.setdefault(name, []).append(of)
            speed = f"{of['frames_per_s']:7.2f} frames/s, " if "frames_per_s" in of else ""
            cpu = of["cpu_ms_per_frame"]
            print(f"  round {number + 1}  {name:<24}{speed}{cpu:7.2f} ms of CPU a frame", flush=True)
    return rounds, missing


def interval(ratios, draws=10_000):
    """Median, and the 95 % interval of the medians of as many rounds drawn anew."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    return [statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]]


def compare(rounds):
    """What is said of noblink: (sentence, median, low, high)."""
    said = []
    ours = [n for n in rounds if n.startswith("noblink")]

    def add(text, ratios):
        said.append([text, *(round(v, 3) for v in interval(ratios))])

    for one in ours:
        for other in rounds:
            if "frames_per_s" not in rounds[other][0] or other in ours or other == "bare run":
                continue
            add(f"frames/s: {one} / {other}",
                [a["frames_per_s"] / b["frames_per_s"] for a, b in zip(rounds[one], rounds[other])])
    for one in ours[1:]:
        add(f"frames/s: {one} / {ours[0]}",
            [a["frames_per_s"] / b["frames_per_s"] for a, b in zip(rounds[one], rounds[ours[0]])])
    if {"noblink, cpu", "bare run", DECODING} <= rounds.keys():
        three = zip(rounds["noblink, cpu"], rounds["bare run"], rounds[DECODING])
        add("CPU a frame: noblink, cpu / (bare run + bare decoding)",
            [a["cpu_ms_per_frame"] / (b["cpu_ms_per_frame"] + c["cpu_ms_per_frame"]) for a, b, c in three])
    return said


def median_of(runs, *path):
    def value(run):
        for key in path:
            run = run.get(key) if run else None
        return run
    values = [v for v in map(value, runs) if v is not None]
    return statistics.median(values) if values else None


def machine(args, rounds):
    flags = Path("/proc/cpuinfo").read_text()
    cpu = next((line.split(":")[1].strip() for line in flags.splitlines() if line.startswith("model name")),
               platform.machine())
    versions = {"Python": platform.python_version()}
    for name, runs in rounds.items():
        versions.update(runs[0].get("versions", {}))
        if "runtime" in runs[0] and not name.endswith("int8"):
            versions[f"ONNX Runtime of {name}:"] = runs[0]["runtime"]
    gstreamer = subprocess.run(["gst-launch-1.0", "--version"], capture_output=True, text=True).stdout.split()
    own = subprocess.run([args.noblink, "--version"], capture_output=True, text=True).stdout.split()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu}, {args.threads} of {os.cpu_count()} cores" + (", VNNI" if "vnni" in flags else ", no VNNI"),
        "versions": {"noblink": own[-1], "GStreamer": gstreamer[2], **versions},
        "load_before": round(args.load, 2),
    }


def markdown(result, figure):
    m = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    lines = [f"{m['date']}, {m['cpu']}; load before: {m['load_before']}. {versions}.",
             f"`{result['model']}` on `{result['clip']}`, {result['rounds']} rounds of {result['turns']} turns; medians.", "",
             "| | frames/s | CPU a frame, ms | latency p50, ms | p99, ms | memory, MB |", "|---|---|---|---|---|---|"]
    for name, runs in result["runs"].items():
        cells = [median_of(runs, "frames_per_s"), median_of(runs, "cpu_ms_per_frame"),
                 median_of(runs, "latency_ms", "p50"), median_of(runs, "latency_ms", "p99"), median_of(runs, "rss_mb")]
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.1f}" for c in cells) + " |")
    if result["ratios"]:
        lines += ["", "| ratio | median | 95 % interval |", "|---|---|---|"]
        lines += [f"| {text} | {middle:.3f} | {low:.3f} to {high:.3f} |" for text, middle, low, high in result["ratios"]]
    if result["not_measured"]:
        lines += [""] + [f"* NOT MEASURED: {name}: {why}." for name, why in result["not_measured"].items()]
    return "\n".join([*lines, "", f"![Frames a second, and CPU time a frame]({figure})"])


def into_docs(text):
    """Between the two marks of docs/benchmarks.md."""
    page = ROOT / "docs/benchmarks.md"
    before, mark, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        fail(f"{page} has no {BEGIN} … {END} to write between")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/plates-v2.onnx")
    parser.add_argument("--int8", type=Path, help="the same network in int8, as a further row of noblink's")
    parser.add_argument("--clip", type=Path, help="default: the demo's, scaled up to 1080p30 H.264")
    parser.add_argument("--provider", action="append", metavar="NAME[=LIBRARY]",
                        help="of noblink; may be given again; LIBRARY is the ONNX Runtime to use (default: cpu)")
    parser.add_argument("--only", action="append", metavar="NAME", help="a contender by its name in the table; again for more")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=8, help=f"of {LAPS * LAP} s, of each contender in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--noblink", type=Path, default=ROOT / "target/release/noblink")
    parser.add_argument("--docs", action="store_true", help="write table and plot into docs/ as well")
    args = parser.parse_args()
    if not shutil.which("gst-launch-1.0"):
        fail("there is no gst-launch-1.0, which makes the clip and decodes it bare: apt-get install gstreamer1.0-tools")
    args.provider = args.provider or ["cpu"]
    for path in [args.noblink, args.model, *filter(None, [args.int8, args.clip])]:
        if not path.exists():
            fail(f"{path} is not there" + (": run `make build`" if path == args.noblink else ""))
    args.model, args.int8 = args.model.resolve(), args.int8 and args.int8.resolve()
    OUT.mkdir(parents=True, exist_ok=True)
    clip = args.clip.resolve() if args.clip else make_clip()
    args.load = os.getloadavg()[0]
    if args.load > 0.5:
        print(f"bench: this machine is busy (load {args.load:.1f}): only the ratios will mean something", flush=True)
    # The same cores for all of them, however many threads they start.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads:])
    rounds, missing = measure(args, clip)
    if not any(name.startswith("noblink") for name in rounds):
        fail(f"noblink was not measured: {missing}")
    result = {"machine": machine(args, rounds), "model": args.model.name, "clip": clip.name, "rounds": args.rounds,
              "turns": args.turns, "runs": rounds, "ratios": compare(rounds), "not_measured": missing}
    (OUT / "peers.json").write_text(json.dumps(result, indent=1))
    bars = [(name, median_of(runs, "frames_per_s"), median_of(runs, "cpu_ms_per_frame"))
            for name, runs in rounds.items()]
    text = markdown(result, "peers.svg")
    (OUT / "peers.svg").write_text(plot(bars))
    (OUT / "peers.md").write_text(text + "\n")
    print(f"\n{text}\n\nwritten: {OUT}/peers.json, peers.md, peers.svg")
    if args.docs:
        (ROOT / "docs/peers.svg").write_text(plot(bars))
        into_docs(text)


if __name__ == "__main__":
    main()
