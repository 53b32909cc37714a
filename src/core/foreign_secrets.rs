//! Secrets that are certainly not keys of an LLM provider: tokens of source hosts, clouds, chats and payment services, private keys, database URLs.
//! They are recognised by prefix, content and length. The facts are data: `foreign_secrets:` in the catalogue.

use serde::Deserialize;

use crate::{
    core::by_first_byte::{ByFirstByte, Prefixed},
    domain::problem::Problem,
};

/// A shorter prefix is not enough to recognise a secret, unless its length and its characters are given too.
const MIN_PREFIX_BYTES: usize = 4;
/// The same for the infixes of a kind without a prefix.
const MIN_INFIX_BYTES: usize = 3;

/// All known kinds.
#[derive(Debug, Clone, Default)]
pub struct ForeignSecrets {
    /// Kinds with a prefix.
    by_prefix: ByFirstByte<Shape>,
    /// Kinds that are recognised by infixes only.
    by_infix: Vec<Shape>,
}

/// One kind of secret.
#[derive(Debug, Clone)]
struct Shape {
    what: String,
    prefix: String,
    infixes: Vec<String>,
    lengths: std::ops::RangeInclusive<usize>,
    letters: Letters,
    /// Hosts of this vendor take it as a key.
    key_of: Option<String>,
}

/// The characters after the prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Letters {
    Any,
    UpperAndDigits,
    Hexadecimal,
}

/// The schema of an entry.
#[derive(Debug, Deserialize)]
pub(crate) struct ForeignSecretFile {
    #[serde(default)]
    what: String,
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    infixes: Option<Vec<String>>,
    #[serde(default)]
    length: Option<usize>,
    #[serde(default)]
    min_length: Option<usize>,
    #[serde(default)]
    max_length: Option<usize>,
    #[serde(default)]
    key_of: Option<String>,
    #[serde(default)]
    letters: Option<String>,
    #[serde(default)]
    source: String,
}

/// Checks the whole section.
pub(crate) fn check(section: Vec<ForeignSecretFile>, problems: &mut Vec<Problem>) -> ForeignSecrets {
    let (mut by_prefix, mut by_infix) = (Vec::new(), Vec::new());
    for (index, file) in section.into_iter().enumerate() {
        let mut problem = |message: &str| problems.push(Problem::at(format!("foreign_secrets[{index}]"), message));
        let ForeignSecretFile { what, prefix, infixes, length, min_length, max_length, key_of, letters, source } = file;
        let infixes = infixes.unwrap_or_default();
        if what.trim().is_empty() || source.trim().is_empty() {
            problem("needs `what` it is, with its article, and a `source`");
        }
        if infixes.iter().any(String::is_empty) {
            problem("an infix is empty");
        }
        let letters = match letters.as_deref() {
            None => Letters::Any,
            Some("upper_and_digits") => Letters::UpperAndDigits,
            Some("hexadecimal") => Letters::Hexadecimal,
            Some(_) => {
                problem("`letters` must be `upper_and_digits` or `hexadecimal`");
                Letters::Any
            }
        };
        // Without a prefix, the infixes alone must be enough to recognise a secret.
        let infix_bytes: usize = infixes.iter().map(String::len).sum();
        if prefix.is_empty() && infix_bytes < MIN_INFIX_BYTES {
            problem("without a prefix, the infixes have three characters at least");
        }
        if prefix.len() < MIN_PREFIX_BYTES && infixes.is_empty() && (length.is_none() || letters == Letters::Any) {
            problem("a prefix of less than four characters needs an infix, or `length` and `letters`: real keys may begin so");
        }
        let lengths = length.or(min_length).unwrap_or(0)..=length.or(max_length).unwrap_or(usize::MAX);
        if lengths.is_empty() {
            problem("`max_length` is less than `min_length`");
        }
        let shape = Shape { what, prefix, infixes, lengths, letters, key_of };
        if shape.prefix.is_empty() { &mut by_infix } else { &mut by_prefix }.push(shape);
    }
    ForeignSecrets { by_prefix: by_prefix.into_iter().collect(), by_infix }
}

// === impl ForeignSecrets ===

impl ForeignSecrets {
    /// The name of this kind of secret, with its article. `None` if the value is not a known one, or if hosts of `vendor` take it as a key.
    pub fn what(&self, value: &str, vendor: Option<&str>) -> Option<&str> {
        let found = self.by_prefix.like(value).iter().find(|shape| shape.fits(value)).or_else(|| {
            // Every kind without a prefix has one of these characters. Most keys have none.
            let may_match = value.bytes().fold(false, |may_match, byte| may_match | matches!(byte, b':' | b'=' | b'.' | b'~'));
            self.by_infix.iter().filter(|_| may_match).find(|shape| shape.fits(value))
        });
        found.filter(|shape| shape.key_of.is_none() || shape.key_of.as_deref() != vendor).map(|shape| shape.what.as_str())
    }

    /// Adds these kinds.
    pub fn lay_over(&mut self, over: Self) {
        self.by_prefix.extend(over.by_prefix);
        self.by_infix.extend(over.by_infix);
    }
}

// === impl Shape ===

impl Prefixed for Shape {
    fn prefix(&self) -> &str {
        &self.prefix
    }
}

impl Shape {
    fn fits(&self, value: &str) -> bool {
        let Some(rest) = value.strip_prefix(self.prefix.as_str()) else { return false };
        if !self.lengths.contains(&value.len()) {
            return false;
        }
        let all = |is: fn(&u8) -> bool| rest.as_bytes().iter().all(is);
        let letters = match self.letters {
            Letters::Any => true,
            Letters::UpperAndDigits => all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit()),
            Letters::Hexadecimal => all(u8::is_ascii_hexdigit),
        };
        let mut left = rest;
        // Each infix comes after the one before.
        let infixes = self.infixes.iter().all(|infix| match left.split_once(infix.as_str()) {
            Some((_, behind)) => {
                left = behind;
                true
            }
            None => false,
        });
        letters && infixes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry must be told, and rare enough that no real key is taken for it.
    #[test]
    fn an_entry_that_could_take_a_key_is_refused() {
        let count = |entry: &str| {
            let mut problems = Vec::new();
            check(serde_yaml::from_str(&format!("[{{{entry}}}]")).unwrap(), &mut problems);
            problems.len()
        };
        for (entry, expected) in [
            ("what: a token, source: x, prefix: made", 0),
            ("what: a token, prefix: made", 1),
            ("source: x, prefix: made", 1),
            ("what: a token, source: x, prefix: mad", 1),
            ("what: a token, source: x, prefix: mad, length: 20", 1),
            ("what: a token, source: x, prefix: mad, letters: hexadecimal", 1),
            ("what: a token, source: x, prefix: mad, length: 20, letters: hexadecimal", 0),
            ("what: a token, source: x, prefix: mad, infixes: [up]", 0),
            ("what: a token, source: x, prefix: made, infixes: ['']", 1),
            ("what: a token, source: x, infixes: [up]", 1),
            ("what: a token, source: x, infixes: [u, p, m]", 0),
            ("what: a token, source: x, prefix: made, letters: greek", 1),
            ("what: a token, source: x, prefix: made, min_length: 9, max_length: 8", 1),
            ("what: a token, source: x, prefix: made, min_length: 9, max_length: 9", 0),
        ] {
            assert_eq!(count(entry), expected, "{entry}");
        }
    }
}
