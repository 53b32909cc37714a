//! A credential's value. It cannot be printed, cloned or serialised, is compared in constant time, and is wiped on drop.

use std::{hint::black_box, mem::MaybeUninit};

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// The part of the stack that is wiped, in KiB. More than a hash function uses.
const WIPED_STACK: usize = 8;
/// The same for the hash of one piece of at most this many bytes, which is hashed without a tree. It uses less than half of that.
const ONE_PIECE: usize = 1024;
const WIPED_STACK_OF_ONE_PIECE: usize = 2;

/// A credential's value. It is shared by `Arc` and never copied; `expose` is the only access to its text.
pub struct Secret(Zeroizing<String>);

// === impl Secret ===

impl Secret {
    /// Takes ownership of the text.
    pub fn new(value: String) -> Self {
        Self(Zeroizing::new(value))
    }

    /// The text. Callers may hash it, check its shape, or put it into a request's header.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether the value is empty or ASCII white space. It then counts as missing, as in the workspace.
    pub fn is_blank(&self) -> bool {
        self.0.bytes().all(|byte| byte.is_ascii_whitespace())
    }

    /// Whether the values are equal. The time depends only on their lengths.
    pub fn same_as(&self, other: &Self) -> bool {
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Runs work that reads a secret and wipes the stack that it has used. A hash function copies its input to the stack, and on an idle server later
/// calls might not overwrite it for a long time.
pub fn with_stack_wiped<T>(work: impl FnOnce() -> T) -> T {
    let result = run(work);
    wipe_stack::<WIPED_STACK>();
    result
}

/// The keyed hash of a secret, of which nothing is left on the stack.
pub fn keyed_hash(key: &[u8; 32], secret: &[u8]) -> [u8; 32] {
    let hash = run(|| *blake3::keyed_hash(key, secret).as_bytes());
    if secret.len() <= ONE_PIECE {
        wipe_stack::<WIPED_STACK_OF_ONE_PIECE>()
    } else {
        wipe_stack::<WIPED_STACK>()
    }
    hash
}

/// Neither function is inlined, so that both begin at the same place on the stack.
#[inline(never)]
fn run<T>(work: impl FnOnce() -> T) -> T {
    work()
}

#[inline(never)]
fn wipe_stack<const KIB: usize>() {
    let mut stack = [const { MaybeUninit::<[u8; 1024]>::uninit() }; KIB];
    // In parts of 1 KiB: beyond 2 KiB at once, the C library's memset uses an instruction that is slow to start and counts for every byte.
    for part in &mut stack {
        black_box(part.write([0; 1024]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_nothing() {
        let secret = Secret::new("made-up-canary".into());
        assert_eq!(format!("{secret:?} {secret:#?}"), "Secret(..) Secret(..)");
    }

    #[test]
    fn blank_is_ascii_white_space_only() {
        for (value, blank) in [("", true), (" \t\r\n", true), ("\u{a0}", false), (" k ", false)] {
            assert_eq!(Secret::new(value.into()).is_blank(), blank, "{value:?}");
        }
    }

    #[test]
    fn same_as_compares_whole_values() {
        let one = Secret::new("made-up-one".into());
        assert!(one.same_as(&Secret::new("made-up-one".into())));
        assert!(!one.same_as(&Secret::new("made-up-onf".into())));
        assert!(!one.same_as(&Secret::new("made-up-one ".into())));
    }
}
