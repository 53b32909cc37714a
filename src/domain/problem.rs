//! Problems in a document: each with its place, what was found and what to do.

use std::{fmt, time::Duration};

use crate::domain::duration::text;

/// A problem or a warning about a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// A path in the document such as `providers[3].auth_env`; empty for the document as a whole.
    pub place: String,
    /// The line of the place, counted from 1, if it is known.
    pub line: Option<usize>,
    /// What was found and what to do.
    pub message: String,
}

/// All problems of a document. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Problems {
    /// The document: `embedded`, or the path of a file.
    pub document: String,
    /// The problems in the order of the document.
    pub list: Vec<Problem>,
}

/// A document that can be used.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// Its content.
    pub value: T,
    /// Warnings, which are errors under `--strict`.
    pub warnings: Vec<Problem>,
}

// === impl Problem ===

impl Problem {
    /// A problem at this place, without a line.
    pub fn at(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { place: place.into(), line: None, message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if self.place.is_empty() { f.write_str(&self.message) } else { write!(f, "{}: {}", self.place, self.message) }
    }
}

// === impl Problems ===

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let many = if self.list.len() == 1 { "" } else { "s" };
        write!(f, "{}: {} problem{many}", self.document, self.list.len())?;
        for problem in &self.list {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

/// Collects the errors and warnings about one section of the settings. Places are keys of the configuration.
#[derive(Debug)]
pub struct Review<'r> {
    section: &'static str,
    problems: &'r mut Vec<Problem>,
    warnings: &'r mut Vec<Problem>,
}

// === impl Review ===

impl<'r> Review<'r> {
    /// A review of the section with this name.
    pub fn of(section: &'static str, problems: &'r mut Vec<Problem>, warnings: &'r mut Vec<Problem>) -> Self {
        Self { section, problems, warnings }
    }

    /// Reports a value that cannot be used.
    pub fn error(&mut self, key: impl fmt::Display, message: impl Into<String>) {
        self.problems.push(Problem::at(format!("{}.{key}", self.section), message));
    }

    /// Reports a value that can be used but is probably a mistake.
    pub fn warning(&mut self, key: impl fmt::Display, message: impl Into<String>) {
        self.warnings.push(Problem::at(format!("{}.{key}", self.section), message));
    }

    /// Checks that a duration is within bounds.
    pub fn length(&mut self, key: &str, value: Duration, least: Duration, most: Duration) {
        if !(least..=most).contains(&value) {
            self.error(key, format!("is {}; it must be {} to {}", text(value), text(least), text(most)));
        }
    }

    /// Checks that a number is within bounds.
    pub fn number<N: PartialOrd + Copy + fmt::Display>(&mut self, key: &str, value: N, least: N, most: N) {
        if !(least..=most).contains(&value) {
            self.error(key, format!("is {value}; it must be {least} to {most}"));
        }
    }
}
