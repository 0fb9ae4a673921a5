//! Updates without ONNX Runtime, MQTT and GStreamer: the machine, manifests, signatures, the
//! store, the inbox.

mod cuts;
mod inbox;
mod machine;
mod machine_random;
mod manifest;
mod orders;
mod signature;
mod store;

use noblink::update::digest::Digest;
use noblink::update::event::{Effect, Event};
use noblink::update::job::{Command, Install, Millis, Source, State, Way};
use noblink::update::machine::step;

/// A digest that a reader can tell from others.
pub(crate) fn digest(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

/// A command that installs the model called `name`.
pub(crate) fn command(id: &str, name: &str) -> Box<Command> {
    Box::new(Command {
        id: id.to_owned(),
        way: Way::Mqtt,
        from: "test".to_owned(),
        fingerprint: digest(&format!("command for {name}")),
        source: Source::Mqtt,
        digest: Some(digest(name)),
        size: Some(8),
        install: Install::Auto,
        sequence: None,
        manifest: None,
        signature: None,
        accept_slower: None,
    })
}

/// A machine, its clock and what it wanted done.
pub(crate) struct Bench {
    pub(crate) state: State,
    pub(crate) now: Millis,
    pub(crate) effects: Vec<Effect>,
}

impl Bench {
    /// One event; returns its effects.
    pub(crate) fn event(&mut self, event: Event) -> Vec<Effect> {
        let (state, effects) = step(std::mem::take(&mut self.state), event);
        self.state = state;
        self.effects.extend(effects.clone());
        effects
    }
}
