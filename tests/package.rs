//! What is installed on a box: the unit, the configuration it starts with, what the package names.
//! Installing, upgrading and purging for real needs root and systemd: docs/install.md tells what was seen.

use std::collections::BTreeSet;
use std::process::Command;

use noblink::config::Config;

use crate::harness::service::{Service, noblink_output, shipped};
use crate::harness::{free_port, until};

fn read(relative: &str) -> String {
    std::fs::read_to_string(shipped(relative)).unwrap_or_else(|e| panic!("{relative}: {e}"))
}

/// The metadata of `cargo deb`.
fn metadata() -> toml::Table {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    manifest["package"]["metadata"]["deb"].as_table().unwrap().clone()
}

/// Runs `systemd-analyze` on the unit, as if the package were installed here.
fn analyze(args: &[&str]) -> (bool, String) {
    let dir = tempfile::tempdir().unwrap();
    let unit = dir.path().join("noblink.service");
    let installed =
        read("systemd/noblink.service").replace("/usr/bin/noblink", env!("CARGO_BIN_EXE_noblink"));
    std::fs::write(&unit, installed).unwrap();
    let output = Command::new("systemd-analyze")
        .args(args)
        .arg(&unit)
        .output()
        .expect("systemd is installed: scripts/setup --tests");
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

#[test]
fn systemd_understands_every_line_of_the_unit() {
    let (good, said) = analyze(&["verify", "--man=no"]);
    let about_it: Vec<_> = said.lines().filter(|line| line.contains("noblink.service")).collect();
    assert!(good && about_it.is_empty(), "{said}");
}

/// systemd counts in tenths.
#[test]
fn the_unit_is_exposed_by_two_of_ten_at_most() {
    let (good, said) = analyze(&["security", "--offline=yes", "--threshold=20"]);
    assert!(said.contains("Overall exposure level for noblink.service"), "{said}");
    assert!(good, "{said}");
}

#[test]
fn the_package_depends_on_the_plugins_that_the_setup_installs() {
    let plugins = |words: &mut dyn Iterator<Item = &str>| -> BTreeSet<String> {
        words.filter(|w| w.starts_with("gstreamer1.0-")).map(str::to_owned).collect()
    };
    let setup = read("scripts/setup");
    let run = setup.split("\npackages=(").nth(1).unwrap().split("\n)").next().unwrap();
    let deb = metadata();
    let depends = deb["depends"].as_array().unwrap();
    let depends = plugins(&mut depends.iter().map(|d| d.as_str().unwrap()));
    assert_eq!(depends, plugins(&mut run.split_whitespace()));
    assert_eq!(depends.len(), 4);
    let container = read("Containerfile");
    assert_eq!(depends, plugins(&mut container.split_whitespace()), "Containerfile");
}

#[test]
fn the_package_holds_what_there_is_and_no_model() {
    for asset in metadata()["assets"].as_array().unwrap() {
        let source = asset[0].as_str().unwrap();
        assert!(!source.contains("onnx") || source.starts_with("lib/onnxruntime/"), "{source}");
        if source.starts_with("target/") {
            continue;
        }
        let (folder, pattern) = source.rsplit_once('/').unwrap_or((".", source));
        let (start, end) = pattern.split_once('*').unwrap_or((pattern, ""));
        let found = std::fs::read_dir(shipped(folder)).unwrap().any(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.starts_with(start) && name.ends_with(end)
        });
        assert!(found, "{source} does not exist");
    }
}

/// Credentials that the unit loads are those that the samples name.
#[test]
fn the_unit_loads_the_credentials_that_the_samples_name() {
    let unit = read("systemd/noblink.service");
    let samples = read("systemd/noblink.toml") + &read("debian/noblink.toml");
    let loaded: Vec<_> = unit.lines().filter_map(|l| l.strip_prefix("LoadCredential=")).collect();
    assert_eq!(loaded, ["mqtt-password", "client.key"]);
    for name in loaded {
        assert!(samples.contains(&format!("\"{name}\"")), "{name}");
    }
}

/// A fresh box: no camera, no model, and a service that runs and says what to do.
#[test]
fn the_installed_configuration_runs_and_says_what_to_do_next() {
    let installed = read("debian/noblink.toml");
    let parsed = Config::parse(&installed, &shipped("debian")).expect("it is valid");
    assert!(parsed.cameras.is_empty() && parsed.models.factory.is_none());
    assert_eq!(parsed.device.state_dir, std::path::Path::new("/var/lib/noblink"));
    let here = installed
        .replace("[device]", "[device]\nstate_dir = \"state\"")
        .replace("[mqtt]", &format!("[mqtt]\nembedded_port = {}", free_port()));
    let mut service = Service::start(&here);
    service.says("no camera yet: `noblink probe URL`", 20);
    service.says("no model yet: put an ONNX file into", 20);
    let file = service.dir.path().join("noblink.toml");
    let status = |more: &[&str]| {
        let args = [&["status", "--config", file.to_str().unwrap()], more].concat();
        let output = noblink_output(&args);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code(), said + &String::from_utf8_lossy(&output.stderr))
    };
    until("the link stands", 20, || status(&[]).1.contains("link    connected"));
    let (code, said) = status(&[]);
    assert_eq!(code, Some(0), "{said}");
    for line in ["edge-1 runs noblink", "model   none", "next    no camera", "next    no model"] {
        assert!(said.contains(line), "{line:?} is not in:\n{said}");
    }
    let json: serde_json::Value = serde_json::from_str(&status(&["--json"]).1).unwrap();
    assert_eq!(json["advice"].as_array().unwrap().len(), 2, "{json}");
    assert_eq!(service.stop().code(), Some(0));
    let (code, said) = status(&[]);
    assert_eq!(code, Some(1));
    assert!(said.contains("is the service running?"), "{said}");
}
