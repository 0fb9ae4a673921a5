//! Every key has its wrong value with the exact message, and the sample says what the code does.

use std::collections::BTreeSet;
use std::path::Path;

use noblink::camera::source::{Source, mask};
use noblink::config::{Broker, Config};

const VALID: &str = r#"
[device]
id = "edge-1"
[mqtt]
embedded = true
[[camera]]
id = "gate"
url = "rtsp://10.0.0.7/stream1"
"#;

const EXTERNAL: &str = r#"
[device]
id = "edge-1"
[mqtt]
url = "mqtts://broker.local"
[[camera]]
id = "gate"
url = "file:///clip.mp4"
"#;

const CALIBRATED: &str = r#"
[device]
id = "edge-1"
[mqtt]
embedded = true
[[camera]]
id = "gate"
url = "test://"
[models.calibration]
dir = "calibration"
"#;

/// The problems of a configuration in which `key` of its section is set to `value` (TOML), or
/// taken out when there is none.
fn problems(base: &str, key: &str, value: Option<&str>) -> Vec<String> {
    let mut table: toml::Table = base.parse().unwrap();
    let (section, name) = key.split_once('.').unwrap_or(("", key));
    let target = match section {
        "" => &mut table,
        "camera" => table["camera"][0].as_table_mut().unwrap(),
        other => table.entry(other).or_insert(toml::Table::new().into()).as_table_mut().unwrap(),
    };
    let (target, name) = match name.split_once('.') {
        Some((inner, name)) => {
            let inner = target.entry(inner).or_insert(toml::Table::new().into());
            (inner.as_table_mut().unwrap(), name)
        }
        None => (target, name),
    };
    match value {
        Some(value) => {
            let parsed: toml::Table = format!("v = {value}").parse().unwrap();
            target.insert(name.to_owned(), parsed["v"].clone());
        }
        None => drop(target.remove(name)),
    }
    match Config::parse(&table.to_string(), Path::new("/etc/noblink")) {
        Ok(_) => Vec::new(),
        Err(problems) => problems.iter().map(ToString::to_string).collect(),
    }
}

/// Base, key, wrong value, the one message.
type Row = (&'static str, &'static str, Option<&'static str>, &'static str);

const SLUG: &str = "must be 1 to 32 of a-z, 0-9, _ and -, starting with a letter or digit";

const WRONG: &[Row] = &[
    (VALID, "device", None, "device is missing: must be a section [device]"),
    (
        VALID,
        "device.id",
        None,
        "device.id is missing: must be 1 to 32 of a-z, 0-9, _ and -, starting with a letter or digit",
    ),
    (
        VALID,
        "device.id",
        Some("\"Edge 1\""),
        "device.id = \"Edge 1\": must be 1 to 32 of a-z, 0-9, _ and -, starting with a letter or digit",
    ),
    (VALID, "device.state_dir", Some("7"), "device.state_dir = 7: must be a path"),
    (
        VALID,
        "device.stat_dir",
        Some("\"/x\""),
        "device.stat_dir is not a known key; did you mean state_dir?",
    ),
    (
        VALID,
        "device.colour",
        Some("1"),
        "device.colour is not a known key; known here: id, state_dir",
    ),
    (
        VALID,
        "mqtt.embedded",
        None,
        "mqtt.url is missing: write url = \"mqtt://host:1883\" for a broker of yours, or embedded = true for the broker inside (loopback only)",
    ),
    (VALID, "mqtt.embedded", Some("\"yes\""), "mqtt.embedded = \"yes\": must be true or false"),
    (
        VALID,
        "mqtt.embedded_port",
        Some("70000"),
        "mqtt.embedded_port = 70000: must be a whole number from 0 to 65535",
    ),
    (
        EXTERNAL,
        "mqtt.embedded_port",
        Some("1884"),
        "mqtt.embedded_port goes with embedded = true: remove it",
    ),
    (
        EXTERNAL,
        "mqtt.embedded",
        Some("true"),
        "mqtt.embedded = true and url are both set: keep one of them",
    ),
    (
        EXTERNAL,
        "mqtt.url",
        Some("7"),
        "mqtt.url = 7: must be a broker: mqtt://host:1883 or mqtts://host:8883",
    ),
    (
        EXTERNAL,
        "mqtt.url",
        Some("\"broker.local\""),
        "mqtt.url = \"broker.local\": is no URL (relative URL without a base); write mqtt://host:1883",
    ),
    (
        EXTERNAL,
        "mqtt.url",
        Some("\"http://broker\""),
        "mqtt.url = \"http://broker\": scheme http:// is not mqtt:// or mqtts://",
    ),
    (
        EXTERNAL,
        "mqtt.url",
        Some("\"mqtt://u:secret@broker\""),
        "mqtt.url = \"mqtt://***@broker\": holds credentials: use username and password_file",
    ),
    (
        EXTERNAL,
        "mqtt.url",
        Some("\"mqtt://broker/x\""),
        "mqtt.url = \"mqtt://broker/x\": a path or query means nothing here: remove it",
    ),
    (
        EXTERNAL,
        "mqtt.url",
        Some("\"mqtt://[::1]\""),
        "mqtt.url = \"mqtt://[::1]\": IPv6 literals are not supported: use a host name that resolves to it",
    ),
    (
        EXTERNAL,
        "mqtt.username",
        Some("true"),
        "mqtt.username = true: must be the broker's user name",
    ),
    (
        VALID,
        "mqtt.username",
        Some("\"u\""),
        "mqtt.username goes with url, not with embedded = true: remove one of them",
    ),
    (
        EXTERNAL,
        "mqtt.password_file",
        Some("\"p\""),
        "mqtt.username is missing: it goes with password_file",
    ),
    (EXTERNAL, "mqtt.password_file", Some("[]"), "mqtt.password_file = []: must be a path"),
    (EXTERNAL, "mqtt.ca_file", Some("1"), "mqtt.ca_file = 1: must be a path"),
    (
        EXTERNAL,
        "mqtt.client_cert_file",
        Some("\"c.pem\""),
        "mqtt.client_key_file is missing: it goes with client_cert_file",
    ),
    (
        EXTERNAL,
        "mqtt.client_key_file",
        Some("\"c.key\""),
        "mqtt.client_cert_file is missing: it goes with client_key_file",
    ),
    (
        VALID,
        "mqtt.prefix",
        Some("\"a/b\""),
        "mqtt.prefix = \"a/b\": must be 1 to 64 of a-z, A-Z, 0-9, _ and -",
    ),
    (VALID, "camera", Some("1"), "camera = 1: must be one or more sections [[camera]]"),
    (
        VALID,
        "camera.id",
        Some("\"-x\""),
        "camera[0].id = \"-x\": must be 1 to 32 of a-z, 0-9, _ and -, starting with a letter or digit",
    ),
    (
        VALID,
        "camera.url",
        None,
        "camera[0].url is missing: must be rtsp://, rtsps://, file://, v4l2:// or test://",
    ),
    (
        VALID,
        "camera.pipeline",
        Some("\"../x\""),
        "camera[0].pipeline = \"../x\": must be the name of a template in pipelines/: a-z, 0-9, -",
    ),
    (
        VALID,
        "camera.max_fps",
        Some("0"),
        "camera[0].max_fps = 0: must be a number from 0.01 to 240",
    ),
    (
        VALID,
        "camera.publish",
        Some("\"some\""),
        "camera[0].publish = \"some\": must be one of \"objects\", \"all\"",
    ),
    (
        VALID,
        "camera.labels",
        Some("[]"),
        "camera[0].labels = []: must be a list of labels of the model",
    ),
    (
        VALID,
        "camera.labels",
        Some("[\"a\", 1]"),
        "camera[0].labels = [\"a\", 1]: must be a list of labels of the model",
    ),
    (
        VALID,
        "camera.confidence",
        Some("1.5"),
        "camera[0].confidence = 1.5: must be a number from 0.01 to 0.99",
    ),
    (
        VALID,
        "camera.publish_max_hz",
        Some("\"5\""),
        "camera[0].publish_max_hz = \"5\": must be a number from 0.01 to 240",
    ),
    (
        VALID,
        "camera.snapshot_interval_s",
        Some("0"),
        "camera[0].snapshot_interval_s = 0: must be a number from 1 to 3600",
    ),
    (VALID, "camera.queue", Some("0"), "camera[0].queue = 0: must be a whole number from 1 to 64"),
    (
        VALID,
        "camera.stall_timeout_s",
        Some("0.5"),
        "camera[0].stall_timeout_s = 0.5: must be a number from 1 to 300",
    ),
    (
        VALID,
        "camera.color",
        Some("\"rgb\""),
        "camera[0].color = \"rgb\": must be one of \"bt601\", \"bt709\"",
    ),
    (
        VALID,
        "camera.realtime",
        Some("true"),
        "camera[0].realtime goes with a file:// url: remove it",
    ),
    (EXTERNAL, "camera.realtime", Some("1"), "camera[0].realtime = 1: must be true or false"),
    (EXTERNAL, "camera.loop", Some("\"yes\""), "camera[0].loop = \"yes\": must be true or false"),
    (
        VALID,
        "inference.provider",
        Some("\"gpu\""),
        "inference.provider = \"gpu\": must be one of \"auto\", \"cpu\", \"openvino\", \"cuda\", \"tensorrt\"",
    ),
    (
        VALID,
        "inference.threads",
        Some("0"),
        "inference.threads = 0: must be a whole number from 1 to 64",
    ),
    (
        VALID,
        "inference.cores",
        Some("[0, 0]"),
        "inference.cores = [0, 0]: must be a list of different whole numbers from 0 to 1023",
    ),
    (
        VALID,
        "inference.confidence",
        Some("0"),
        "inference.confidence = 0: must be a number from 0.01 to 0.99",
    ),
    (
        VALID,
        "inference.iou",
        Some("1.0"),
        "inference.iou = 1.0: must be a number from 0.05 to 0.99",
    ),
    (VALID, "inference.library", Some("\"\""), "inference.library = \"\": must be a path"),
    (VALID, "models.factory", Some("false"), "models.factory = false: must be a path"),
    (VALID, "models.inbox", Some("1"), "models.inbox = 1: must be a path"),
    (
        VALID,
        "models.public_keys",
        Some("[]"),
        "models.public_keys = []: must be a list of minisign public keys (RWQ…)",
    ),
    (
        VALID,
        "models.accept_stages",
        Some("\"production\""),
        "models.accept_stages = \"production\": must be a list of stages, such as [\"production\"]",
    ),
    (
        VALID,
        "models.probation_s",
        Some("-1"),
        "models.probation_s = -1: must be a whole number from 0 to 86400",
    ),
    (
        VALID,
        "models.latency_ratio_max",
        Some("0.5"),
        "models.latency_ratio_max = 0.5: must be a number from 1 to 100",
    ),
    (
        VALID,
        "models.latency_budget_ms",
        Some("0"),
        "models.latency_budget_ms = 0: must be a number from 0.1 to 60000",
    ),
    (
        VALID,
        "models.custom_op_domains",
        Some("\"com.acme\""),
        "models.custom_op_domains = \"com.acme\": must be a list of operator domains",
    ),
    (
        VALID,
        "models.proving_cpu_s",
        Some("0"),
        "models.proving_cpu_s = 0: must be a whole number from 1 to 3600",
    ),
    (VALID, "models.calibration.dir", Some("1"), "models.calibration.dir = 1: must be a path"),
    (
        CALIBRATED,
        "models.calibration.min_recall",
        Some("80"),
        "models.calibration.min_recall = 80: must be a number from 0 to 1",
    ),
    (
        CALIBRATED,
        "models.calibration.min_precision",
        Some("\"high\""),
        "models.calibration.min_precision = \"high\": must be a number from 0 to 1",
    ),
    (
        VALID,
        "models.calibration.margin",
        Some("0.1"),
        "models.calibration.dir is missing: margin says what to ask of its pictures",
    ),
    (VALID, "models.inbox", Some("1"), "models.inbox = 1: must be a path"),
    (
        VALID,
        "models.public_keys",
        Some("7"),
        "models.public_keys = 7: must be a list of minisign public keys (RWQ…)",
    ),
    (
        VALID,
        "models.accept_stages",
        Some("[]"),
        "models.accept_stages = []: must be a list of stages, such as [\"production\"]",
    ),
    (
        VALID,
        "models.probation_s",
        Some("-1"),
        "models.probation_s = -1: must be a whole number from 0 to 86400",
    ),
    (
        CALIBRATED,
        "models.calibration.min_objects",
        Some("0"),
        "models.calibration.min_objects = 0: must be a whole number from 1 to 300",
    ),
    (
        VALID,
        "models.allowed_hosts",
        Some("[\"https://models.example\"]"),
        "models.allowed_hosts = [\"https://models.example\"]: must be a list of hosts, each host or host:port, without a scheme",
    ),
    (VALID, "models.ca_file", Some("1"), "models.ca_file = 1: must be a path"),
    (
        VALID,
        "models.max_size_mb",
        Some("0"),
        "models.max_size_mb = 0: must be a whole number from 1 to 2000",
    ),
    (
        VALID,
        "outbox.max_mb",
        Some("8"),
        "outbox.max_mb = 8: must be a whole number from 16 to 1000000",
    ),
    (
        VALID,
        "outbox.durability",
        Some("\"sometimes\""),
        "outbox.durability = \"sometimes\": must be one of \"memory\", \"always\"",
    ),
    (
        VALID,
        "web.listen",
        Some("\"8080\""),
        "web.listen = \"8080\": must be an IP address and a port, or \"off\"",
    ),
    (
        VALID,
        "web.listen",
        Some("\"0.0.0.0:8080\""),
        "web.token_file is missing: a page that others can reach wants a token; name a file that holds one",
    ),
    (VALID, "web.token_file", Some("1"), "web.token_file = 1: must be a path"),
    (
        VALID,
        "page.listen",
        Some("\"x\""),
        "page is not a known key; known here: device, mqtt, camera, inference, models, outbox, web, homeassistant",
    ),
    (
        VALID,
        "homeassistant.discovery_prefix",
        Some("\"home/assistant\""),
        "homeassistant.discovery_prefix = \"home/assistant\": must be 1 to 64 of a-z, A-Z, 0-9, _ and -",
    ),
];

#[test]
fn wrong_values_get_their_exact_message() {
    for (base, key, value, message) in WRONG {
        assert_eq!(problems(base, key, *value), [*message], "{key} = {value:?}");
    }
    assert!(WRONG.iter().any(|row| row.3.ends_with(SLUG)));
}

#[test]
fn every_key_has_a_wrong_value() {
    let keys: BTreeSet<String> = Config::keys().into_iter().map(|k| k.path).collect();
    let rows: BTreeSet<String> = WRONG.iter().map(|row| row.1.to_owned()).collect();
    let without: Vec<_> = keys.difference(&rows).collect();
    assert!(keys.len() > 30 && without.is_empty(), "keys without a row: {without:?}");
}

#[test]
fn wrong_urls_get_their_exact_message() {
    let rows = [
        (
            "gate.local/stream",
            "is no URL (relative URL without a base); write rtsp://, rtsps://, file://, v4l2:// or test://",
        ),
        (
            "http://gate/stream",
            "scheme http:// is not known; write rtsp://, rtsps://, file://, v4l2:// or test://",
        ),
        ("rtsp:///stream", "has no host; write rtsp://user:password@host/path"),
        ("file://clip.mp4", "is no absolute path; write file:///folder/clip.mp4"),
        ("file:///", "is no absolute path; write file:///folder/clip.mp4"),
        ("v4l2:///etc/passwd", "is no device; write v4l2:///dev/video0"),
        ("test://?fps=0", "fps=0: must be a whole number from 1 to 240"),
        ("test://?width=8", "width=8: must be a whole number from 16 to 7680"),
        ("test://?depth=8", "parameter depth is not width, height or fps"),
    ];
    for (url, message) in rows {
        assert_eq!(Source::parse(url).unwrap_err().to_string(), message, "{url}");
    }
}

#[test]
fn all_problems_are_reported_at_once() {
    let text = "[device]\nid = \"A\"\n[mqtt]\n[[camera]]\nid = \"x\"\nurl = \"x\"\nqueue = 0\n";
    let problems = Config::parse(text, Path::new(".")).unwrap_err();
    let paths: Vec<_> = problems.iter().map(|p| p.path.as_str()).collect();
    assert_eq!(paths, ["device.id", "mqtt.url", "camera[0].url", "camera[0].queue"]);
}

#[test]
fn a_fresh_box_has_no_camera() {
    assert_eq!(problems(VALID, "camera", None), [""; 0]);
}

#[test]
fn what_differs_beside_the_cameras_is_listed_by_its_keys() {
    let parse = |text: &str| Config::parse(text, Path::new("/")).unwrap();
    let other = CALIBRATED.replace("test://", "test://?fps=5").replace("edge-1", "edge-2")
        + "min_recall = 0.9\n[inference]\nthreads = 1\n";
    let (before, after) = (parse(CALIBRATED), parse(&other));
    assert_eq!(
        before.differs_beside_cameras(&after),
        ["device.id", "inference.threads", "models.calibration.min_recall"]
    );
    let cameras = CALIBRATED.replace("test://", "test://?fps=5");
    assert_eq!(before.differs_beside_cameras(&parse(&cameras)), [""; 0]);
}

#[test]
fn two_cameras_with_one_id_are_refused() {
    // Also when there is something else to say of one of them.
    for url in ["test://", "ftp://x"] {
        let text = format!("{VALID}\n[[camera]]\nid = \"gate\"\nurl = \"{url}\"\n");
        let problems = Config::parse(&text, Path::new(".")).unwrap_err();
        let said: Vec<_> = problems.iter().map(ToString::to_string).collect();
        let wanted = "camera[1].id = \"gate\": another camera has this id";
        assert!(said.iter().any(|p| p == wanted), "{said:?}");
    }
}

#[test]
fn relative_paths_start_at_the_configuration() {
    let text = format!("{VALID}[models]\nfactory = \"m.onnx\"\n");
    let config = Config::parse(&text, Path::new("/etc/noblink")).unwrap();
    assert_eq!(config.models.factory.unwrap(), Path::new("/etc/noblink/m.onnx"));
}

#[test]
fn brokers_get_their_usual_port() {
    let config = Config::parse(EXTERNAL, Path::new(".")).unwrap();
    let Broker::External(broker) = config.mqtt.broker else {
        panic!("a url is no embedded broker")
    };
    assert_eq!((broker.host.as_str(), broker.port, broker.tls), ("broker.local", 8883, true));
}

#[test]
fn credentials_are_masked_in_any_text() {
    let rows = [
        ("rtsp://user:pass@10.0.0.7/stream1", "rtsp://***@10.0.0.7/stream1"),
        ("rtsp://user:pa/ss@10.0.0.7/stream1", "rtsp://***@10.0.0.7/stream1"),
        ("rtsp://user:pa@ss?@10.0.0.7/a", "rtsp://***@10.0.0.7/a"),
        ("rtsp://10.0.0.7/a?user=x&password=y", "rtsp://10.0.0.7/a?***"),
        ("rtsp://10.0.0.7/a", "rtsp://10.0.0.7/a"),
        // What reads URLs forgives such slashes.
        ("https:user:pass@host/a", "https://***@host/a"),
        ("https:/\\user:pass@host/a", "https://***@host/a"),
        ("https:user:pass@host/a://b", "https://***@host/a://b"),
        ("rtsp:/\t/user:pass@10.0.0.7/a", "rtsp://***@10.0.0.7/a"),
        ("no url", "no url"),
    ];
    for (url, shown) in rows {
        assert_eq!(mask(url), shown);
    }
    let source = Source::parse("rtsp://user:pass@10.0.0.7/stream1").unwrap();
    assert!(!format!("{source} {source:?}").contains("pass"));
}

/// The TOML reader's own words quote the line.
#[test]
fn a_file_that_is_no_toml_is_not_quoted() {
    let text = "[[camera]]\nurl = \"rtsp://user:pass@10.0.0.7/\u{17}\"\n";
    let problems = Config::parse(text, Path::new("/")).unwrap_err();
    let [problem] = &problems[..] else { panic!("{problems:?}") };
    let said = problem.to_string();
    assert!(said.starts_with("is not TOML: line 2, column 34: "), "{said}");
    assert!(!said.contains("pass") && !said.contains('\n'), "{said}");
}

/// The annotated sample holds every key; uncommented, it holds the defaults of the code.
#[test]
fn the_sample_equals_the_defaults() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/noblink.toml");
    let sample = std::fs::read_to_string(path).unwrap();
    Config::parse(&sample, Path::new("/etc/noblink")).expect("the sample is valid as it is");

    let mut section = String::new();
    let mut said = BTreeSet::new();
    let keys = Config::keys();
    for line in sample.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.split(']').next().unwrap().trim_matches('[').to_owned();
        }
        let setting = line.strip_prefix('#').unwrap_or(line);
        let Some((name, value)) = setting.split_once(" = ") else { continue };
        if name.contains(' ') || name.starts_with('[') {
            continue;
        }
        let path = format!("{section}.{name}");
        let (value, comment) = value.split_once("  ").unwrap_or((value, ""));
        let key =
            keys.iter().find(|k| k.path == path).unwrap_or_else(|| panic!("{path} is no key"));
        let commented_out = line.starts_with('#');
        match &key.default {
            Some(default) if path != "camera.pipeline" => {
                assert!(commented_out, "{path} has a default: comment it out");
                assert_eq!(value.trim(), default, "{path}");
            }
            Some(_) => {}
            None => assert!(
                !commented_out || comment.contains("no default"),
                "{path} has no default: say so"
            ),
        }
        said.insert(path);
    }
    let missing: Vec<_> = keys.iter().filter(|k| !said.contains(&k.path)).collect();
    assert!(missing.is_empty(), "the sample lacks {missing:?}");
}
