// A box as somebody has it: noblink, a Mosquitto, two RTSP cameras, each a process of its own on
// loopback, so that each can be killed and started again.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { appendFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

/** A file of the checkout. */
export const shipped = (path) => fileURLToPath(new URL(`../../${path}`, import.meta.url));

const freePort = async () => {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  await once(server, "close");
  return port;
};

const answers = (port) => new Promise((resolve) => {
  const socket = connect(port, "127.0.0.1");
  socket.on("connect", () => { socket.destroy(); resolve(true); });
  socket.on("error", () => resolve(false));
});

/** A program that listens on a port, ended by `kill -9`. */
class Program {
  constructor(name, port, dir, command, ...args) {
    Object.assign(this, { name, port, command, args, child: null, log: join(dir, `${name}.log`) });
  }

  /** Returns when it listens. */
  async start() {
    this.child = spawn(this.command, this.args, { stdio: ["ignore", "pipe", "pipe"] });
    for (const out of [this.child.stdout, this.child.stderr]) out.on("data", (text) => appendFileSync(this.log, text));
    const deadline = Date.now() + 20_000;
    while (!(await answers(this.port))) {
      if (this.child.exitCode != null || Date.now() > deadline) throw new Error(`${this.name} does not listen:\n${this.said()}`);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }

  async kill() {
    if (this.child?.exitCode !== null || this.child.signalCode) return;
    this.child.kill("SIGKILL");
    await once(this.child, "exit");
  }

  said() {
    return readFileSync(this.log, { encoding: "utf8", flag: "a+" });
  }
}

/** Starts one. `models`: lines of `[models]`; `cameras`: their clips; `each`: lines of every camera;
 * `token`: not on loopback alone. */
export async function openBox({ models = plates(), cameras = ["line-a", "line-b"], each = "", token } = {}) {
  const dir = mkdtempSync(join(tmpdir(), "noblink-page-"));
  const [mqtt, web] = [await freePort(), await freePort()];
  writeFileSync(join(dir, "mosquitto.conf"), `user root\nlistener ${mqtt} 127.0.0.1\nallow_anonymous true\n`);
  const broker = new Program("broker", mqtt, dir, "mosquitto", "-c", join(dir, "mosquitto.conf"));
  const built = shipped("target/debug");
  const box = { dir, broker, cameras: {}, url: `http://127.0.0.1:${web}` };
  let config = `[device]\nid = "edge-1"\nstate_dir = "${dir}/state"\n[mqtt]\nurl = "mqtt://127.0.0.1:${mqtt}"\n`;
  config += `[web]\nlisten = "${token ? "0.0.0.0" : "127.0.0.1"}:${web}"\n`;
  if (token) {
    writeFileSync(join(dir, "token"), token);
    config += `token_file = "${dir}/token"\n`;
  }
  config += models;
  for (const id of cameras) {
    const port = await freePort();
    config += `[[camera]]\nid = "${id}"\nurl = "rtsp://127.0.0.1:${port}/clip"\nqueue = 32\n${each}\n`; // room for the hiccups of a busy machine
    box.cameras[id] = new Program(id, port, dir, `${built}/examples/camera`, `${port}`, shipped(`models/clips/${id}.mp4`));
  }
  writeFileSync(join(dir, "noblink.toml"), config);
  box.service = new Program("noblink", web, dir, `${built}/noblink`, "run", "--config", join(dir, "noblink.toml"));
  const all = [broker, ...Object.values(box.cameras), box.service];
  box.close = async () => {
    for (const program of all.reverse()) await program.kill();
    rmSync(dir, { recursive: true });
  };
  try {
    for (const program of all) await program.start();
  } catch (error) {
    await box.close();
    throw error;
  }
  return box;
}

/** The demo's first model, and the pictures that judge those to come. */
export function plates() {
  return `[models]\nfactory = "${shipped("models/plates-v1.onnx")}"\nprobation_s = 3\n` +
    `[models.calibration]\ndir = "${shipped("models/calibration")}"\n`;
}
