//! Values that certainly are no key of an LLM provider: tokens of source hosts, clouds, chats and payments, private keys, database URLs. Known
//! by how they begin, what they hold and how long they are, as data: `foreign_secrets:` in the catalogue.

use serde::Deserialize;

use crate::domain::problem::Problem;

/// A beginning this short says nothing of a value, unless its length and its letters are given too.
const MIN_PREFIX_BYTES: usize = 4;
/// So are parts this short, in a kind that has no beginning.
const MIN_INFIX_BYTES: usize = 3;

/// Every kind that is known.
#[derive(Debug, Clone, Default)]
pub struct ForeignSecrets {
    /// Those with a beginning, by its first byte; sorted by it.
    beginning: Vec<Shape>,
    /// Those that are known by what they hold.
    holding: Vec<Shape>,
}

/// One kind.
#[derive(Debug, Clone)]
struct Shape {
    what: String,
    prefix: String,
    infixes: Vec<String>,
    lengths: std::ops::RangeInclusive<usize>,
    letters: Letters,
    /// At the hosts of this vendor it is a key.
    key_of: Option<String>,
}

/// Which characters stand behind the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Letters {
    Any,
    UpperAndDigits,
    Hexadecimal,
}

/// The schema.
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

/// Checks the section of this name.
pub(crate) fn check(section: Vec<ForeignSecretFile>, problems: &mut Vec<Problem>) -> ForeignSecrets {
    let mut found = ForeignSecrets::default();
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
        // Alone, what a value holds has to be as telling as a beginning.
        let held: usize = infixes.iter().map(String::len).sum();
        if prefix.is_empty() && held < MIN_INFIX_BYTES {
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
        if shape.prefix.is_empty() { &mut found.holding } else { &mut found.beginning }.push(shape);
    }
    found.sort();
    found
}

// === impl ForeignSecrets ===

impl ForeignSecrets {
    /// What this value is, with its article, if it is one of them and no key at the hosts of `vendor`.
    pub fn what(&self, value: &str, vendor: Option<&str>) -> Option<&str> {
        let first = value.as_bytes().first()?;
        let from = self.beginning.partition_point(|shape| shape.prefix.as_bytes().first() < Some(first));
        let mut found = self.beginning.iter().skip(from).take_while(|shape| shape.prefix.as_bytes().first() == Some(first));
        let found = found.find(|shape| shape.fits(value)).or_else(|| {
            // Each of them holds one of these; most keys do not.
            let holds = value.bytes().fold(false, |holds, byte| holds | matches!(byte, b':' | b'=' | b'.' | b'~'));
            self.holding.iter().filter(|_| holds).find(|shape| shape.fits(value))
        });
        found.filter(|shape| shape.key_of.is_none() || shape.key_of.as_deref() != vendor).map(|shape| shape.what.as_str())
    }

    /// How many kinds are known.
    pub fn count(&self) -> usize {
        self.beginning.len() + self.holding.len()
    }

    /// These kinds beside the present ones.
    pub fn lay_over(&mut self, over: Self) {
        self.beginning.extend(over.beginning);
        self.holding.extend(over.holding);
        self.sort();
    }

    fn sort(&mut self) {
        // The longest first: it says the most.
        self.beginning.sort_by(|one, other| {
            let key = |shape: &Shape| (shape.prefix.as_bytes().first().copied(), std::cmp::Reverse(shape.prefix.len()));
            key(one).cmp(&key(other))
        });
    }
}

// === impl Shape ===

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
        // Each behind the one before it.
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
