//! Words from outside in our own messages.

/// Enough of a text to recognise it by: at most `max` characters, all on one line. It goes into
/// logs, reports and answers, where a line that somebody else wrote must not look like one of ours.
pub fn brief(text: &str, max: usize) -> String {
    let plain = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    let mut shown: String = text.chars().take(max).map(plain).collect();
    if text.chars().nth(max).is_some() {
        shown.push('…');
    }
    shown
}

/// The first of a list and how many more there are, joined by commas.
pub fn first(texts: &[String], shown: usize) -> String {
    let list = texts[..texts.len().min(shown)].join(", ");
    match texts.len().saturating_sub(shown) {
        0 => list,
        more => format!("{list} and {more} more"),
    }
}
