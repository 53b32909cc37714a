//! Changes of the configuration and of callers. Each is logged, and the last ones are kept for the status page: when more is denied than before,
//! the first question is what was changed.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use super::{
    cut,
    metrics::{Collect, Counter, Page},
};

/// How many changes are kept.
const MAX_ENTRIES: usize = 50;

/// The changes since the start, as far as they are kept.
#[derive(Debug, Default)]
pub struct RecentChanges {
    list: Mutex<VecDeque<Change>>,
    loosened: Counter,
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// When it came into force.
    pub at: SystemTime,
    /// The name of its log line: `configuration_changed`.
    pub event: &'static str,
    /// The setting.
    pub setting: String,
    /// The caller, if it is about one.
    pub caller: String,
    /// The old value.
    pub was: String,
    /// The new value.
    pub is: String,
}

/// A setting with its old and its new value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedSetting {
    /// Its key.
    pub setting: String,
    /// The old value.
    pub was: String,
    /// The new value.
    pub is: String,
}

// === impl RecentChanges ===

impl RecentChanges {
    /// A document with another revision. The watcher logs that it was read.
    pub fn document(&self, document: &str, was: &str, is: &str) {
        if was != is {
            self.keep("reloaded", document, "", was, is);
        }
    }

    /// Settings that have other values in the configuration than before.
    pub fn changed(&self, changes: &[ChangedSetting]) {
        if changes.is_empty() {
            return;
        }
        let settings = changes.iter().map(|change| change.setting.as_str()).collect::<Vec<_>>().join(", ");
        let text = |ChangedSetting { setting, was, is }: &ChangedSetting| format!("{setting}: {} -> {}", shown(was), shown(is));
        let values = changes.iter().map(text).collect::<Vec<_>>().join("; ");
        tracing::info!(
            event = "configuration_changed",
            settings,
            changes = values,
            "the configuration has other values than before"
        );
        for ChangedSetting { setting, was, is } in changes {
            self.keep("configuration_changed", setting, "", was, is);
        }
    }

    /// A setting that lets through more than before.
    pub fn loosened(&self, setting: &str, was: &str, is: &str) {
        self.loosened.inc();
        tracing::warn!(event = "configuration_loosened", setting, was, is, "from now on more is let through than before");
        self.keep("configuration_loosened", setting, "", was, is);
    }

    /// A caller that was taken off a list or out of the token file.
    pub fn caller_removed(&self, setting: &str, caller: &str) {
        tracing::warn!(event = "caller_removed", setting, caller, "its calls are refused from now on");
        self.keep("caller_removed", setting, caller, "", "");
    }

    /// A caller whose role is another one.
    pub fn caller_changed(&self, setting: &str, caller: &str, was: &str, is: &str) {
        tracing::warn!(event = "caller_changed", setting, caller, was, is, "its role changed from {was} to {is}");
        self.keep("caller_changed", setting, caller, was, is);
    }

    /// The last changes, newest first.
    pub fn newest_first(&self) -> Vec<Change> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).iter().rev().cloned().collect()
    }

    fn keep(&self, event: &'static str, setting: &str, caller: &str, was: &str, is: &str) {
        // A panic cannot leave the list inconsistent: the code that changes it cannot panic.
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if list.len() >= MAX_ENTRIES {
            list.pop_front();
        }
        let [setting, caller, was, is] = [setting, caller, was, is].map(shown);
        list.push_back(Change { at: SystemTime::now(), event, setting, caller, was, is });
    }
}

impl Collect for RecentChanges {
    fn collect(&self, page: &mut Page) {
        page.counter("byokgate_configuration_loosened", "Settings that a reload has changed to let more through than before")
            .add(&[], &self.loosened);
    }
}

/// A value for people: short, and without what stands between `//` and `@` in a URL.
fn shown(value: &str) -> String {
    let without_user = value
        .split_once("://")
        .and_then(|(scheme, rest)| Some((scheme, rest.split('/').next()?.rsplit_once('@')?.0.len(), rest)))
        .map(|(scheme, user, rest)| format!("{scheme}://...{}", rest.get(user..).unwrap_or_default()));
    cut(without_user.as_deref().unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use super::{super::MAX_CHARS, *};

    #[test]
    fn the_last_changes_are_kept_and_each_is_short_and_shows_no_password() {
        let changes = RecentChanges::default();
        for number in 0..MAX_ENTRIES + 7 {
            changes.loosened("policy.create.inconclusive", &number.to_string(), "allow");
        }
        let kept = changes.newest_first();
        assert_eq!((kept.len(), kept[0].was.as_str()), (MAX_ENTRIES, "56"));
        for (was, expect) in [
            ("https://user:made-up-canary@collector.example:4317/a@b", "https://...@collector.example:4317/a@b"),
            ("https://collector.example", "https://collector.example"),
        ] {
            changes.changed(&[ChangedSetting { setting: "s".into(), was: was.into(), is: "i".repeat(1_000) }]);
            let newest = &changes.newest_first()[0];
            assert_eq!((newest.was.as_str(), newest.is.chars().count()), (expect, MAX_CHARS + 1));
        }
    }
}
