//! The descriptions that Home Assistant makes its devices and entities of. Pure.
//!
//! Home Assistant runs the templates in them. A model's labels come from outside, so they stand in a
//! template as escaped text only.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::{Value, json};

use crate::config::Camera;
use crate::mqtt::topics::Topics;

/// A camera with more labels gets their entities switched off: whoever wants one switches it on.
const LABELS_SHOWN_MAX: usize = 12;
/// The descriptions of more would not fit into a packet.
const LABELS_MAX: usize = 100;
/// Telemetry comes every ten seconds.
const EXPIRE_S: u32 = 45;

/// Entities by a key that stays the same.
pub(super) type Components = BTreeMap<String, Value>;

/// Whose entities they are.
pub(super) struct Home {
    pub(super) device: String,
    pub(super) topics: Topics,
}

/// What removes a component: its platform alone.
pub(super) fn removed(component: &Value) -> Value {
    json!({ "platform": component["platform"] })
}

impl Home {
    /// The box: its model, its records.
    pub(super) fn describe_box(&self) -> Value {
        let Self { device, topics } = self;
        let id = self.id();
        let mut components = Components::from([
            (
                "model".to_owned(),
                json!({
                    "platform": "update",
                    "name": "Model",
                    "state_topic": *topics.models_homeassistant(),
                    "command_topic": *topics.models_command("confirm"),
                    "payload_install": json!({ "id": "homeassistant" }).to_string(),
                }),
            ),
            (
                "rollback".to_owned(),
                json!({
                    "platform": "button",
                    "name": "Roll back the model",
                    "icon": "mdi:backup-restore",
                    "entity_category": "config",
                    "command_topic": *topics.models_command("rollback"),
                    // One press is one command.
                    "command_template":
                        "{\"id\":\"homeassistant-{{ (now().timestamp() * 1000) | int }}\"}",
                    "availability": [
                        { "topic": *topics.availability() },
                        {
                            "topic": *topics.models_state(),
                            "value_template":
                                "{{ 'online' if value_json.previous else 'offline' }}",
                        },
                    ],
                    "availability_mode": "all",
                }),
            ),
            (
                "job".to_owned(),
                json!({
                    "platform": "sensor",
                    "name": "Last model job",
                    "icon": "mdi:clipboard-check-outline",
                    "entity_category": "diagnostic",
                    "state_topic": *topics.models_job("+"),
                    "value_template": "{{ value_json.state | lower }}",
                    "json_attributes_topic": *topics.models_job("+"),
                    "json_attributes_template":
                        "{{ {'job': value_json.id, 'phase': value_json.phase, \
                         'reason': (value_json.reason or {}).get('message')} | tojson }}",
                }),
            ),
            (
                "waiting".to_owned(),
                json!({
                    "platform": "sensor",
                    "name": "Waiting records",
                    "icon": "mdi:tray-full",
                    "entity_category": "diagnostic",
                    "state_class": "measurement",
                    "state_topic": *topics.telemetry(),
                    "value_template": "{{ value_json.outbox.queued }}",
                    "expire_after": EXPIRE_S,
                }),
            ),
        ]);
        identify(&mut components, &id);
        let about = json!({ "identifiers": [id], "name": format!("noblink {device}"),
            "model": "Edge video detection", "serial_number": device });
        self.described(about, components.iter())
    }

    /// A camera, by these components.
    pub(super) fn describe_camera<'c>(
        &self,
        camera: &Camera,
        components: impl Iterator<Item = (&'c String, &'c Value)>,
    ) -> Value {
        let about = json!({ "identifiers": [self.id_of(camera)], "name": camera.id,
            "model": "Camera", "via_device": self.id() });
        self.described(about, components)
    }

    /// What a camera has; `labels` are the model's.
    pub(super) fn components(&self, camera: &Camera, labels: &[String]) -> Components {
        let topics = &self.topics;
        let (status, counts) = (topics.camera_status(&camera.id), topics.counts(&camera.id));
        let mut components = Components::from([
            (
                "streaming".to_owned(),
                json!({
                    "platform": "binary_sensor",
                    "name": "Stream",
                    "device_class": "connectivity",
                    "entity_category": "diagnostic",
                    "state_topic": *status,
                    "value_template": "{{ 'ON' if value_json.state == 'streaming' else 'OFF' }}",
                    "json_attributes_topic": *status,
                    "json_attributes_template":
                        "{{ {'state': value_json.state, 'reason': value_json.reason} | tojson }}",
                }),
            ),
            (
                "enabled".to_owned(),
                json!({
                    "platform": "switch",
                    "name": "Detection",
                    "icon": "mdi:cctv",
                    "state_topic": *status,
                    "value_template": "{{ 'OFF' if value_json.state == 'disabled' else 'ON' }}",
                    "command_topic": *topics.camera_command(&camera.id, "enabled"),
                }),
            ),
            (
                "objects".to_owned(),
                json!({
                    "platform": "sensor",
                    "name": "Objects",
                    "icon": "mdi:counter",
                    "state_class": "measurement",
                    "state_topic": *counts,
                    "value_template": "{{ value_json.total }}",
                }),
            ),
            (
                "rate".to_owned(),
                json!({
                    "platform": "sensor",
                    "name": "Frame rate",
                    "icon": "mdi:filmstrip",
                    "entity_category": "diagnostic",
                    "state_class": "measurement",
                    "unit_of_measurement": "fps",
                    "state_topic": *topics.telemetry(),
                    "value_template": format!(
                        "{{{{ (value_json.cameras[{}] | default({{}})).inferred_fps | default(none) }}}}",
                        quoted(&camera.id)
                    ),
                    "expire_after": EXPIRE_S,
                }),
            ),
        ]);
        if camera.snapshot_interval_s.is_some() {
            components.insert(
                "picture".to_owned(),
                json!({
                    "platform": "image",
                    "name": "Last picture",
                    "image_topic": *topics.snapshot(&camera.id),
                    "content_type": "image/jpeg",
                }),
            );
        }
        let wanted = |label: &&String| camera.labels.as_ref().is_none_or(|l| l.contains(label));
        let labels: Vec<_> = labels.iter().filter(wanted).take(LABELS_MAX).collect();
        let is_shown = labels.len() <= LABELS_SHOWN_MAX;
        for label in labels {
            // Two labels may differ in signs alone; the second goes by another key.
            let mut key = slug(label);
            while components.contains_key(&format!("count_{key}")) {
                key.push('_');
            }
            let text = quoted(label);
            let seen = format!(
                "{{% set seen = value_json.objects %}}\
                 {{% set n = none if seen is none else seen.get({text}, 0) %}}"
            );
            let of_label = |platform: &str, name: &str, value: &str| {
                json!({
                    "platform": platform,
                    "name": name,
                    "enabled_by_default": is_shown,
                    "state_topic": *counts,
                    "value_template": format!("{seen}{value}"),
                    "availability": [
                        { "topic": *topics.availability() },
                        {
                            "topic": *status,
                            "value_template":
                                "{{ 'online' if value_json.state == 'streaming' else 'offline' }}",
                        },
                    ],
                    "availability_mode": "all",
                })
            };
            let mut occupancy = of_label(
                "binary_sensor",
                label,
                "{{ none if n is none else ('ON' if n > 0 else 'OFF') }}",
            );
            occupancy["device_class"] = "occupancy".into();
            components.insert(format!("occupancy_{key}"), occupancy);
            let mut count = of_label("sensor", &format!("{label} count"), "{{ n }}");
            count["state_class"] = "measurement".into();
            count["icon"] = "mdi:counter".into();
            components.insert(format!("count_{key}"), count);
        }
        identify(&mut components, &self.id_of(camera));
        components
    }

    /// Ids hold no colon: no two devices share one.
    fn id(&self) -> String {
        format!("noblink:{}", self.device)
    }

    fn id_of(&self, camera: &Camera) -> String {
        format!("{}:{}", self.id(), camera.id)
    }

    fn described<'c>(
        &self,
        mut about: Value,
        components: impl Iterator<Item = (&'c String, &'c Value)>,
    ) -> Value {
        let version = env!("CARGO_PKG_VERSION");
        about["manufacturer"] = "noblink".into();
        about["sw_version"] = version.into();
        json!({
            "device": about,
            "origin": { "name": "noblink", "sw_version": version },
            "availability": [{ "topic": *self.topics.availability() }],
            "qos": 1,
            "components": components.collect::<BTreeMap<_, _>>(),
        })
    }
}

fn identify(components: &mut Components, id: &str) {
    for (key, component) in components {
        component["unique_id"] = format!("{id}:{key}").into();
    }
}

/// What a key may hold: a-z, 0-9 and _.
fn slug(label: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
    label.chars().map(plain).collect()
}

/// A string of a template: all but letters, digits and blanks of ASCII is escaped by its number.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("'");
    for c in text.chars() {
        if c.is_ascii_alphanumeric() || " _-".contains(c) {
            quoted.push(c);
        } else {
            let _ = write!(quoted, "\\U{:08x}", u32::from(c));
        }
    }
    quoted + "'"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_label_gets_out_of_its_quotes() {
        assert_eq!(quoted("fork-lift 2"), "'fork-lift 2'");
        assert_eq!(
            quoted("a'}}{{ x\\"),
            "'a\\U00000027\\U0000007d\\U0000007d\\U0000007b\\U0000007b x\\U0000005c'"
        );
        assert_eq!(quoted("Müll"), "'M\\U000000fcll'");
    }
}
