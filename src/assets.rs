//! Where noblink finds what it ships beside its program: in a checkout the checkout itself, once
//! installed `/usr/share/noblink`.

use std::path::{Path, PathBuf};

use anyhow::bail;

use crate::camera::templates::Templates;

/// The folders that may hold `models/`, `pipelines/` and so on, best first: the checkout that the
/// program was built in (`target/release/noblink`), the working directory, the installed place.
pub fn roots() -> Vec<PathBuf> {
    let exe = std::env::current_exe().ok();
    // target/<profile>/noblink, or target/<profile>/deps/it-<hash> for a test.
    let above = exe.iter().flat_map(|p| p.ancestors().skip(3).take(2));
    let checkout = above.filter(|p| p.join("Cargo.toml").is_file()).map(PathBuf::from);
    let working = std::env::current_dir().ok().filter(|p| p.join("Cargo.toml").is_file());
    checkout.chain(working).chain([PathBuf::from("/usr/share/noblink")]).collect()
}

/// The first `root/relative` that exists, or every place that was looked at.
pub fn find(relative: &str) -> anyhow::Result<PathBuf> {
    let places: Vec<PathBuf> = roots().into_iter().map(|r| r.join(relative)).collect();
    match places.iter().find(|p| p.exists()) {
        Some(found) => Ok(found.clone()),
        None => {
            let list: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
            bail!("{relative} is not in any of: {}", list.join(", "))
        }
    }
}

/// The folders with pipeline templates: beside the configuration, `/etc/noblink` for those that an
/// installed package is given, then what is shipped.
pub fn templates(beside: Option<&Path>) -> Templates {
    let beside = beside.into_iter().map(PathBuf::from);
    let own = [PathBuf::from("/etc/noblink")];
    Templates { dirs: beside.chain(own).chain(roots()).map(|r| r.join("pipelines")).collect() }
}
