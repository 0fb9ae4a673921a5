//! The repository's rules, held by tests.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join("src"), &mut found);
    let name = |p: &PathBuf| p.strip_prefix(root()).unwrap().display().to_string();
    found.iter().map(|p| (name(p), fs::read_to_string(p).unwrap())).collect()
}

/// Files that use a crate, comments aside.
fn users_of(krate: &str) -> Vec<String> {
    let path = format!("{krate}::");
    let uses = |text: &str| {
        text.lines().any(|line| {
            let code = line.split("//").next().unwrap_or("");
            code.match_indices(&path).any(|(at, _)| {
                !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
            })
        })
    };
    let mut users: Vec<_> =
        sources().into_iter().filter(|(_, text)| uses(text)).map(|(name, _)| name).collect();
    users.sort();
    users
}

#[test]
fn what_may_be_exchanged_one_day_is_named_in_one_place() {
    assert_eq!(users_of("rumqttc"), ["src/mqtt/listener.rs", "src/mqtt/wire.rs"]);
    assert_eq!(users_of("mqtt5"), ["src/mqtt/broker.rs"]);
    assert_eq!(users_of("arc_swap"), ["src/model/slot.rs"]);
    let ort = ["src/model/engine.rs", "src/model/runtime.rs", "src/model/winograd/operator.rs"];
    assert_eq!(users_of("ort"), ort);
}

/// deny.toml ignores advisories against rustls-webpki 0.102 because nothing but rumqttc, which
/// takes one variant of an error type from it, depends on it.
#[test]
fn nothing_but_rumqttc_depends_on_the_old_webpki() {
    let lock: toml::Table = fs::read_to_string(root().join("Cargo.lock")).unwrap().parse().unwrap();
    let packages = lock["package"].as_array().unwrap();
    let depends = |package: &&toml::Value| {
        let dependencies = package.get("dependencies").and_then(|d| d.as_array());
        dependencies
            .into_iter()
            .flatten()
            .any(|d| d.as_str().is_some_and(|d| d.starts_with("rustls-webpki 0.102")))
    };
    let users: Vec<_> =
        packages.iter().filter(depends).map(|p| p["name"].as_str().unwrap()).collect();
    assert_eq!(users, ["rumqttc"]);
}

#[test]
fn a_file_fits_into_a_head() {
    for (name, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= 600, "{name} has {lines} lines: split it along the data");
    }
}

/// `say!` lets whoever reads leave; the others panic then.
#[test]
fn commands_print_by_one_macro() {
    let prints = |text: &str| text.contains(" println!(") || text.contains(" print!(");
    let users: Vec<_> = sources().into_iter().filter(|(_, text)| prints(text)).collect();
    let names: Vec<_> = users.iter().map(|(name, _)| &**name).collect();
    assert_eq!(names, ["src/update/gates/child.rs"], "which speaks to its parent");
}

#[test]
fn the_readme_shows_real_output() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let left = |line: &&str| line.starts_with('@') && line.ends_with('@');
    assert_eq!(readme.lines().find(left), None, "is to be filled with what the program prints");
}

/// The README shows the commands that do all the set-up, and every command that there is.
#[test]
fn the_readme_names_every_command() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for command in ["make demo", "make test", "noblink run", "noblink check", "noblink probe"] {
        assert!(readme.contains(command), "README.md does not show `{command}`");
    }
    for command in ["model inspect", "bench pipeline"] {
        assert!(readme.contains(command), "README.md does not show `{command}`");
    }
}

/// Each pitfall in docs/mqtt.md has its row, and each test named there is one.
#[test]
fn every_pitfall_of_mqtt_names_its_answer() {
    let text = |file: &str| fs::read_to_string(root().join(file)).unwrap();
    let mut tests = text("tests/soak.rs") + &text("tests/config.rs");
    for entry in fs::read_dir(root().join("tests/mqtt")).unwrap() {
        tests += &fs::read_to_string(entry.unwrap().path()).unwrap();
    }
    let doc = text("docs/mqtt.md");
    for n in 1..=23 {
        let row = doc.lines().find(|line| line.starts_with(&format!("| P{n} |")));
        let answer = row.unwrap_or_else(|| panic!("no row P{n}")).rsplit('|').nth(1).unwrap();
        let names: Vec<_> = answer.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "P{n} names neither test nor code");
        for name in names.into_iter().filter(|n| n.contains('_')) {
            assert!(tests.contains(&format!("fn {name}(")), "P{n}: {name} is no test");
        }
    }
}
