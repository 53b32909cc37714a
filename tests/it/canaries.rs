//! A secret that is not an LLM key is never sent: seen by a real listener.

use std::{collections::BTreeMap, time::Duration};

use byok_gate::domain::{decision::Outcome, request::Request, verdict::DenyCode};
use tokio::time::Instant;

use crate::{
    foreign::document,
    support::{
        case::{self, Spec},
        gate::Files,
        vendor::{Row, Vendor},
    },
};

fn request(value: &str) -> Request {
    let workspace = BTreeMap::from([("ACME_API_KEY".into(), Some(value.into()))]);
    Spec { model: "acme-large".into(), organization_id: "org-1".into(), workspace, ..Spec::default() }.request()
}

/// A value of every kind of the data, under the provider's own variable: at a host of which nothing is known, and at a gateway that takes every
/// vendor's keys. The listener accepts everything, so that a leaked value is seen.
#[tokio::test]
async fn a_canary_of_every_kind_is_seen_by_no_listener() {
    let row = Row { body: r#"{"data": []}"#.into(), ..Row::default() };
    let vendor = Vendor::start(vec![Row { status: Some(200), ..row }]).await;
    let (registry, _) = case::documents(vendor.address.port());
    let gateway =
        format!("catalogue_version: 1\nhosts: [{{host: \"{}\", vendor: gate, accepts_keys_of: any}}]\n", vendor.address);
    let kinds = document("foreign-secrets.yaml").foreign_secrets;
    assert!(kinds.len() >= 120, "{} kinds", kinds.len());
    for catalogue in ["catalogue_version: 1\n", &gateway] {
        let engine = Files::new(&registry, catalogue, None).engine();
        let before = (vendor.asked().len(), vendor.connections());
        for kind in &kinds {
            let canary = kind.canary();
            // Some are kept with a line break behind them, or within.
            for value in [canary.clone(), format!("{canary}\n"), format!("{canary}\nmade-up\n")] {
                let decided = engine.decide(&request(&value), Instant::now() + Duration::from_secs(5)).await;
                let Outcome::Deny(deny) = &decided.decision.outcome else { panic!("{} is allowed: {canary}", kind.what) };
                assert_eq!(vendor.asked().len(), before.0, "{} was sent: {canary}", kind.what);
                let (code, message) = (deny.refusal.code(), deny.refusal.message());
                let told = format!("{message} {} {:?}", deny.refusal.remedy(), decided.decision.trace);
                assert!(!told.contains(&canary), "{told}");
                if value == canary {
                    assert_eq!(code, DenyCode::InvalidByokCredential, "{} as {canary}: {message}", kind.what);
                    assert!(message.contains(&kind.what), "{canary} is told as: {message}");
                }
            }
        }
        assert_eq!(vendor.connections(), before.1);
        // The listener would otherwise have been probed.
        engine.decide(&request("made-up-key-of-acme"), Instant::now() + Duration::from_secs(5)).await;
    }
    assert!(vendor.asked_with("made-up-key-of-acme") > 0);
}
