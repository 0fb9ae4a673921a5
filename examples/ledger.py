#!/usr/bin/env python3
"""Rebuilds each camera's ledger from its records alone, with either `publish`. Ends with the input:
mosquitto_sub -W 20 -t 'noblink/v1/+/cameras/+/detections' | python3 examples/ledger.py"""
import json
import sys

books = {}
for line in sys.stdin:
    record = json.loads(line)
    since, frame = record["since"], record["frame"]["id"]
    book = books.setdefault((record["device"], record["camera"], record["boot"]), {
        "seq": record["seq"], "first_frame": frame - sum(since.values()), "records": 0,
        "inferred": 0, "failed": 0, "dropped": 0, "missing_records": 0})
    if record["seq"] < book["seq"]:
        continue  # delivered again, as QoS 1 may
    book["missing_records"] += record["seq"] - book["seq"]
    book["seq"] = record["seq"] + 1
    book["records"] += 1
    book["inferred"] += 1 + since["empty"]
    book["failed"] += since["failed"]
    book["dropped"] += since["dropped"]
    book["last_frame"] = frame
for (device, camera, boot), book in sorted(books.items()):
    offered = book["last_frame"] - book["first_frame"] + 1
    lost = offered - book["inferred"] - book["failed"] - book["dropped"]
    print(json.dumps({"device": device, "camera": camera, "boot": boot, "offered": offered,
                      **book, "frames_lost": lost}))
