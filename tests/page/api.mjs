// Schemathesis asks a real box whatever docs/openapi.json allows, and more: no answer may be a
// server error, or one that is not described. The two endless streams are left to tests/api.rs.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { openBox, shipped } from "./box.mjs";

const box = await openBox({ cameras: ["line-b"] });
const checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method,use_after_free";
const child = spawn(shipped("target/schemathesis/bin/python"), [
  "-m", "schemathesis.cli", "run", shipped("docs/openapi.json"), "--url", box.url, "--checks", checks, "--phases", "examples,coverage,fuzzing",
  "--mode", "all", "--max-examples", process.env.EXAMPLES ?? "30", "--seed", "1", "--exclude-path-regex", "/(events|live)$",
  "--request-timeout", "30", "--no-color",
], { stdio: "inherit", cwd: shipped("target") }); // which keeps a cache where it is started
const [code] = await once(child, "exit");
if (code) console.log(box.service.said().slice(-3000));
await box.close();
process.exit(code ?? 1);
