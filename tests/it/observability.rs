//! Dashboard and alerts: every name in them is exported, and the runbook explains each alert.

use std::{collections::BTreeSet, fs, path::PathBuf};

use serde_json::Value;

fn read(path: &str) -> String {
    fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The series of the documentation, which another test compares with what is exported.
fn documented() -> BTreeSet<String> {
    let text = read("docs/metrics.md");
    let mut names = BTreeSet::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let name = cells[1].trim_matches('`');
        match cells[2] {
            "histogram" => names.extend(["bucket", "sum", "count"].map(|part| format!("{name}_{part}"))),
            _ => drop(names.insert(name.to_owned())),
        }
    }
    names
}

/// Every name of ours in a text.
fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("byokgate_") || word.starts_with("process_")).map(str::to_owned).collect()
}

fn alerts() -> Vec<Value> {
    let document: Value = serde_yaml::from_str(&read("deploy/observability/alerts.yaml")).unwrap();
    document["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
}

#[test]
fn whatever_dashboard_and_alerts_name_is_exported() {
    let documented = documented();
    for file in ["dashboard.json", "alerts.yaml", "alerts.test.yaml"] {
        let named = named(&read(&format!("deploy/observability/{file}")));
        assert!(named.len() > 15, "{file}: {named:?}");
        assert!(named.is_subset(&documented), "{file}: {:?}", named.difference(&documented).collect::<Vec<_>>());
    }
    // And every exported series is used.
    let shown: String =
        ["dashboard.json", "alerts.yaml"].iter().map(|file| read(&format!("deploy/observability/{file}"))).collect();
    let shown = named(&shown);
    for name in documented.iter().filter(|name| !name.ends_with("_sum") && !name.ends_with("_count")) {
        assert!(shown.contains(name), "{name} is on no panel and in no alert");
    }
}

#[test]
fn every_panel_has_a_query_and_a_place() {
    let dashboard: Value = serde_json::from_str(&read("deploy/observability/dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        assert!(panel["title"].as_str().is_some_and(|title| !title.is_empty()), "{panel}");
        let place = &panel["gridPos"];
        assert!(place["x"].as_u64().unwrap() + place["w"].as_u64().unwrap() <= 24, "{panel}");
        if panel["type"] != "row" {
            for target in panel["targets"].as_array().unwrap() {
                assert!(target["expr"].as_str().unwrap().contains("{job=~\"$job\""), "{target}");
            }
        }
    }
    assert!(panels.len() > 20, "{}", panels.len());
}

/// Each alert has a severity, a meaning and an action, a heading in the runbook with the same text, and a test.
#[test]
fn every_alert_is_explained_and_tested() {
    let (runbook, tests) = (read("deploy/README.md"), read("deploy/observability/alerts.test.yaml"));
    let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    let said = flat(&runbook);
    let alerts = alerts();
    for alert in &alerts {
        let name = alert["alert"].as_str().unwrap();
        let severity = alert["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning", "info"].contains(&severity), "{name}: {severity}");
        for text in ["description", "action"] {
            let text = alert["annotations"][text].as_str().unwrap();
            assert!(said.contains(&flat(text)), "{name}: the runbook does not say: {text}");
        }
        assert!(alert["annotations"]["summary"].as_str().unwrap().len() > 10, "{name}");
        let url = format!("https://github.com/byok-gate/byok-gate/blob/main/deploy/README.md#{}", name.to_lowercase());
        assert_eq!(alert["annotations"]["runbook_url"], url, "{name}");
        assert!(!alert["expr"].as_str().unwrap().contains("job="), "{name} counts on a job's name");
        assert!(runbook.contains(&format!("### {name}\n\n*{severity}.*")), "{name} has no heading in deploy/README.md");
        assert!(tests.contains(&format!("alertname=\"{name}\", alertstate=\"firing\"")), "{name} is expected by no test");
    }
    let headings = runbook.lines().filter(|line| line.starts_with("### BYOKGate")).count();
    assert_eq!(headings, alerts.len(), "a heading is left of an alert that is gone");
}
