//! What is wrong with a file: each problem with its place, what was found and what to do.

use std::{fmt, time::Duration};

use crate::domain::duration::text;

/// One thing that is wrong, or odd, in a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where: a path within the document such as `providers[3].auth_env`; empty for the document as a whole.
    pub place: String,
    /// The line of that place, counted from 1, where the parser gives one.
    pub line: Option<usize>,
    /// What was found and what to do.
    pub message: String,
}

/// All problems of one document. Never empty.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Problems {
    /// Which document: `embedded`, or a file's path.
    pub document: String,
    /// Its problems, in the order of the document.
    pub list: Vec<Problem>,
}

/// A document that may be used, and what is odd about it.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// What it says.
    pub value: T,
    /// What is odd about it. An error under `--strict`.
    pub warnings: Vec<Problem>,
}

// === impl Problem ===

impl Problem {
    /// A problem at this place, its line not known yet.
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
        write!(f, "{}: {} problem(s)", self.document, self.list.len())?;
        for problem in &self.list {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

/// What a look at one section of settings has found: errors, and what is odd. Places are the keys of the configuration.
#[derive(Debug)]
pub struct Review<'r> {
    section: &'static str,
    problems: &'r mut Vec<Problem>,
    warnings: &'r mut Vec<Problem>,
}

// === impl Review ===

impl<'r> Review<'r> {
    /// Of the section with this name.
    pub fn of(section: &'static str, problems: &'r mut Vec<Problem>, warnings: &'r mut Vec<Problem>) -> Self {
        Self { section, problems, warnings }
    }

    /// The key cannot be what it is.
    pub fn error(&mut self, key: impl fmt::Display, message: impl Into<String>) {
        self.problems.push(Problem::at(format!("{}.{key}", self.section), message));
    }

    /// The key can be what it is, and most likely was not meant so.
    pub fn warning(&mut self, key: impl fmt::Display, message: impl Into<String>) {
        self.warnings.push(Problem::at(format!("{}.{key}", self.section), message));
    }

    /// A length of time within bounds.
    pub fn length(&mut self, key: &str, value: Duration, least: Duration, most: Duration) {
        if !(least..=most).contains(&value) {
            self.error(key, format!("is {}; it must be {} to {}", text(value), text(least), text(most)));
        }
    }

    /// A number within bounds.
    pub fn number<N: PartialOrd + Copy + fmt::Display>(&mut self, key: &str, value: N, least: N, most: N) {
        if !(least..=most).contains(&value) {
            self.error(key, format!("is {value}; it must be {least} to {most}"));
        }
    }
}
