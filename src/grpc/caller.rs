//! Who is calling, and what that one may ask for.

use std::collections::BTreeSet;

use tonic::Status;

use super::{convert::pb::ErrorReason, errors::error};
use crate::domain::request::{Checkpoint, OperatorOverride, Request};

/// A caller that the server knows. It travels with each call; a call without one is not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// How it is known, for logs: never a secret.
    pub name: String,
    /// What it may do.
    pub role: Role,
}

/// What a caller may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Everything.
    Platform,
    /// Decide at PROVISION for these workspaces, without an operator's override.
    Workspace(BTreeSet<String>),
    /// Status, models and providers: nothing that takes a credential.
    Operator,
}

// === impl Caller ===

impl Caller {
    /// Whether it may ask for this decision: a workspace next to a tenant's code vouches for nobody but itself.
    pub(super) fn may_decide(&self, request: &Request) -> Result<(), Status> {
        match &self.role {
            Role::Platform => Ok(()),
            Role::Operator => Err(error(ErrorReason::MethodNotAllowed, "an `operator` caller may not ask for decisions")),
            Role::Workspace(ids) => {
                let spec = &request.spec;
                if request.checkpoint != Checkpoint::Provision {
                    return Err(error(ErrorReason::RequestNotAllowed, "a `workspace` caller may ask at PROVISION only"));
                }
                if !ids.contains(&spec.workspace_id) {
                    return Err(error(
                        ErrorReason::RequestNotAllowed,
                        "a `workspace` caller may ask for its own workspace_id only",
                    ));
                }
                if spec.operator_override != OperatorOverride::Derive {
                    return Err(error(ErrorReason::RequestNotAllowed, "a `workspace` caller may not set an operator_override"));
                }
                Ok(())
            }
        }
    }
}
