//! Commands as they come: over MQTT and over the control socket.

use noblink::control::pushed::Pushed;
use noblink::mqtt::topics::Topics;
use noblink::update::job::{Install, Ratio, Way};
use noblink::update::orders::{Order, local, read};

fn over_mqtt(verb: &str, payload: &str) -> Result<Order, String> {
    let topics = Topics::new("noblink", "edge-1");
    let topic = format!("{}/cmd/models/{verb}", topics.root());
    read(&topics, &topic, payload.as_bytes(), false).expect("it is one of ours")
}

#[test]
fn both_ways_know_the_same_commands() {
    let rollback = Order::Rollback { id: "r1".into(), to: Some("2c2c".into()) };
    assert_eq!(over_mqtt("rollback", r#"{"id":"r1","sha256":"2c2c"}"#), Ok(rollback.clone()));
    assert_eq!(local("rollback", br#"{"id":"r1","to":"2c2c"}"#), Ok(rollback));
    let cancel = Order::Cancel { id: "c1".into(), job: None };
    assert_eq!(over_mqtt("cancel", r#"{"id":"c1"}"#), Ok(cancel.clone()));
    assert_eq!(local("cancel", br#"{"id":"c1","job":null}"#), Ok(cancel));
    let close = Order::CloseBreaker { id: "b1".into(), way: Way::Mqtt };
    assert_eq!(local("close-breaker", br#"{"id":"b1","way":"mqtt"}"#), Ok(close));
    let release = Order::Release { id: "q1".into(), model: "2c2c".into() };
    assert_eq!(local("release", br#"{"id":"q1","model":"2c2c"}"#), Ok(release));
}

/// A rollback whose target can't be read must not go to another one.
#[test]
fn what_is_wrong_with_a_command_is_said() {
    let topic = "noblink/v1/edge-1/cmd/models";
    let id = "must be 1 to 32 of a-z, 0-9, _ and -, the first a letter or digit";
    for (verb, payload, why) in [
        ("rollback", r#"{"id":"r","sha256":7}"#, "sha256 = 7: must be a text of 1 to 64 bytes"),
        ("rollback", r#"{"sha256":"2c"}"#, "id is missing"),
        ("cancel", r#"{"id":"a/b"}"#, &format!("id = \"a/b\": {id}")),
        ("confirm", r#"{"id":"a","job":"+"}"#, &format!("job = \"+\": {id}")),
        (
            "cancel",
            r#"{"id":"a","id":"b"}"#,
            "is not the JSON that is wanted: the key \"id\" stands twice at line 1 column 19",
        ),
        ("halt", r#"{"id":"a"}"#, "halt is not desired, rollback, cancel or confirm"),
    ] {
        assert_eq!(over_mqtt(verb, payload), Err(format!("{topic}/{verb}: {why}")));
    }
    for (verb, body, why) in [
        ("release", r#"{"id":"a"}"#, "model is missing"),
        (
            "close-breaker",
            r#"{"id":"a","way":"x"}"#,
            "way = \"x\": must be inbox, mqtt, cli or page",
        ),
        (
            "halt",
            r#"{"id":"a"}"#,
            "halt is not rollback, cancel, confirm, close-breaker or release",
        ),
    ] {
        assert_eq!(local(verb, body.as_bytes()), Err(why.into()));
    }
}

/// A topic is as long as its sender likes, and may hold a line's end.
#[test]
fn nobody_writes_lines_of_their_own_into_the_log() {
    let verb = format!("x\n2026-01-01 all is well {}", "y".repeat(60_000));
    let why = over_mqtt(&verb, r#"{"id":"a"}"#).unwrap_err();
    assert!(!why.contains('\n') && why.len() < 400, "{why}");
}

#[test]
fn a_pushed_file_says_all_of_itself_or_is_refused() {
    let none = |_: &str| None;
    let query = "id=cli-1&name=best%20one.onnx&size=7&manual=true&accept_slower=1.5";
    let pushed = Pushed::read(query, none).unwrap();
    assert_eq!((pushed.id.as_str(), pushed.name.as_str()), ("cli-1", "best one.onnx"));
    assert_eq!((pushed.size, pushed.install), (7, Install::Manual));
    assert_eq!(pushed.accept_slower, Some(Ratio(1500)));
    for (query, why) in [
        ("id=A&name=a&size=1", "id = \"A\": must be 1 to 32"),
        ("id=a&name=a%0ab&size=1", "name = \"a\u{fffd}b\": must be the name of a file"),
        ("id=a&name=a&size=-1", "size = \"-1\": must be a number of bytes"),
        ("id=a&name=a&size=1&accept_slower=NaN", "accept_slower = \"NaN\": must be a ratio from 1"),
        ("id=a&name=a&size=1&accept_slower=0.5", "accept_slower = \"0.5\": must be a ratio from 1"),
        ("id=a&name=a", "size is missing"),
        ("id=a&name=a&size=1&x=y", "\"x\" means nothing here"),
    ] {
        let said = Pushed::read(query, none).unwrap_err();
        assert!(said.starts_with(why), "{said}");
    }
    // A manifest or signature that is damaged on its way is not as good as none.
    let broken = |_: &str| Some(&b"%%"[..]);
    let said = Pushed::read("id=a&name=a&size=1", broken).unwrap_err();
    assert!(said.contains("x-noblink-signature is no base64"), "{said}");
}
