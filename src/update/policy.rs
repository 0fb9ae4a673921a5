//! May this model come in? Pure: asked before a byte is fetched, and again only for a new command.

use jiff::Timestamp;

use super::digest::Digest;
use super::job::{Millis, Reason, State};
use super::machine::quarantined;
use super::manifest::{Malformed, Manifest};
use super::signature::{self, PublicKey, SignatureError};
use crate::text::first;

/// What `requires` may name on this build.
pub const CAPABILITIES: [&str; 0] = [];

/// What the configuration and the build say.
#[derive(Debug, Clone)]
pub struct Policy<'a> {
    /// Once there is one, every install needs a signature.
    pub keys: &'a [PublicKey],
    /// `accept_stages`; none = any.
    pub accept_stages: Option<&'a [String]>,
    /// `[device] id`
    pub device: &'a str,
    /// When this program was built: no clock is right that is earlier.
    pub built: Millis,
    /// The largest model that is taken, in bytes.
    pub size_max: u64,
}

/// What is known of the signature over the manifest's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signed {
    /// There is none.
    No,
    /// There is one, and no key to check it with.
    Unchecked,
    /// It fits; by the key with this id.
    By(u64),
    /// It does not hold.
    Broken(SignatureError),
}

impl Signed {
    /// Checks a signature. `text` = none: there is none.
    pub fn check(keys: &[PublicKey], text: Option<&str>, bytes: &[u8]) -> Self {
        match text {
            None => Self::No,
            Some(_) if keys.is_empty() => Self::Unchecked,
            Some(text) => match signature::verify(keys, text, bytes) {
                Ok(key) => Self::By(key),
                Err(e) => Self::Broken(e),
            },
        }
    }

    /// The manifest's words are its signer's.
    pub fn is_trusted(&self) -> bool {
        matches!(self, Self::By(_))
    }
}

/// Decides about a manifest (none: a bare file) in the machine's present state.
///
/// `bytes` is the model's digest where the bytes are there already, which the manifest must name.
/// The refusal's message names the thing, its value and the remedy.
pub fn admit(
    policy: &Policy<'_>,
    manifest: Result<Option<&Manifest>, &Malformed>,
    signed: &Signed,
    bytes: Option<&Digest>,
    state: &State,
    now: Millis,
) -> Result<(), Reason> {
    let required = !policy.keys.is_empty();
    match signed {
        Signed::No if required => {
            let text = "public keys are configured and no signed manifest came with the model: \
                        sign one with `noblink model sign`";
            return Err(Reason::new("unsigned", text));
        }
        Signed::Broken(e) => {
            let code = match e {
                SignatureError::WrongKey(_) => "wrong_key",
                SignatureError::Bad(_) | SignatureError::Malformed(_) => "bad_signature",
            };
            let text = format!("the manifest's signature {e}: sign it with a key of [models]");
            return Err(Reason::new(code, text));
        }
        Signed::No | Signed::Unchecked | Signed::By(_) => {}
    }
    // Nothing is said about the text of a manifest that nobody trusted has signed.
    let manifest =
        manifest.map_err(|e| Reason::new("bad_manifest", format!("the manifest: {e}")))?;
    if let Some(digest) = bytes.or(manifest.and_then(|m| m.sha256.as_ref()))
        && let Some(why) = state.quarantine.get(digest)
    {
        return Err(quarantined(digest, why));
    }
    let Some(m) = manifest else { return Ok(()) };
    if required {
        complete(m)?;
    }
    if bytes.is_none() && (m.sha256.is_none() || m.size.is_none()) {
        let text =
            "the manifest of a model that is fetched must name its sha256 and size: add them";
        return Err(Reason::new("incomplete_manifest", text));
    }
    if let (Some(actual), Some(named)) = (bytes, m.sha256.as_ref())
        && actual != named
    {
        let text = format!("the manifest names {named}, the file is {actual}: copy both again");
        return Err(Reason::new("digest_mismatch", text));
    }
    if let Some(size) = m.size.filter(|s| *s > policy.size_max) {
        let text = format!("size = {size} bytes: {} are allowed", policy.size_max);
        return Err(Reason::new("too_large", text));
    }
    validity(policy, m, now)?;
    target(policy, m)?;
    let highest = state.highest(signed.is_trusted());
    if let (Some(sequence), Some(highest)) = (m.sequence, highest)
        && sequence <= highest
    {
        let text = format!(
            "sequence = {sequence}, and {highest} was seen already: \
             publish it again with a sequence above {highest}"
        );
        return Err(Reason::new("stale_sequence", text));
    }
    Ok(())
}

/// What a manifest must hold once signatures are required.
fn complete(m: &Manifest) -> Result<(), Reason> {
    let fields = [
        ("sha256", m.sha256.is_none()),
        ("size", m.size.is_none()),
        ("sequence", m.sequence.is_none()),
        ("expires", m.expires.is_none()),
        ("devices", m.devices.is_none()),
        ("stage", m.stage.is_none()),
    ];
    let missing: Vec<&str> = fields.iter().filter(|(_, no)| *no).map(|(key, _)| *key).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let text = format!("a signed manifest lacks {}: add it and sign again", missing.join(", "));
    Err(Reason::new("incomplete_manifest", text))
}

fn validity(policy: &Policy<'_>, m: &Manifest, now: Millis) -> Result<(), Reason> {
    let Some(expires) = m.expires else { return Ok(()) };
    let time = |t: Millis| Timestamp::from_millisecond(t).map_or("?".into(), |t| t.to_string());
    if now < policy.built {
        let text = format!(
            "the clock says {}, earlier than this program ({}), so that expiry can't be judged: \
             set the clock",
            time(now),
            time(policy.built)
        );
        return Err(Reason::new("clock_unset", text));
    }
    if expires.as_millisecond() <= now {
        let text = format!("expires = {expires}, now is {}: publish it again", time(now));
        return Err(Reason::new("expired", text));
    }
    Ok(())
}

fn target(policy: &Policy<'_>, m: &Manifest) -> Result<(), Reason> {
    let device = policy.device;
    let names = |pattern: &String| match pattern.strip_suffix('*') {
        Some(start) => device.starts_with(start),
        None => pattern == device,
    };
    if let Some(devices) = &m.devices
        && !devices.iter().any(names)
    {
        let text = format!("devices = [{}], this is {device}", first(devices, 5));
        return Err(Reason::new("wrong_device", text));
    }
    if let (Some(accepted), Some(stage)) = (policy.accept_stages, &m.stage)
        && !accepted.contains(stage)
    {
        let text = format!("stage = \"{stage}\", accept_stages = [{}] here", accepted.join(", "));
        return Err(Reason::new("stage_not_accepted", text));
    }
    if let Some(unknown) = m.requires.iter().find(|r| !CAPABILITIES.contains(&r.as_str())) {
        let text = format!("requires \"{unknown}\", which this version can't do: update noblink");
        return Err(Reason::new("requires_unknown", text));
    }
    Ok(())
}
