//! The platform's own derivation vectors, where they are there, over gRPC.

use byok_gate::{core::registry::Registry, grpc::convert::pb};

use crate::{
    support::{
        case,
        gate::{Files, Server},
    },
    vectors::{Row, derived, document, platform},
};

/// The two real registries load, and every row of theirs is answered by `ResolveProvider` over gRPC; the crafted ones by the
/// function.
#[tokio::test]
async fn the_platforms() {
    let Some(file) = platform() else { return };
    let rows: Vec<Row> = serde_json::from_value(file["derive"].clone()).unwrap();
    let (mut over_grpc, mut by_function) = (0, 0);
    for (name, value) in file["registries"].as_object().unwrap() {
        let crafted = name.starts_with("crafted");
        let text = document(value, crafted);
        let rows = rows.iter().filter(|row| row.registry == *name);
        if crafted {
            let registry = Registry::parse(name, text.as_bytes(), &|_| None).unwrap().value;
            for row in rows {
                let (provider, _) = derived(&registry, &row.runtime, &row.model, row.auth_env.as_deref().unwrap_or_default());
                let expected = row.expect_provider.clone().or_else(|| row.expect_error.as_ref().map(|error| format!("!{error}")));
                assert_eq!(Some(provider), expected, "{row:?}");
                by_function += 1;
            }
            continue;
        }
        let (_, catalogue) = case::documents(1);
        let server = Server::start(Files::new(&text, &catalogue, None).engine()).await;
        let mut client = server.client().await;
        for row in rows {
            let request = pb::ResolveProviderRequest {
                runtime: row.runtime.clone(),
                model: row.model.clone(),
                credential_names: row.auth_env.clone().unwrap_or_default(),
            };
            let answer = client.resolve_provider(request).await.unwrap().into_inner();
            let (provider, error) = match answer.result.unwrap() {
                pb::resolve_provider_response::Result::Resolution(resolution) => (Some(resolution.provider), None),
                pb::resolve_provider_response::Result::Deny(deny) => (None, Some(deny.code())),
            };
            let expected = row.expect_error.as_deref().map(|error| match error {
                "model_required" => pb::DenyCode::ModelRequired,
                "unknown_runtime" => pb::DenyCode::RuntimeUnsupported,
                "unregistered_model" => pb::DenyCode::UnregisteredModelForRuntime,
                "ambiguous" => pb::DenyCode::AmbiguousProvider,
                other => panic!("{other}"),
            });
            assert_eq!((provider, error), (row.expect_provider.clone(), expected), "{row:?}");
            over_grpc += 1;
        }
    }
    assert_eq!((over_grpc, by_function), (294, 8));
}
