// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is wrong with a configuration, and where: file, line, column, and the line itself with a caret.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The class of a problem; each class has an exit code of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The file cannot be read.
    Unreadable,
    /// The file is not TOML.
    Syntax,
    /// A key that does not exist.
    UnknownKey,
    /// A value of the wrong type or form, or a key that is missing.
    Type,
    /// A value that makes no sense.
    Value,
    /// Not enough guest memory.
    MemoryTooSmall,
    /// Guest memory overlaps itself or the devices.
    MemoryOverlap,
    /// Something this version does not do.
    Unsupported,
}

/// A problem with the place where it was found. `Display` gives the whole text, several lines, without a final newline.
#[derive(Clone, Debug, thiserror::Error)]
pub struct ConfigError {
    /// Its class.
    pub problem: Problem,
    details: Box<Details>,
}

#[derive(Clone, Debug)]
struct Details {
    path: PathBuf,
    message: String,
    place: Option<Place>,
    cure: Option<String>,
}

#[derive(Clone, Debug)]
struct Place {
    line: usize,
    column: usize,
    width: usize,
    text: String,
}

impl ConfigError {
    pub(super) fn new(problem: Problem, path: &Path, message: impl Into<String>) -> Self {
        let details = Details { path: path.to_owned(), message: message.into(), place: None, cure: None };
        Self { problem, details: Box::new(details) }
    }

    /// Adds the place: `span` is a byte range in `source`.
    pub(super) fn at(mut self, source: &str, span: Range<usize>) -> Self {
        let start = floor_char_boundary(source, span.start);
        let line_start = source[..start].rfind('\n').map_or(0, |i| i + 1);
        let line_end = source[start..].find('\n').map_or(source.len(), |i| start + i);
        let text = source[line_start..line_end].trim_end_matches('\r');
        let end = floor_char_boundary(source, span.end).clamp(start, line_end);
        self.details.place = Some(Place {
            line: source[..start].matches('\n').count() + 1,
            column: source[line_start..start].chars().count() + 1,
            width: source[start..end].trim_end().chars().count().max(1),
            text: text.to_owned(),
        });
        self
    }

    /// Adds what the user can do about it.
    pub(super) fn cure(mut self, cure: impl Into<String>) -> Self {
        self.details.cure = Some(cure.into());
        self
    }

    /// Line and column, both counted from 1, if the problem has a place in the file.
    #[must_use]
    pub fn position(&self) -> Option<(usize, usize)> {
        self.details.place.as_ref().map(|place| (place.line, place.column))
    }
}

fn floor_char_boundary(text: &str, mut index: usize) -> usize {
    index = index.min(text.len());
    while !text.is_char_boundary(index) {
        index -= 1;
    }
    index
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Details { path, message, place, cure } = &*self.details;
        write!(f, "{}", path.display())?;
        if let Some(place) = place {
            write!(f, ":{}:{}", place.line, place.column)?;
        }
        write!(f, ": {}", message)?;
        if let Some(place) = place {
            // Tabs are kept in front of the caret, so that it stands under its text whatever their width.
            let number = place.line.to_string();
            let indent: String =
                place.text.chars().take(place.column - 1).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
            write!(f, "\n {number} | {}", place.text)?;
            write!(f, "\n {:pad$} | {indent}{}", "", "^".repeat(place.width), pad = number.len())?;
        }
        if let Some(cure) = cure {
            write!(f, "\n{cure}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caret_stands_under_the_text() {
        let source = "[base]\n\tname = \"ä\" # x\r\nid = 1\n";
        let at = source.find("\"ä\"").unwrap();
        let error =
            ConfigError::new(Problem::Value, Path::new("vm.toml"), "bad name").at(source, at..at + 4).cure("Cure.");
        assert_eq!(error.to_string(), "vm.toml:2:9: bad name\n 2 | \tname = \"ä\" # x\n   | \t       ^^^\nCure.");
        assert_eq!(error.position(), Some((2, 9)));
    }

    #[test]
    fn any_span_is_survived() {
        let source = "ä\n";
        for start in 0..8 {
            for end in 0..8 {
                let _ = ConfigError::new(Problem::Value, Path::new("x"), "m").at(source, start..end).to_string();
            }
        }
        assert_eq!(ConfigError::new(Problem::Syntax, Path::new("x"), "m").at("", 0..0).position(), Some((1, 1)));
    }
}
