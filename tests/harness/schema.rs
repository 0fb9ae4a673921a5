//! Real output held against the published schemas.

use serde_json::Value;

use super::mosquitto::Message;
use super::service::shipped;

/// A published schema, made strict: it lets consumers meet new fields, but we must not have
/// fields that it does not describe.
pub fn validator(name: &str) -> jsonschema::Validator {
    let text = std::fs::read_to_string(shipped(&format!("schemas/{name}.json"))).unwrap();
    let mut schema: Value = serde_json::from_str(&text).unwrap();
    close(&mut schema);
    jsonschema::validator_for(&schema).unwrap()
}

fn close(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            fields.values_mut().for_each(close);
            if fields.contains_key("properties") && !fields.contains_key("additionalProperties") {
                fields.insert("additionalProperties".into(), false.into());
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

pub fn assert_valid(validator: &jsonschema::Validator, message: &Message) -> Value {
    let record: Value = serde_json::from_str(&message.payload).unwrap();
    assert_valid_payload(validator, &record);
    record
}

pub fn assert_valid_payload(validator: &jsonschema::Validator, record: &Value) {
    let problems: Vec<_> =
        validator.iter_errors(record).map(|e| format!("{}: {e}", e.instance_path())).collect();
    assert!(problems.is_empty(), "{problems:?}\n{record}");
}
