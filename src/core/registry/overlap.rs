//! Finds a model id that two patterns both match. Exact: both automata are walked at once. Used when a registry is loaded.

use std::collections::{HashSet, VecDeque};

use regex_automata::{
    Input,
    dfa::{Automaton, dense},
    util::primitives::StateID,
};

/// The largest automaton that is built. Real patterns need less than 10 KB; larger ones are not compared.
const MAX_DFA_BYTES: usize = 1024 * 1024;
/// The most pairs of states that are visited before the search gives up.
const MAX_PAIRS: usize = 50_000;

/// A pattern that can be compared with others.
pub(super) struct Comparable {
    dfa: dense::DFA<Vec<u32>>,
}

/// A state of each automaton; `None` if the pattern has already matched, whatever follows.
type Pair = [Option<StateID>; 2];

impl Comparable {
    /// `None` if the pattern is too large or of a kind that cannot be compared.
    pub(super) fn of(pattern: &str) -> Option<Self> {
        let limits = dense::Config::new().dfa_size_limit(Some(MAX_DFA_BYTES)).determinize_size_limit(Some(MAX_DFA_BYTES));
        Some(Self { dfa: dense::Builder::new().configure(limits).build(pattern).ok()? })
    }

    /// A shortest id that both patterns match, if there is one.
    pub(super) fn common(&self, other: &Self) -> Option<String> {
        let both = [&self.dfa, &other.dfa];
        let start = |dfa: &dense::DFA<Vec<u32>>| dfa.start_state_forward(&Input::new("")).ok();
        let first = [Some(start(both[0])?), Some(start(both[1])?)];
        let (mut seen, mut queue) = (HashSet::from([first]), VecDeque::from([(first, String::new())]));
        while let Some((pair, text)) = queue.pop_front() {
            if both_match_at_end(both, pair) {
                return Some(text);
            }
            for byte in id_bytes() {
                let Some(next) = step(both, pair, byte) else { continue };
                if seen.len() >= MAX_PAIRS {
                    return None;
                }
                if seen.insert(next) {
                    queue.push_back((next, format!("{text}{}", char::from(byte))));
                }
            }
        }
        None
    }
}

/// The characters that ids consist of, common ones first, so that the id that is found looks like a real one.
fn id_bytes() -> impl Iterator<Item = u8> {
    let usual = || (b'a'..=b'z').chain(b'0'..=b'9').chain(*b"-/:._");
    usual().chain((b' '..=b'~').filter(move |byte| usual().all(|other| other != *byte)))
}

/// The next pair of states; `None` if one of the patterns can no longer match.
fn step(both: [&dense::DFA<Vec<u32>>; 2], pair: Pair, byte: u8) -> Option<Pair> {
    let [one, two] = both;
    let [left, right] = pair;
    Some([follow(one, left, byte)?, follow(two, right, byte)?])
}

fn follow(dfa: &dense::DFA<Vec<u32>>, state: Option<StateID>, byte: u8) -> Option<Option<StateID>> {
    let Some(state) = state else { return Some(None) };
    let next = dfa.next_state(state, byte);
    if dfa.is_match_state(next) {
        Some(None)
    } else if dfa.is_dead_state(next) || dfa.is_quit_state(next) {
        None
    } else {
        Some(Some(next))
    }
}

fn both_match_at_end(both: [&dense::DFA<Vec<u32>>; 2], pair: Pair) -> bool {
    let ends = |dfa: &dense::DFA<Vec<u32>>, state: Option<StateID>| {
        state.is_none_or(|state| dfa.is_match_state(dfa.next_eoi_state(state)))
    };
    let ([one, two], [left, right]) = (both, pair);
    ends(one, left) && ends(two, right)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn common(one: &str, two: &str, expect: Option<&str>) {
        let (left, right) = (Comparable::of(one).unwrap(), Comparable::of(two).unwrap());
        for (found, order) in [(left.common(&right), "in order"), (right.common(&left), "turned round")] {
            assert_eq!(found.is_some(), expect.is_some(), "{one} and {two} {order}: {found:?}");
            if let Some(text) = found {
                let matches = |pattern: &str| regex::Regex::new(pattern).unwrap().is_match(&text);
                assert!(matches(one) && matches(two), "{text}");
                assert_eq!(Some(text.as_str()), expect, "{order}");
            }
        }
    }

    #[test]
    fn exact_witnesses() {
        common("^gpt-", "^gpt-5", Some("gpt-5"));
        common("^gpt-", "^claude", None);
        common("(?i)^minimax-m", "^minimax-cn[:/]", None);
        common("(?i)^MiniMax-", "^minimax-cn[:/]", Some("minimax-cn/"));
        common("^(sonnet|opus|haiku)$", "^opus", Some("opus"));
        common("^(sonnet|opus|haiku)$", "^opus-", None);
        common("^a.*z$", "^ab", Some("abz"));
        common("-latest$", "^gpt-", Some("gpt-latest"));
        common("x", "y", Some("xy"));
        common("", "^a$", Some("a"));
        common("^$", "^a", None);
        common("^moonshot[:/-]", "^moonshot:", Some("moonshot:"));
    }

    #[test]
    fn a_monstrous_pattern_is_not_looked_into() {
        assert!(Comparable::of("(a|b)*a(a|b){40}").is_none());
    }
}
