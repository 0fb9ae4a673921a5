//! Pictures as the child has them: dumps of live frames, and the JPEG and PNG files of a folder.
//!
//! A dump is one line of JSON and the planes behind it, tightly packed, in the decoder's own format:
//! a model sees in the child exactly what it would see in the worker.

use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::text::brief;
use crate::vision::picture::{Color, Matrix, Picture, Pixels, Plane, Range};

/// Longest side of a picture, pixels.
const SIDE_MAX: usize = 8192;
/// Largest file of a picture.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Longest first line of a dump.
const HEAD_BYTES_MAX: u64 = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    I420,
    Nv12,
    Rgb,
}

impl Format {
    /// Bytes in a row and rows of each plane.
    fn planes(self, width: usize, height: usize) -> Vec<(usize, usize)> {
        let (half_w, half_h) = (width.div_ceil(2), height.div_ceil(2));
        match self {
            Self::I420 => vec![(width, height), (half_w, half_h), (half_w, half_h)],
            Self::Nv12 => vec![(width, height), (2 * half_w, half_h)],
            Self::Rgb => vec![(3 * width, height)],
        }
    }
}

/// The first line of a dump.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    schema: String,
    name: String,
    width: usize,
    height: usize,
    format: Format,
    bt709: bool,
    full_range: bool,
}

const SCHEMA: &str = "noblink.frame/1";

/// A picture that owns its pixels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameDump {
    head: Head,
    /// The planes, one behind the other, rows without gaps.
    data: Vec<u8>,
}

/// Why a file is no picture.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", .file.display())]
pub struct DumpError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub why: String,
}

impl FrameDump {
    /// Copies a picture; `name` is what messages call it (`gate 90211`).
    pub fn of(picture: &Picture<'_>, name: impl Into<String>) -> Self {
        let (format, planes): (_, Vec<Plane<'_>>) = match picture.pixels {
            Pixels::I420 { y, u, v } => (Format::I420, vec![y, u, v]),
            Pixels::Nv12 { y, uv } => (Format::Nv12, vec![y, uv]),
            Pixels::Rgb(rgb) => (Format::Rgb, vec![rgb]),
        };
        let sizes = format.planes(picture.width, picture.height);
        let mut data = Vec::with_capacity(sizes.iter().map(|(bytes, rows)| bytes * rows).sum());
        for (plane, (bytes, rows)) in planes.iter().zip(sizes) {
            for row in 0..rows {
                data.extend_from_slice(&plane.data[row * plane.stride..][..bytes]);
            }
        }
        let head = Head {
            schema: SCHEMA.into(),
            name: name.into(),
            width: picture.width,
            height: picture.height,
            format,
            bt709: picture.color.matrix == Matrix::Bt709,
            full_range: picture.color.range == Range::Full,
        };
        Self { head, data }
    }

    /// Packed RGB, three bytes a pixel.
    pub(in crate::update) fn rgb(name: &str, width: usize, height: usize, data: Vec<u8>) -> Self {
        assert_eq!(data.len(), 3 * width * height, "three bytes a pixel");
        let head = Head {
            schema: SCHEMA.into(),
            name: name.into(),
            width,
            height,
            format: Format::Rgb,
            bt709: false,
            full_range: true,
        };
        Self { head, data }
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.head.name
    }

    /// Width and height in pixels.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.head.width, self.head.height)
    }

    /// Lends it to a model.
    pub fn picture(&self) -> Picture<'_> {
        let Head { width, height, format, bt709, full_range, .. } = self.head;
        let mut rest = &self.data[..];
        let mut planes = format.planes(width, height).into_iter().map(|(stride, rows)| {
            let (data, behind) = rest.split_at(stride * rows);
            rest = behind;
            Plane { data, stride }
        });
        let mut next = || planes.next().expect("as many as the format has");
        let pixels = match format {
            Format::I420 => Pixels::I420 { y: next(), u: next(), v: next() },
            Format::Nv12 => Pixels::Nv12 { y: next(), uv: next() },
            Format::Rgb => Pixels::Rgb(next()),
        };
        let matrix = if bt709 { Matrix::Bt709 } else { Matrix::Bt601 };
        let range = if full_range { Range::Full } else { Range::Limited };
        Picture { width, height, color: Color { matrix, range }, pixels }
    }

    /// Writes a dump.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&self, file: &Path) -> std::io::Result<()> {
        self.write_to(std::io::BufWriter::new(std::fs::File::create(file)?))
    }

    /// Writes a dump to anything.
    ///
    /// # Errors
    /// It can't be written to.
    pub fn write_to(&self, mut to: impl Write) -> std::io::Result<()> {
        serde_json::to_writer(&mut to, &self.head)?;
        to.write_all(b"\n")?;
        to.write_all(&self.data)?;
        to.flush()
    }

    /// Reads a dump.
    ///
    /// # Errors
    /// The file can't be read, or is no dump.
    pub fn read(file: &Path) -> Result<Self, DumpError> {
        let opened = std::fs::File::open(file).map_err(|e| e.to_string());
        opened
            .and_then(|from| Self::read_from(BufReader::new(from)))
            .map_err(|why| DumpError { file: file.to_owned(), why })
    }

    /// Reads a dump from anything; the error completes "the file …".
    ///
    /// # Errors
    /// It can't be read from, or holds no dump.
    pub fn read_from(mut from: impl BufRead) -> Result<Self, String> {
        let mut line = String::new();
        let read = from.by_ref().take(HEAD_BYTES_MAX).read_line(&mut line);
        read.map_err(|e| e.to_string())?;
        let head: Head = serde_json::from_str(&line)
            .map_err(|e| format!("is no dump of a frame: {}", brief(&e.to_string(), 200)))?;
        if head.schema != SCHEMA {
            return Err(format!("schema {:?} is not {SCHEMA}", brief(&head.schema, 60)));
        }
        bounds(head.width, head.height)?;
        let size: usize =
            head.format.planes(head.width, head.height).iter().map(|(b, rows)| b * rows).sum();
        let mut data = Vec::with_capacity(size);
        from.take(size as u64 + 1).read_to_end(&mut data).map_err(|e| e.to_string())?;
        if data.len() != size {
            return Err(format!("does not hold the {size} bytes of its planes"));
        }
        Ok(Self { head, data })
    }

    /// Decodes a JPEG or PNG file.
    pub(in crate::update) fn decode(file: &Path) -> Result<Self, DumpError> {
        let wrong = |why: String| DumpError { file: file.to_owned(), why };
        let read = || -> std::io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            std::fs::File::open(file)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().map_err(|e| wrong(e.to_string()))?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(wrong(format!("is larger than {} MB", FILE_BYTES_MAX >> 20)));
        }
        let decoded = if bytes.starts_with(b"\x89PNG") { png(&bytes) } else { jpeg(&bytes) };
        let (width, height, data) = decoded.map_err(wrong)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        Ok(Self::rgb(&name, width, height, data))
    }
}

fn bounds(width: usize, height: usize) -> Result<(), String> {
    let fine = 1..=SIDE_MAX;
    if fine.contains(&width) && fine.contains(&height) {
        Ok(())
    } else {
        Err(format!("is {width}x{height} pixels; sides from 1 to {SIDE_MAX} are supported"))
    }
}

fn jpeg(bytes: &[u8]) -> Result<(usize, usize, Vec<u8>), String> {
    let options = DecoderOptions::default()
        .set_max_width(SIDE_MAX)
        .set_max_height(SIDE_MAX)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = zune_jpeg::JpegDecoder::new_with_options(Cursor::new(bytes), options);
    let data = decoder.decode().map_err(|e| format!("is no JPEG or PNG picture: {e}"))?;
    let (width, height) = decoder.dimensions().ok_or("is a JPEG picture without a size")?;
    bounds(width, height)?;
    if data.len() != 3 * width * height {
        return Err("is a JPEG picture of unknown colours".into());
    }
    Ok((width, height, data))
}

fn png(bytes: &[u8]) -> Result<(usize, usize, Vec<u8>), String> {
    let wrong = |e: png::DecodingError| format!("is a damaged PNG picture: {e}");
    let mut decoder = png::Decoder::new(Cursor::new(bytes));
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(wrong)?;
    let (width, height) = (reader.info().width as usize, reader.info().height as usize);
    bounds(width, height)?;
    let mut data = vec![0; reader.output_buffer_size().ok_or("is a PNG picture without a size")?];
    let info = reader.next_frame(&mut data).map_err(wrong)?;
    data.truncate(info.buffer_size());
    let samples = info.color_type.samples();
    let pixels = data.chunks_exact(samples);
    let rgb = match samples {
        3 => data,
        // Grey, with or without transparency; colour with transparency.
        1 | 2 => pixels.flat_map(|p| [p[0]; 3]).collect(),
        _ => pixels.flat_map(|p| [p[0], p[1], p[2]]).collect(),
    };
    Ok((width, height, rgb))
}
