//! What stands beside a file that is pushed: in the request's query and headers.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::text::brief;
use crate::update::job::{Install, Ratio};
use crate::update::manifest::{ID, is_id};
use crate::update::orders::Order;
use crate::update::store::Blob;

/// Bytes of a file's name.
const NAME_MAX: usize = 1024;

/// A pushed file before its bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Pushed {
    /// The command's id.
    pub id: String,
    /// The file's name, for people and for the model's id.
    pub name: String,
    /// Bytes of the body.
    pub size: u64,
    /// Automatic or by confirmation.
    pub install: Install,
    /// `--accept-slower`
    pub accept_slower: Option<Ratio>,
    /// The exact bytes of the manifest.
    pub manifest: Option<Vec<u8>>,
    /// The minisign text over them.
    pub signature: Option<String>,
}

impl Pushed {
    /// Reads `id=…&name=…&size=…&manual=…&accept_slower=…`, and the base64 in two headers.
    ///
    /// # Errors
    /// What is wrong: nothing that was sent is left aside.
    pub fn read<'h>(
        query: &str,
        header: impl Fn(&str) -> Option<&'h [u8]>,
    ) -> Result<Self, String> {
        let (mut id, mut name, mut size) = (None, None, None);
        let (mut install, mut accept_slower) = (Install::Auto, None);
        for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let wrong =
                |allowed: &str| format!("{key} = {:?}: must be {allowed}", brief(&value, 60));
            match &*key {
                "id" if is_id(&value) => id = Some(value.into_owned()),
                "id" => return Err(wrong(ID)),
                "name" if is_name(&value) => name = Some(value.into_owned()),
                "name" => return Err(wrong("the name of a file")),
                "size" => size = Some(value.parse().map_err(|_| wrong("a number of bytes"))?),
                "manual" => match &*value {
                    "true" => install = Install::Manual,
                    "false" => install = Install::Auto,
                    _ => return Err(wrong("true or false")),
                },
                "accept_slower" => {
                    let ratio = value.parse().ok().and_then(Ratio::of);
                    accept_slower = Some(ratio.ok_or_else(|| wrong("a ratio from 1 to 1000"))?);
                }
                _ => return Err(format!("{:?} means nothing here", brief(&key, 60))),
            }
        }
        let decoded = |name: &str| {
            let bytes = header(name).map(|text| STANDARD.decode(text)).transpose();
            bytes.map_err(|e| format!("the header {name} is no base64: {e}"))
        };
        let signature = decoded("x-noblink-signature")?.map(String::from_utf8).transpose();
        Ok(Self {
            id: id.ok_or("id is missing")?,
            name: name.ok_or("name is missing")?,
            size: size.ok_or("size is missing")?,
            install,
            accept_slower,
            manifest: decoded("x-noblink-manifest")?,
            signature: signature.map_err(|_| "the header x-noblink-signature is no text")?,
        })
    }

    /// The order, once the bytes are in the store.
    pub(super) fn order(self, blob: Blob) -> Order {
        let Self { id, name, install, accept_slower, manifest, signature, .. } = self;
        Order::Stored { id, name, blob, install, manifest, signature, accept_slower }
    }
}

fn is_name(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len()) && !name.chars().any(char::is_control)
}
