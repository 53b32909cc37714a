//! The log's events, checked against their published schema.

use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::Value;

pub(crate) const SCHEMA: &str = include_str!("../../../docs/decision-event.schema.json");

/// The decisions, and the calls that ended without one, among these lines of a server's log. Each fits the schema.
#[track_caller]
pub(crate) fn decision_events(log: &str) -> Vec<Value> {
    static VALIDATOR: LazyLock<Validator> =
        LazyLock::new(|| jsonschema::validator_for(&serde_json::from_str(SCHEMA).unwrap()).unwrap());
    let mut found = Vec::new();
    for line in log.lines() {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|fault| panic!("{fault}: {line:?}"));
        if matches!(event["event"].as_str(), Some("decision" | "undecided")) {
            let faults: Vec<_> = VALIDATOR.iter_errors(&event).map(|fault| fault.to_string()).collect();
            assert!(faults.is_empty(), "{faults:?}: {line}");
            found.push(event);
        }
    }
    found
}
