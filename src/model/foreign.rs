//! Files that people hand over instead of an ONNX model, told by their first bytes.
//!
//! The answer completes "the file …" and ends with what to do; the name stands in the command, so
//! that it can be copied.

/// Says what a file is when it is known and not ONNX. `name` is the file's own, without folders.
pub fn recognise(bytes: &[u8], name: &str) -> Option<String> {
    let starts = |magic: &[u8]| bytes.starts_with(magic);
    let at =
        |offset: usize, magic: &[u8]| bytes.get(offset..).is_some_and(|b| b.starts_with(magic));
    let source = with_extension(name, "pt");
    let export = format!("yolo export model={source} format=onnx");
    if bytes.is_empty() {
        return Some("is empty: copy it again".into());
    }
    if starts(b"PK\x03\x04") || starts(b"PK\x05\x06") {
        return Some(if contains(bytes, b"data.pkl") {
            let found = if contains(bytes, b"/code/") { "a TorchScript" } else { "a PyTorch" };
            format!("is {found} model, not ONNX: run `yolo export model={name} format=onnx`")
        } else {
            "is a zip archive, not ONNX: unpack it and use the .onnx file in it".into()
        });
    }
    // Pickle protocols 2 to 5: PyTorch's format before 1.6.
    if matches!(bytes, [0x80, 2..=5, ..]) {
        return Some(format!(
            "is a pickle (an old PyTorch model?), not ONNX: run `yolo export model={name} format=onnx`"
        ));
    }
    if at(4, b"TFL3") {
        return Some(format!("is a TensorFlow Lite model, not ONNX: run `{export}`"));
    }
    if at(4, b"ORTM") {
        return Some(
            "is an ONNX Runtime (.ort) model, bound to one version: use the .onnx it was made of"
                .into(),
        );
    }
    // Ultralytics puts the length of a JSON header in front of the engine.
    if starts(b"ftrt") || at(4, br#"{"description""#) {
        return Some(format!(
            "is a TensorRT engine, bound to one GPU, not ONNX: run `{export}` \
             and set provider = \"tensorrt\""
        ));
    }
    if starts(b"\x89HDF") {
        return Some("is a Keras (HDF5) model, not ONNX: convert it with tf2onnx".into());
    }
    if starts(b"\x1f\x8b") {
        return Some(format!("is compressed by gzip: run `gunzip {name}`"));
    }
    text(bytes, name, &export)
}

/// Texts: pages, pointers, descriptions.
fn text(bytes: &[u8], name: &str, export: &str) -> Option<String> {
    let head: Vec<u8> = bytes
        .iter()
        .skip_while(|b| b.is_ascii_whitespace() || b"\xef\xbb\xbf".contains(b))
        .take(200)
        .map(u8::to_ascii_lowercase)
        .collect();
    if head.starts_with(b"<!doctype html") || head.starts_with(b"<html") {
        return Some(
            "is a web page, not ONNX: the server probably sent a login or error page; \
             open it in a browser to see"
                .into(),
        );
    }
    if head.starts_with(b"version https://git-lfs") {
        return Some("is a Git LFS pointer, not the file itself: run `git lfs pull`".into());
    }
    if head.starts_with(b"<?xml") || head.starts_with(b"<net") {
        return Some(format!("is XML (an OpenVINO model?), not ONNX: run `{export}`"));
    }
    let printable = |b: &u8| !b.is_ascii_control() || b.is_ascii_whitespace();
    if head.len() >= 8 && head.iter().all(|b| b.is_ascii() && printable(b)) {
        return Some(format!("is a text file, not ONNX: look into it with `head {name}`"));
    }
    None
}

fn with_extension(name: &str, extension: &str) -> String {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    format!("{stem}.{extension}")
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    // The names stand in the first entries and again in the directory at the end.
    const LOOK: usize = 1 << 20;
    let head = &bytes[..bytes.len().min(LOOK)];
    let tail = &bytes[bytes.len().saturating_sub(LOOK)..];
    [head, tail].iter().any(|part| part.windows(needle.len()).any(|w| w == needle))
}
