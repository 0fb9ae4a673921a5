"""Home Assistant itself, beside a real Mosquitto and noblink: what it makes of the discovery.

Starts all three on loopback, looks at the entities through Home Assistant's REST API, presses its
buttons, and fails if an entity is missing, if its state is not what noblink says, or if Home
Assistant's log holds a warning about MQTT.

    python3.13 -m venv ha && ha/bin/pip install homeassistant home-assistant-frontend paho-mqtt
    ha/bin/python tests/peers/ask_homeassistant.py target/debug/noblink
"""

import hashlib
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOBLINK = pathlib.Path(sys.argv[1]).resolve()
HASS = pathlib.Path(sys.executable).parent / "hass"
USER = ("house", "only-on-loopback")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(what, seconds, condition):
    end = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except (urllib.error.URLError, ConnectionError) as e:
            found = e
        if time.monotonic() > end:
            raise SystemExit(f"not within {seconds} s: {what}; it is: {found}")
        time.sleep(0.2)


class HomeAssistant:
    def __init__(self, folder, broker):
        self.folder, self.port, self.token = folder, free_port(), None
        (folder / ".storage").mkdir(parents=True)
        (folder / "configuration.yaml").write_text(
            f"http:\n  server_host: 127.0.0.1\n  server_port: {self.port}\n"
            "frontend:\nlogger:\n  default: warning\n"
            "  logs:\n    homeassistant.components.mqtt: info\n"
        )
        entry = {
            "created_at": "2026-01-01T00:00:00+00:00", "modified_at": "2026-01-01T00:00:00+00:00",
            "data": {"broker": "127.0.0.1", "port": broker, "protocol": "5"}, "options": {},
            "domain": "mqtt", "entry_id": "mqtt", "title": "mqtt", "source": "user",
            "unique_id": None, "version": 1, "minor_version": 2, "disabled_by": None,
            "discovery_keys": {}, "subentries": [],
            "pref_disable_new_entities": False, "pref_disable_polling": False,
        }
        (folder / ".storage/core.config_entries").write_text(json.dumps({
            "version": 1, "minor_version": 5, "key": "core.config_entries",
            "data": {"entries": [entry]},
        }))
        subprocess.run([HASS, "--script", "auth", "--config", folder, "add", *USER], check=True,
                       stdout=subprocess.DEVNULL)
        self.log = open(folder / "out.log", "w")
        self.child = None

    def start(self):
        self.child = subprocess.Popen([HASS, "--config", self.folder, "--skip-pip"],
                                      stdout=self.log, stderr=self.log)
        until("Home Assistant answers", 120, self.login)

    def stop(self):
        self.child.terminate()
        self.child.wait(60)

    def call(self, path, body=None, form=None):
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        if form is not None:
            data = urllib.parse.urlencode(form).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as r:
            text = r.read()
        return text if r.headers.get_content_type() == "image/jpeg" else json.loads(text)

    def login(self):
        self.token = None
        client = f"http://127.0.0.1:{self.port}/"
        flow = self.call("/auth/login_flow", {
            "client_id": client, "handler": ["homeassistant", None], "redirect_uri": client})
        code = self.call(f"/auth/login_flow/{flow['flow_id']}", {
            "client_id": client, "username": USER[0], "password": USER[1]})["result"]
        self.token = self.call("/auth/token", form={
            "client_id": client, "grant_type": "authorization_code", "code": code})["access_token"]
        return True

    def states(self):
        return {s["entity_id"]: s for s in self.call("/api/states")}

    def state(self, entity):
        return self.states().get(entity, {}).get("state")

    def number(self, entity):
        try:
            return float(self.state(entity))
        except (TypeError, ValueError):  # unknown, unavailable, not there yet
            return -1

    def act(self, domain, service, entity):
        self.call(f"/api/services/{domain}/{service}", {"entity_id": entity})

    def complaints(self):
        log = (self.folder / "out.log").read_text() + (self.folder / "home-assistant.log").read_text()
        levels = (" WARNING ", " ERROR ")
        return sorted({line for line in log.splitlines()
                       if any(level in line for level in levels) and "mqtt" in line.lower()})


def main():
    children, folder = [], pathlib.Path(tempfile.mkdtemp())
    port = free_port()
    (folder / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    children.append(subprocess.Popen(["mosquitto", "-c", folder / "mosquitto.conf"],
                                     stderr=subprocess.DEVNULL))
    model = (ROOT / "models/plates-v2.onnx").read_bytes()
    serve = subprocess.Popen([sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1",
                              "--directory", ROOT / "models"],
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                             env={"PYTHONUNBUFFERED": "1"})
    children.append(serve)
    files = int(serve.stdout.readline().split(" port ")[1].split()[0])
    (folder / "noblink.toml").write_text(
        f'[device]\nid = "shop"\nstate_dir = "state"\n'
        f'[mqtt]\nurl = "mqtt://127.0.0.1:{port}"\n'
        f'[models]\nfactory = "{ROOT}/models/plates-v1.onnx"\nprobation_s = 5\nlatency_budget_ms = 5000\n'
        f'allowed_hosts = ["127.0.0.1:{files}"]\n'
        f'[homeassistant]\ndiscovery_prefix = "homeassistant"\n[web]\nlisten = "off"\n'
        f'[[camera]]\nid = "gate"\nurl = "file://{ROOT}/models/clips/line-a.mp4"\nloop = true\n'
        f'max_fps = 5\nsnapshot_interval_s = 1\n'
    )
    log = open(folder / "noblink.log", "w")
    children.append(subprocess.Popen([NOBLINK, "run", "--config", folder / "noblink.toml"], stderr=log))
    ha = HomeAssistant(folder / "ha", port)
    try:
        look(ha, port, files, model)
    except BaseException:
        print(f"see {folder}", file=sys.stderr)
        raise
    finally:
        if ha.child:
            ha.stop()
        for child in children:
            child.terminate()


def publish(port, topic, payload):
    subprocess.run(["mosquitto_pub", "-h", "127.0.0.1", "-p", str(port), "-q", "1", "-t", topic,
                    "-m", payload], check=True)


def look(ha, port, files, model):
    ha.start()
    from homeassistant.const import __version__
    print(f"Home Assistant {__version__}")

    def entity(name, state, seconds=30):
        until(f"{name} is {state}", seconds, lambda: ha.state(name) == state)

    entity("update.noblink_shop_model", "off", 60)
    until("a plate is seen", 60, lambda: ha.state("binary_sensor.gate_plate") == "on")
    until("frames come in", 30, lambda: ha.number("sensor.gate_frame_rate") > 3)
    until("a picture", 30, lambda: ha.state("image.gate_last_picture") not in (None, "unknown"))
    assert ha.call("/api/image_proxy/image.gate_last_picture")[:2] == b"\xff\xd8"
    for name, state in sorted(ha.states().items()):
        if ".gate" in name or "noblink" in name:
            print(f"  {name:<40} {state['state']:<12} {state['attributes'].get('friendly_name')}")

    print("Detection is switched off and on")
    ha.act("switch", "turn_off", "switch.gate_detection")
    entity("switch.gate_detection", "off")
    entity("binary_sensor.gate_stream", "off")
    entity("binary_sensor.gate_plate", "unavailable")
    ha.act("switch", "turn_on", "switch.gate_detection")
    entity("binary_sensor.gate_stream", "on", 60)
    until("counts again", 30, lambda: ha.state("binary_sensor.gate_plate") in ("on", "off"))

    print("A model waits, is installed by Home Assistant, and rolled back")
    name, lives = "update.noblink_shop_model", []

    def living(state, **attributes):
        def look():
            seen = ha.states()[name]
            now = (seen["state"], {k: seen["attributes"][k] for k in
                                   ("installed_version", "latest_version", "in_progress",
                                    "update_percentage")})
            if not lives or lives[-1] != now:
                lives.append(now)
                print(f"  {now[0]:<4} {now[1]}")
            return now[0] == state and all(now[1][k] == v for k, v in attributes.items())
        until(f"{name} {state} {attributes}", 300, look)

    one, two = "plates 1 (03a0a3cf)", "plates 2 (6d38f97d)"
    living("off", installed_version=one, in_progress=False)
    publish(port, "noblink/v1/shop/cmd/models/desired", json.dumps({
        "schema": "noblink.desired/1", "id": "r17", "install": "manual",
        "source": f"http://127.0.0.1:{files}/plates-v2.onnx",
        "manifest": {"sha256": hashlib.sha256(model).hexdigest(), "size": len(model)}}))
    living("on", latest_version=two, in_progress=False)
    print("  asks:", ha.states()[name]["attributes"]["release_summary"])
    ha.act("update", "install", name)
    living("on", latest_version=two, in_progress=True)
    living("off", installed_version=two, in_progress=False)
    until("scratches", 30, lambda: "sensor.gate_scratch_count" in ha.states())
    entity("sensor.noblink_shop_last_model_job", "succeeded")
    ha.act("button", "press", "button.noblink_shop_roll_back_the_model")
    living("off", installed_version=one, in_progress=False)
    until("no scratches", 30, lambda: "sensor.gate_scratch_count" not in ha.states())

    print("Home Assistant restarts and finds all of it again")
    before = set(ha.states())
    ha.stop()
    ha.start()
    until("the same entities", 60, lambda: before <= set(ha.states()))
    entity(name, "off", 60)

    complaints = ha.complaints()
    print("\n".join(complaints) or "No warning about MQTT in Home Assistant's log")
    assert not complaints


if __name__ == "__main__":
    main()
