//! Frames that every model must survive: black, white, noise. The raw output is looked at, before
//! any box is made of it: a score of NaN is below every threshold.

use super::super::job::Reason;
use super::frame::FrameDump;
use crate::model::layout::Layout;

/// The frames, as large as the model's input.
pub(in crate::update) fn frames(width: usize, height: usize) -> Vec<FrameDump> {
    let flat =
        |name: &str, grey| FrameDump::rgb(name, width, height, vec![grey; 3 * width * height]);
    let mut frames = vec![flat("the black frame", 0), flat("the white frame", 255)];
    for (name, seed) in [("the first noise frame", 1), ("the second noise frame", 2)] {
        let noise = noise(seed, 3 * width * height);
        frames.push(FrameDump::rgb(name, width, height, noise));
    }
    frames
}

/// Bytes that look random and are the same every time (SplitMix64).
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(word ^ (word >> 31)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// What the outputs showed so far.
#[derive(Debug, Default)]
pub(super) struct Watch {
    first: Option<(String, Vec<f32>)>,
    /// A frame came out unlike the first.
    pub(super) varied: bool,
    /// Frames that were looked at.
    pub(super) frames: usize,
    /// Every value was 0: what suppression in the graph leaves of a picture without objects.
    blank: bool,
}

impl Watch {
    /// Looks at the raw output of a frame.
    pub(super) fn look(&mut self, frame: &str, raw: &[f32]) -> Result<(), Reason> {
        if let Some(at) = raw.iter().position(|v| !v.is_finite()) {
            let odd = raw.iter().filter(|v| !v.is_finite()).count();
            return Err(Reason::new(
                "nan_output",
                format!(
                    "{frame} makes {odd} of {} output values NaN or infinite (the first is {} at \
                     {at})",
                    raw.len(),
                    raw[at]
                ),
            ));
        }
        self.frames += 1;
        match &self.first {
            None => {
                self.blank = raw.iter().all(|v| *v == 0.0);
                self.first = Some((frame.to_owned(), raw.to_vec()));
            }
            Some((_, first)) => {
                let differs = |(a, b): (&f32, &f32)| (a - b).abs() > 1e-6 * (1.0 + a.abs());
                self.varied |= first.len() != raw.len() || first.iter().zip(raw).any(differs);
            }
        }
        Ok(())
    }

    /// The judgement; `real` = real pictures were among the frames. Of a model that suppresses in
    /// the graph, nothing found in noise says nothing.
    pub(super) fn end(&self, layout: Layout, real: bool) -> Result<(), Reason> {
        let told = real || layout != Layout::End2end || !self.blank;
        if self.varied || !told {
            return Ok(());
        }
        let first = self.first.as_ref().map_or("", |(name, _)| name);
        Err(Reason::new(
            "constant_output",
            format!(
                "the output is the same for {first} and {} others, noise among them: the model \
                 does not look at the picture",
                self.frames.saturating_sub(1)
            ),
        ))
    }
}
