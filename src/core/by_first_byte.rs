//! A list of things with a prefix, in which those that a value could begin with are found by its first byte.

use std::cmp::Reverse;

/// Something with a prefix.
pub trait Prefixed {
    /// The prefix.
    fn prefix(&self) -> &str;
}

/// Things with a prefix, the longest prefixes of each first byte first. Equal prefixes stay together, in the order in which they were added.
#[derive(Debug, Clone)]
pub struct ByFirstByte<T> {
    items: Vec<T>,
    /// Where the prefixes with each first byte begin. One more than there are bytes, so that each has an end.
    begins: Vec<usize>,
}

// === impl ByFirstByte ===

impl<T: Prefixed> ByFirstByte<T> {
    /// Those whose prefix has the value's first byte.
    pub fn like(&self, value: &str) -> &[T] {
        let Some(first) = value.as_bytes().first().map(|first| usize::from(*first)) else { return &[] };
        let (from, to) = (self.begins.get(first), self.begins.get(first + 1));
        from.zip(to).and_then(|(from, to)| self.items.get(*from..*to)).unwrap_or_default()
    }

    /// All of them.
    pub fn iter(&self) -> std::slice::Iter<'_, T> {
        self.items.iter()
    }

    /// Adds these.
    pub fn extend(&mut self, more: impl IntoIterator<Item = T>) {
        *self = std::mem::take(&mut self.items).into_iter().chain(more).collect();
    }
}

impl<T: Prefixed> FromIterator<T> for ByFirstByte<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let mut items: Vec<T> = items.into_iter().collect();
        let first = |item: &T| item.prefix().bytes().next();
        items.sort_by(|one, other| {
            let key = |item: &T| (first(item), Reverse(item.prefix().len()));
            key(one).cmp(&key(other)).then_with(|| one.prefix().cmp(other.prefix()))
        });
        let below = |byte: u8| items.partition_point(|item| first(item) < Some(byte));
        let begins = (0..=u8::MAX).map(below).chain([items.len()]).collect();
        Self { items, begins }
    }
}

impl<T: Prefixed> Default for ByFirstByte<T> {
    fn default() -> Self {
        Self::from_iter([])
    }
}

impl<T: Prefixed> IntoIterator for ByFirstByte<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Prefixed for &'static str {
        fn prefix(&self) -> &str {
            self
        }
    }

    #[test]
    fn a_value_finds_its_first_byte_longest_first() {
        let mut found: ByFirstByte<&str> = ["b", "ab", "", "abc", "\u{ff}x", "a"].into_iter().collect();
        for (value, like) in [
            ("abcd", &["abc", "ab", "a"][..]),
            ("a", &["abc", "ab", "a"]),
            ("b", &["b"]),
            ("", &[]),
            ("c", &[]),
            ("\0", &[]),
            ("\u{ff}", &["\u{ff}x"]),
        ] {
            assert_eq!(found.like(value), like, "{value:?}");
        }
        found.extend(["bcd", "c"]);
        assert_eq!((found.like("b"), found.like("c"), found.iter().count()), (&["bcd", "b"][..], &["c"][..], 8));
        assert!(ByFirstByte::<&str>::default().like("a").is_empty());
    }
}
