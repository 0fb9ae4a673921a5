//! The fuzz targets over their seeds, and over some thousand mutations of them: the short form of
//! `make fuzz`, whose targets these are. The mutations are the same ones every time.

#[path = "../fuzz/targets/mod.rs"]
#[allow(dead_code)]
mod targets;

use std::fs;
use std::path::{Path, PathBuf};

use targets::{ALL, Check, protobuf};

/// Of each target.
const MUTATIONS: u32 = 5000;
/// Bytes of an input.
const LENGTH_MAX: usize = 4096;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name)
}

fn entries(dir: &Path) -> Vec<String> {
    let listed = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<_> = listed.map(name).collect();
    names.sort();
    names
}

/// Xorshift: enough to choose places.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n.max(1)
    }
}

/// A target with what it begins from.
struct Fuzzed {
    name: &'static str,
    check: Check,
    seeds: Vec<(String, Vec<u8>)>,
    words: Vec<Vec<u8>>,
}

impl Fuzzed {
    fn of((name, check): (&'static str, Check)) -> Self {
        let dir = folder("seeds").join(name);
        let seeds = entries(&dir).into_iter().map(|seed| {
            let bytes = fs::read(dir.join(&seed)).unwrap();
            (seed, bytes)
        });
        let dictionary = folder("dictionaries").join(format!("{name}.dict"));
        let dictionary = fs::read_to_string(dictionary).expect("each target has a dictionary");
        Self { name, check, seeds: seeds.collect(), words: dictionary.lines().map(word).collect() }
    }

    fn run(&self) {
        for (seed, bytes) in &self.seeds {
            self.hold(bytes, seed);
        }
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for n in 0..MUTATIONS {
            let (seed, mut bytes) = self.seeds[random.below(self.seeds.len())].clone();
            for _ in 0..=random.below(4) {
                bytes = self.changed(bytes, &mut random);
            }
            bytes.truncate(LENGTH_MAX);
            self.hold(&bytes, &format!("mutation {n}, of {seed},"));
        }
    }

    fn changed(&self, mut bytes: Vec<u8>, random: &mut Random) -> Vec<u8> {
        if self.name == "onnx" && random.below(8) != 0 {
            let seed = random.below(1 << 32) as u32;
            let mut leaf = |text: &mut Vec<u8>| self.disturb(text, random);
            if let Some(bytes) = protobuf::mutate(&bytes, seed, &mut leaf) {
                return bytes;
            }
        }
        self.disturb(&mut bytes, random);
        bytes
    }

    /// Changes some bytes, wherever they are.
    fn disturb(&self, bytes: &mut Vec<u8>, random: &mut Random) {
        let at = random.below(bytes.len() + 1);
        let end = at + random.below(bytes.len() - at + 1).min(64);
        match random.below(6) {
            0 => drop(bytes.drain(at..end)),
            1 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            2 | 3 => {
                let word = self.words[random.below(self.words.len())].iter().copied();
                bytes.splice(at..at, word);
            }
            4 => bytes.insert(at, random.below(256) as u8),
            _ if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ => {}
        }
    }

    /// Names the input when the target fails: a panic alone would not.
    fn hold(&self, bytes: &[u8], input: &str) {
        let held = std::panic::catch_unwind(|| (self.check)(bytes));
        assert!(held.is_ok(), "{}: {input} fails:\n{}", self.name, bytes.escape_ascii());
    }
}

/// A line of libFuzzer's dictionaries: `"\x20text"`.
fn word(line: &str) -> Vec<u8> {
    let text = line.strip_prefix('"').and_then(|l| l.strip_suffix('"')).expect("a quoted word");
    let mut word = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'\\' => match rest.next() {
                Some(b'x') => {
                    let digits = [rest.next().unwrap(), rest.next().unwrap()];
                    let digits = std::str::from_utf8(&digits).unwrap().to_owned();
                    word.push(u8::from_str_radix(&digits, 16).unwrap());
                }
                Some(escaped) => word.push(escaped),
                None => panic!("{line} ends in an escape"),
            },
            byte => word.push(byte),
        }
    }
    word
}

/// No target is without seeds, and `make fuzz` runs each.
#[test]
fn each_target_has_all_its_parts() {
    let known: Vec<_> = ALL.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(entries(&folder("seeds")), known);
    assert_eq!(
        entries(&folder("dictionaries")),
        known.iter().map(|name| format!("{name}.dict")).collect::<Vec<_>>()
    );
    let programs = entries(&folder("fuzz_targets"));
    assert_eq!(programs, known.iter().map(|name| format!("{name}.rs")).collect::<Vec<_>>());
    let manifest: toml::Table = fs::read_to_string(folder("Cargo.toml")).unwrap().parse().unwrap();
    let built: Vec<_> =
        manifest["bin"].as_array().unwrap().iter().map(|b| b["name"].as_str().unwrap()).collect();
    assert_eq!(built, known);
}

macro_rules! targets {
    ($($name:ident)*) => { $(
        #[test]
        fn $name() {
            let target = ALL.into_iter().find(|(name, _)| *name == stringify!($name));
            Fuzzed::of(target.expect("it is a target")).run();
        }
    )* };
}

targets! { address calibration child chunks commands config names onnx packets signature }
