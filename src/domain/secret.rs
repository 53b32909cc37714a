//! The credential value: it cannot be printed, compared in variable time, cloned or serialised, and is wiped on drop.

use std::{hint::black_box, mem::MaybeUninit};

use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// More than a hash function takes of the stack, in KiB.
const WIPED_STACK: usize = 8;

/// A credential value. Shared by `Arc`, never copied; `expose` is the one way to its text.
pub struct Secret(Zeroizing<String>);

// === impl Secret ===

impl Secret {
    /// Takes the text over.
    pub fn new(value: String) -> Self {
        Self(Zeroizing::new(value))
    }

    /// The text itself. Callers hash it, inspect its shape, or put it into a request's header; nothing else.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Holds nothing but ASCII white space: such a row counts as absent, as it would in the workspace.
    pub fn is_blank(&self) -> bool {
        self.0.bytes().all(|byte| byte.is_ascii_whitespace())
    }

    /// Equal to `other`, in time that depends on the lengths alone.
    pub fn same_as(&self, other: &Self) -> bool {
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Does what reads a secret, as hashing it does, and wipes the stack that it used: a hash function copies what it reads into blocks there,
/// and what comes later on this thread may not reach them for as long as the server is idle.
pub fn with_stack_wiped<T>(work: impl FnOnce() -> T) -> T {
    let result = run(work);
    wipe_stack();
    result
}

/// Never inlined, as the other: so both begin at the same place of the stack.
#[inline(never)]
fn run<T>(work: impl FnOnce() -> T) -> T {
    work()
}

#[inline(never)]
fn wipe_stack() {
    let mut stack = [const { MaybeUninit::<[u8; 1024]>::uninit() }; WIPED_STACK];
    // In parts: beyond 2 KiB at once, the C library's memset takes an instruction that is slow to begin and counts for every byte.
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
