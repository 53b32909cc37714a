//! Compares two configurations: what the new one allows more than the old one, and which changes need a restart. A reload logs this.

use std::{collections::BTreeSet, fmt::Debug};

use serde_json::Value;

use super::{layers::leaves, settings::Settings};
use crate::{
    core::policy::{Enforcement, Overrides, ProviderException},
    domain::{problem::Problem, request::PlatformProxy},
    server::settings::{CallerList, CertificateCaller, RoleWord, UnixCaller},
    telemetry::recent_changes::ChangedSetting,
};

/// Sections and keys that a reload applies. All others are only read at the start.
const LIVE: [&str; 8] = [
    "callers.certificates",
    "callers.unix_peers",
    "exempt_runtimes",
    "operator_overrides",
    "platform_proxy",
    "policy",
    "providers",
    "registry.file",
];

/// A setting that allows what was refused before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loosened {
    /// Its key.
    pub setting: String,
    /// The old value.
    pub was: String,
    /// The new value.
    pub is: String,
}

/// Problems of caller lists that lost all entries without saying `anyone`. A truncated file must not let everybody in.
pub fn emptied(old: &Settings, new: &Settings) -> Vec<Problem> {
    fn one<T>(key: &str, old: &CallerList<T>, new: &CallerList<T>) -> Option<Problem> {
        let entries = old.entries().len();
        let lost = entries > 0 && matches!(new, CallerList::Only(list) if list.is_empty());
        lost.then(|| {
            let had = if entries == 1 { "1 entry".to_owned() } else { format!("{entries} entries") };
            let message = format!("had {had} and has none; write `anyone` if everybody may call from now on");
            Problem::at(key, message)
        })
    }
    [
        one("callers.certificates", &old.callers.certificates, &new.callers.certificates),
        one("callers.unix_peers", &old.callers.unix_peers, &new.callers.unix_peers),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Every setting that allows more than before.
pub fn loosened(old: &Settings, new: &Settings) -> Vec<Loosened> {
    let mut found = Vec::new();
    let mut add = |setting: String, was: String, is: String| found.push(Loosened { setting, was, is });
    if (old.operator_overrides, new.operator_overrides) == (Overrides::Refuse, Overrides::Honour) {
        add("operator_overrides".into(), "refuse".into(), "honour".into());
    }
    if (old.platform_proxy, new.platform_proxy) == (PlatformProxy::Absent, PlatformProxy::Available) {
        add("platform_proxy".into(), "absent".into(), "available".into());
    }
    for runtime in new.exempt_runtimes.difference(&old.exempt_runtimes) {
        add("exempt_runtimes".into(), format!("without `{runtime}`"), format!("with `{runtime}`"));
    }
    for ((checkpoint, was), (_, is)) in old.policy.checkpoints().into_iter().zip(new.policy.checkpoints()) {
        for ((group, was), (_, is)) in was.groups().into_iter().zip(is.groups()) {
            if is < was {
                let setting = format!("policy.{}.{group:?}", checkpoint.as_str()).to_lowercase();
                add(setting, word(&was), word(&is));
            }
        }
    }
    for (provider, is) in &new.providers {
        let was = old.providers.get(provider);
        if is.probe != Enforcement::Enforce && looser(was, is) {
            add(format!("providers.{provider}"), was.map_or_else(|| "enforce".to_owned(), exception), exception(is));
        }
    }
    let (was, is) = (&old.callers, &new.callers);
    callers("callers.certificates", &was.certificates, &is.certificates, &mut add);
    callers("callers.unix_peers", &was.unix_peers, &is.unix_peers, &mut add);
    found
}

/// A caller whose rights changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedCaller {
    /// The setting that lists it.
    pub setting: &'static str,
    /// Who it is.
    pub caller: String,
    /// What it could do.
    pub was: String,
    /// What it can do.
    pub is: String,
}

/// Callers that were removed: the setting, and the caller.
pub fn removed_callers(old: &Settings, new: &Settings) -> Vec<(&'static str, String)> {
    fn removed<T: Listed>(key: &'static str, was: &CallerList<T>, is: &CallerList<T>) -> Vec<(&'static str, String)> {
        // If everybody may call, no caller was removed.
        let is_gone = |entry: &&T| !is.entries().is_empty() && !is.entries().iter().any(|other| other.who() == entry.who());
        was.entries().iter().filter(is_gone).map(|entry| (key, entry.text())).collect()
    }
    let (was, is) = (&old.callers, &new.callers);
    let mut gone = removed("callers.certificates", &was.certificates, &is.certificates);
    gone.extend(removed("callers.unix_peers", &was.unix_peers, &is.unix_peers));
    gone
}

/// Callers that are still listed, and have another role.
pub fn changed_callers(old: &Settings, new: &Settings) -> Vec<ChangedCaller> {
    fn changed<T: Listed>(setting: &'static str, was: &CallerList<T>, is: &CallerList<T>) -> Vec<ChangedCaller> {
        let found = is.entries().iter().filter_map(|entry| {
            let earlier = was.entries().iter().find(|other| other.who() == entry.who())?;
            let (was, is) = (earlier.rights(), entry.rights());
            (was != is).then(|| ChangedCaller { setting, caller: entry.who(), was, is })
        });
        found.collect()
    }
    let (was, is) = (&old.callers, &new.callers);
    let mut found = changed("callers.certificates", &was.certificates, &is.certificates);
    found.extend(changed("callers.unix_peers", &was.unix_peers, &is.unix_peers));
    found
}

/// The keys whose new value needs a restart.
pub fn waiting_for_restart(old: &Settings, new: &Settings) -> Vec<String> {
    let live =
        |key: &str| LIVE.iter().any(|live| key == *live || key.starts_with(&format!("{live}."))) || key == "catalogue.file";
    changed(old, new).into_iter().map(|change| change.setting).filter(|key| !live(key)).collect()
}

/// Every key whose value changed, whether it allows more or less, with both values. No setting holds a secret: secrets come from files.
pub fn changed(old: &Settings, new: &Settings) -> Vec<ChangedSetting> {
    let (old, new) = (leaves(old), leaves(new));
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let of = |list: &[(String, Value)], key: &str| list.iter().find(|(other, _)| other == key).map(|(_, value)| text(value));
    let keys: BTreeSet<&String> = old.iter().chain(&new).map(|(key, _)| key).collect();
    let changes = keys.into_iter().filter_map(|setting| {
        let (was, is) = (of(&old, setting), of(&new, setting));
        let absent = || "absent".to_owned();
        (was != is).then(|| ChangedSetting {
            setting: setting.clone(),
            was: was.unwrap_or_else(absent),
            is: is.unwrap_or_else(absent),
        })
    });
    changes.collect()
}

/// Entries of a caller list that are new or may do more, and a list that now allows everybody.
fn callers<T: Listed>(key: &str, was: &CallerList<T>, is: &CallerList<T>, add: &mut dyn FnMut(String, String, String)) {
    if was.entries().is_empty() {
        // Everybody could call before, so nothing can be looser.
        return;
    }
    if is.entries().is_empty() {
        add(key.to_owned(), format!("{} entries", was.entries().len()), "anyone".to_owned());
    }
    for entry in is.entries().iter().filter(|entry| !was.entries().contains(entry)) {
        let may_no_more = |earlier: &T| {
            let is_less = earlier.role() == entry.role() && entry.workspaces().is_subset(earlier.workspaces());
            earlier.who() == entry.who() && (is_less || earlier.role() == RoleWord::Platform)
        };
        if !was.entries().iter().any(may_no_more) {
            add(key.to_owned(), format!("without {}", entry.text()), format!("with {}", entry.text()));
        }
    }
}

/// An entry of a list of callers.
trait Listed: PartialEq {
    /// By what it is known.
    fn who(&self) -> String;

    fn role(&self) -> RoleWord;

    fn workspaces(&self) -> &BTreeSet<String>;

    fn text(&self) -> String {
        format!("{} ({})", self.who(), role_word(self.role()))
    }

    /// What it may do.
    fn rights(&self) -> String {
        let ids = self.workspaces().iter().map(String::as_str).collect::<Vec<_>>().join(",");
        format!("{} {ids}", role_word(self.role())).trim_end().to_owned()
    }
}

impl Listed for CertificateCaller {
    fn who(&self) -> String {
        self.san.clone()
    }

    fn role(&self) -> RoleWord {
        self.role
    }

    fn workspaces(&self) -> &BTreeSet<String> {
        &self.workspaces
    }
}

impl Listed for UnixCaller {
    fn who(&self) -> String {
        let id = |id: Option<u32>| id.map_or_else(|| "any".to_owned(), |id| id.to_string());
        format!("uid {} gid {}", id(self.uid), id(self.gid))
    }

    fn role(&self) -> RoleWord {
        self.role
    }

    fn workspaces(&self) -> &BTreeSet<String> {
        &self.workspaces
    }
}

const fn role_word(role: RoleWord) -> &'static str {
    match role {
        RoleWord::Platform => "platform",
        RoleWord::Workspace => "workspace",
        RoleWord::Operator => "operator",
    }
}

/// Whether less is enforced than before, or for a longer time.
fn looser(was: Option<&ProviderException>, is: &ProviderException) -> bool {
    let weight = |enforcement| match enforcement {
        Enforcement::Enforce => 0,
        Enforcement::Report => 1,
        Enforcement::Off => 2,
    };
    was.is_none_or(|was| weight(is.probe) > weight(was.probe) || is.until > was.until)
}

fn exception(ProviderException { probe, until }: &ProviderException) -> String {
    format!("{} until {}", word(probe), until.as_deref().unwrap_or("no date"))
}

/// The word of the configuration file.
fn word(value: &impl Debug) -> String {
    let mut out = String::new();
    for (index, letter) in format!("{value:?}").char_indices() {
        if letter.is_uppercase() && index > 0 {
            out.push('-');
        }
        out.push(letter.to_ascii_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Settings {
        let mut layers = super::super::layers::Layers::new();
        layers.file("test", crate::core::yaml::tree(text.as_bytes()).unwrap());
        let layered = layers.finish();
        assert_eq!(layered.problems, [], "{text}");
        layered.settings
    }

    #[track_caller]
    fn opens(old: &str, new: &str, expect: &[&str]) {
        let (old, new) = (settings(old), settings(new));
        let lines = |list: Vec<Loosened>| -> Vec<String> {
            list.into_iter().map(|Loosened { setting, was, is }| format!("{setting}: {was} -> {is}")).collect()
        };
        assert_eq!(lines(loosened(&old, &new)), expect);
        if !expect.is_empty() {
            assert_eq!(loosened(&new, &old), [], "the way back opens nothing");
        }
    }

    #[test]
    fn whatever_opens_something_is_named_with_what_was_and_what_is() {
        opens("{}", "{}", &[]);
        opens("operator_overrides: refuse", "{}", &["operator_overrides: refuse -> honour"]);
        opens("{}", "operator_overrides: refuse", &[]);
        opens("{}", "platform_proxy: available", &["platform_proxy: absent -> available"]);
        opens("exempt_runtimes: [a]", "exempt_runtimes: [a, b]", &["exempt_runtimes: without `b` -> with `b`"]);
        opens(
            "policy: {create: {inconclusive: deny}}",
            "policy: {provision: {unanswered: allow}}",
            &["policy.create.inconclusive: deny -> allow", "policy.provision.unanswered: allow-if-recently-valid -> allow"],
        );
        opens("{}", "policy: {create: {unverifiable: deny}}", &[]);
        let report = "providers: {deepseek: {probe: report, until: 2026-12-01}}";
        opens("{}", report, &["providers.deepseek: enforce -> report until 2026-12-01"]);
        opens(report, "{}", &[]);
        opens(
            report,
            "providers: {deepseek: {probe: off, until: 2026-12-01}}",
            &["providers.deepseek: report until 2026-12-01 -> off until 2026-12-01"],
        );
        opens(
            "callers: {unix_peers: [{uid: 1}]}",
            "callers: {unix_peers: [{uid: 1}, {gid: 2, role: operator}]}",
            &["callers.unix_peers: without uid any gid 2 (operator) -> with uid any gid 2 (operator)"],
        );
        opens("callers: {unix_peers: [{uid: 1}]}", "callers: anyone", &["callers.unix_peers: 1 entries -> anyone"]);
    }

    #[test]
    fn a_list_of_callers_that_was_there_needs_a_word_to_go() {
        let listed = settings("callers: {unix_peers: [{uid: 1}]}");
        let places =
            |new: &str| -> Vec<String> { emptied(&listed, &settings(new)).into_iter().map(|problem| problem.place).collect() };
        assert_eq!(places("{}"), ["callers.unix_peers"]);
        assert_eq!(places("callers: {unix_peers: []}"), ["callers.unix_peers"]);
        assert!(places("callers: {unix_peers: anyone}").is_empty());
        assert!(places("callers: anyone").is_empty());
        assert!(places("callers: {unix_peers: [{uid: 2}]}").is_empty());
        assert_eq!(emptied(&settings("{}"), &settings("{}")), []);
    }

    #[test]
    fn callers_who_are_taken_off_are_named() {
        let gone = |old: &str, new: &str| removed_callers(&settings(old), &settings(new));
        let two = "callers: {unix_peers: [{uid: 1}, {gid: 2, role: operator}]}";
        assert_eq!(
            gone(two, "callers: {unix_peers: [{uid: 1}]}"),
            [("callers.unix_peers", "uid any gid 2 (operator)".to_owned())]
        );
        assert_eq!(gone("callers: {unix_peers: [{uid: 1}]}", two), []);
        assert_eq!(gone(two, "callers: anyone"), []);
    }

    /// Who is on the list as before and may do something else is neither gone nor new.
    #[test]
    fn callers_whose_role_alone_changes_are_named_with_what_was_and_what_is() {
        let one = "callers: {unix_peers: [{uid: 1}, {uid: 2, role: workspace, workspaces: [a]}]}";
        let other = "callers: {unix_peers: [{uid: 1, role: operator}, {uid: 2, role: workspace, workspaces: [a, b]}]}";
        let of = |old: &str, new: &str| -> Vec<String> {
            let changed = changed_callers(&settings(old), &settings(new)).into_iter();
            changed.map(|ChangedCaller { setting, caller, was, is }| format!("{setting}: {caller}: {was} -> {is}")).collect()
        };
        let expect = [
            "callers.unix_peers: uid 1 gid any: platform -> operator",
            "callers.unix_peers: uid 2 gid any: workspace a -> workspace a,b",
        ];
        assert_eq!(of(one, other), expect);
        assert_eq!(of(one, one), [""; 0]);
        assert_eq!(removed_callers(&settings(one), &settings(other)), []);
        let opened = |old: &str, new: &str| -> Vec<String> {
            loosened(&settings(old), &settings(new)).into_iter().map(|loosened| loosened.is).collect()
        };
        assert_eq!(opened(one, other), ["with uid 2 gid any (workspace)"], "an operator may do less than a platform");
        assert_eq!(opened(other, one), ["with uid 1 gid any (platform)"], "fewer workspaces are less");
    }

    /// Settings that allow less than before are named too.
    #[test]
    fn whatever_is_changed_is_named() {
        let keys = |old: &str, new: &str| -> Vec<String> {
            changed(&settings(old), &settings(new)).into_iter().map(|change| change.setting).collect()
        };
        let denies = "policy: {create: {inconclusive: deny}}\noperator_overrides: refuse\n";
        assert_eq!(keys("{}", denies), keys(denies, "{}"));
        assert!(keys("{}", denies).iter().any(|key| key == "policy.create.inconclusive"), "{:?}", keys("{}", denies));
        assert!(keys(denies, denies).is_empty());
        let text = |old: &str, new: &str| -> Vec<String> {
            let changes = changed(&settings(old), &settings(new)).into_iter();
            changes.map(|ChangedSetting { setting, was, is }| format!("{setting}: {was} -> {is}")).collect()
        };
        assert_eq!(text(denies, "{}"), ["operator_overrides: refuse -> honour", "policy.create.inconclusive: deny -> allow"]);
        let off = "providers: {deepseek: {probe: off, until: 2026-12-01}}";
        let expect = r#"providers.deepseek: {"probe":"off","until":"2026-12-01"} -> absent"#;
        assert!(text(off, "{}").contains(&expect.to_owned()), "{:?}", text(off, "{}"));
    }

    #[test]
    fn what_is_read_at_the_start_alone_says_so() {
        let waiting = |old: &str, new: &str| waiting_for_restart(&settings(old), &settings(new));
        assert_eq!(waiting("{}", "limits: {decisions: 7}\ncache: {valid: 31s}"), ["cache.valid", "limits.decisions"]);
        assert_eq!(
            waiting("{}", "policy: {create: {unverifiable: deny}}\nexempt_runtimes: [a]\ncallers: anyone\nregistry: {file: /r}"),
            [""; 0]
        );
        assert_eq!(waiting("callers: {token_file: /a}", "callers: {token_file: /b}"), ["callers.token_file"]);
    }
}
