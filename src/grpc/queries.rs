//! ResolveProvider, ListModels and GetRegistryStatus. They use names only: no credential, no network.

use std::time::SystemTime;

use tonic::Status;

use super::{
    convert::{
        self,
        pb::{self, ErrorReason},
    },
    decide::Shared,
    errors::{error, invalid},
};
use crate::domain::denial::Refusal;

pub(super) fn resolve_provider(
    shared: &Shared,
    request: pb::ResolveProviderRequest,
) -> Result<pb::ResolveProviderResponse, Status> {
    let (runtime, model, names) = convert::resolve_request(request, &shared.limits).map_err(invalid)?;
    let (result, snapshot) = shared.engine.resolve(&runtime, &model, &names);
    Ok(convert::resolve_response(result, &model, &snapshot))
}

pub(super) fn list_models(shared: &Shared, request: pb::ListModelsRequest) -> Result<pb::ListModelsResponse, Status> {
    let (runtime, details) = convert::list_request(request, &shared.limits).map_err(invalid)?;
    let snapshot = shared.engine.snapshot();
    if let Some(name) = runtime.as_deref()
        && snapshot.registry.runtime(name).is_none()
    {
        let known = snapshot.registry.runtimes().map(|(name, _)| name.to_owned()).collect();
        let unknown = Refusal::RuntimeUnsupported { runtime: name.to_owned(), known };
        return Err(error(ErrorReason::UnknownRuntime, unknown.message()));
    }
    Ok(convert::models(&snapshot, runtime.as_deref(), details))
}

pub(super) fn registry_status(shared: &Shared) -> pb::GetRegistryStatusResponse {
    convert::status(&shared.engine.snapshot(), SystemTime::now())
}
