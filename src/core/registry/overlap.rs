//! Finds a model id that two patterns both match. Exact: both automata are walked at once. Used when a registry is loaded.
//!
//! Nearly every pattern begins with a text of its own, such as `^acme[:/]`. Two such patterns can match the same id only if one of these texts
//! begins with the other. So a sort finds the few pairs to compare, and a registry with many providers is not compared pair by pair.

use std::{
    cell::OnceCell,
    collections::{BTreeSet, HashSet, VecDeque},
};

use regex_automata::{
    Input,
    dfa::{Automaton, dense},
    util::primitives::StateID,
};
use regex_syntax::hir::{Look, literal::Extractor};

/// The largest automaton that is built. Real patterns need less than 10 KB; larger ones are not compared.
const MAX_DFA_BYTES: usize = 1024 * 1024;
/// The most pairs of states that are visited before the search gives up.
const MAX_PAIRS: usize = 50_000;

/// A pattern that can be compared with others.
pub(super) struct Comparable {
    pattern: String,
    /// Built for the first comparison, since most patterns need none. `None` if the pattern is too large or of a kind that cannot be compared.
    dfa: OnceCell<Option<dense::DFA<Vec<u32>>>>,
    /// Every id that matches begins with one of these. `None` if it may begin with anything.
    beginnings: Option<Vec<Vec<u8>>>,
}

/// Whether two patterns match the same id.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Overlap {
    /// They do not, as far as was looked.
    None,
    /// They both match this one, a shortest one.
    At(String),
    /// One of them cannot be compared.
    Unknown,
}

/// A state of each automaton; `None` if the pattern has already matched, whatever follows.
type Pair = [Option<StateID>; 2];

impl Comparable {
    pub(super) fn of(pattern: &str) -> Self {
        Self { pattern: pattern.to_owned(), dfa: OnceCell::new(), beginnings: beginnings(pattern) }
    }

    fn dfa(&self) -> Option<&dense::DFA<Vec<u32>>> {
        let limits = || dense::Config::new().dfa_size_limit(Some(MAX_DFA_BYTES)).determinize_size_limit(Some(MAX_DFA_BYTES));
        self.dfa.get_or_init(|| dense::Builder::new().configure(limits()).build(&self.pattern).ok()).as_ref()
    }

    /// The pairs of patterns that may match the same id, in their order, up to this many, and whether these are all. No other pair overlaps then.
    pub(super) fn pairs(patterns: &[Self], limit: usize) -> (BTreeSet<(usize, usize)>, bool) {
        let mut pairs = BTreeSet::new();
        let mut add = |one: usize, other: usize| {
            if one != other && pairs.len() <= limit {
                pairs.insert((one.min(other), one.max(other)));
            }
            pairs.len() <= limit
        };
        let mut sorted: Vec<(&[u8], usize)> = Vec::new();
        for (index, pattern) in patterns.iter().enumerate() {
            match &pattern.beginnings {
                Some(texts) => sorted.extend(texts.iter().map(|text| (text.as_slice(), index))),
                None => drop((0..patterns.len()).all(|other| add(index, other))),
            }
        }
        sorted.sort_unstable();
        // Sorted, a text is followed by those that begin with it. So `open` holds all beginnings of the current text.
        let mut open: Vec<(&[u8], usize)> = Vec::new();
        for (text, index) in sorted {
            while open.last().is_some_and(|(shorter, _)| !text.starts_with(shorter)) {
                open.pop();
            }
            if !open.iter().all(|(_, other)| add(index, *other)) {
                break;
            }
            open.push((text, index));
        }
        let are_all = pairs.len() <= limit;
        if !are_all {
            pairs.pop_last();
        }
        (pairs, are_all)
    }

    /// An id that both patterns match, if there is one.
    pub(super) fn common(&self, other: &Self) -> Overlap {
        let (Some(one), Some(other)) = (self.dfa(), other.dfa()) else { return Overlap::Unknown };
        shortest([one, other]).map_or(Overlap::None, Overlap::At)
    }
}

/// The texts with which every match begins, if there are few.
fn beginnings(pattern: &str) -> Option<Vec<Vec<u8>>> {
    let parsed = regex_syntax::parse(pattern).ok()?;
    if !parsed.properties().look_set_prefix().contains(Look::Start) {
        return None;
    }
    let found = Extractor::new().extract(&parsed);
    Some(found.literals()?.iter().map(|literal| literal.as_bytes().to_vec()).collect())
}

/// A shortest id that both patterns match, if there is one.
fn shortest(both: [&dense::DFA<Vec<u32>>; 2]) -> Option<String> {
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

    fn pairs(patterns: &[Comparable]) -> Vec<(usize, usize)> {
        let (pairs, are_all) = Comparable::pairs(patterns, 100);
        assert!(are_all);
        pairs.into_iter().collect()
    }

    #[track_caller]
    fn common(one: &str, two: &str, expect: Option<&str>) {
        for (patterns, order) in [([one, two], "in order"), ([two, one], "turned round")] {
            let compared = patterns.map(Comparable::of);
            let found = match compared[0].common(&compared[1]) {
                Overlap::At(text) => Some(text),
                Overlap::None => None,
                Overlap::Unknown => panic!("{one} and {two} {order}"),
            };
            assert_eq!(found.as_deref(), expect, "{one} and {two} {order}");
            if let Some(text) = found {
                let matches = |pattern: &str| regex::Regex::new(pattern).unwrap().is_match(&text);
                assert!(matches(one) && matches(two), "{text}");
                assert_eq!(pairs(&compared), [(0, 1)], "{one} and {two} {order}: not compared");
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
        let compared = ["(a|b)*a(a|b){40}", "^c"].map(Comparable::of);
        assert_eq!(compared[0].common(&compared[1]), Overlap::Unknown);
        assert_eq!(pairs(&compared), [(0, 1)], "they may overlap");
    }

    /// Few pairs of many patterns are compared, and none that overlaps is left out.
    #[test]
    fn patterns_that_begin_differently_are_not_compared() {
        let of = |patterns: &[String]| patterns.iter().map(|pattern| Comparable::of(pattern)).collect::<Vec<_>>();
        let many: Vec<String> = (100..400).map(|number| format!("(?i)^vendor-{number}[:/-]")).collect();
        assert_eq!(pairs(&of(&many)), []);
        let same = of(&vec!["^a".to_owned(); 50]);
        let (some, are_all) = Comparable::pairs(&same, 100);
        assert_eq!((some.len(), are_all), (100, false), "limited");
        let mixed = ["^gpt-", "^(gpt-5|o3)", "(?i)^GPT-4", "mini$", "^o1", "^\\w+-x", "^(?m:^)a", "^k"].map(str::to_owned);
        let compared = of(&mixed);
        let found = pairs(&compared);
        for one in 0..mixed.len() {
            for two in one + 1..mixed.len() {
                let overlaps = compared[one].common(&compared[two]) != Overlap::None;
                assert!(!overlaps || found.contains(&(one, two)), "{} and {}", mixed[one], mixed[two]);
            }
        }
        assert!(!found.contains(&(0, 4)) && !found.contains(&(1, 4)) && found.contains(&(0, 2)), "{found:?}");
    }
}
