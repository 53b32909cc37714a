//! Who may call what: methods by role, then the request itself, and how often.

use std::{collections::BTreeSet, fmt, num::NonZeroU32, time::Duration};

use governor::{Quota, RateLimiter, clock::Clock, middleware::NoOpMiddleware, state::keyed::HashMapStateStore};
use tonic::Status;

use super::{
    convert::pb::ErrorReason,
    errors::{error, limit_reached},
};
use crate::{
    domain::request::{Checkpoint, OperatorOverride, Request},
    liveness::clock::TokioClock,
    telemetry::metrics::calls::{BATCH_DECIDE, DECIDE},
};

/// A known caller. It is part of each call, and a call without one is not answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The name for logs, which is never a secret.
    pub name: String,
    /// What the caller may do.
    pub role: Role,
}

/// What a caller may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Call every method.
    Platform,
    /// Call Decide at PROVISION for these workspaces, without an operator's override.
    Workspace(BTreeSet<String>),
    /// Ask for status, models and providers: only methods that take no credential.
    Operator,
}

impl Role {
    /// Whether this role may do all that the other may.
    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Platform, _) => true,
            (Self::Workspace(may), Self::Workspace(ids)) => ids.is_subset(may),
            (_, _) => self == other,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Platform => f.write_str("platform"),
            Self::Workspace(ids) => write!(f, "workspace {}", ids.iter().map(String::as_str).collect::<Vec<_>>().join(",")),
            Self::Operator => f.write_str("operator"),
        }
    }
}

/// The rules for callers, and the rate limit of workspaces.
pub(crate) struct Authorizer {
    /// By the caller's name. There are as many as are configured.
    rates: RateLimiter<String, HashMapStateStore<String>, TokioClock, NoOpMiddleware<Duration>>,
    per_minute: NonZeroU32,
}

// === impl Authorizer ===

impl Authorizer {
    /// `workspace_calls_per_minute` limits each workspace.
    pub(crate) fn new(workspace_calls_per_minute: NonZeroU32) -> Self {
        let quota = Quota::per_minute(workspace_calls_per_minute);
        Self {
            rates: RateLimiter::new(quota, HashMapStateStore::default(), TokioClock::new()),
            per_minute: workspace_calls_per_minute,
        }
    }

    /// Whether this caller may call this method now. `None` stands for methods of other services, such as reflection.
    pub(crate) fn call(&self, caller: &Caller, method: Option<&str>) -> Result<(), Status> {
        match (&caller.role, method) {
            (Role::Platform, _) => Ok(()),
            (Role::Operator, Some(DECIDE | BATCH_DECIDE)) => Err(not_an_operators()),
            (Role::Operator, _) => Ok(()),
            (Role::Workspace(_), Some(DECIDE)) => self.check_rate(&caller.name),
            (Role::Workspace(_), _) => Err(error(ErrorReason::MethodNotAllowed, "a `workspace` caller may call Decide only")),
        }
    }

    /// Whether this caller may ask for this decision. A workspace runs a tenant's code, so it may ask only about itself.
    pub(super) fn request(&self, caller: &Caller, request: &Request) -> Result<(), Status> {
        let Role::Workspace(ids) = &caller.role else {
            return if caller.role == Role::Operator { Err(not_an_operators()) } else { Ok(()) };
        };
        let refused = |message: &str| Err(error(ErrorReason::RequestNotAllowed, message));
        if request.checkpoint != Checkpoint::Provision {
            return refused("a `workspace` caller may ask at PROVISION only");
        }
        if !ids.contains(&request.spec.workspace_id) {
            return refused("a `workspace` caller may ask for its own workspace_id only");
        }
        if request.spec.operator_override != OperatorOverride::Derive {
            return refused("a `workspace` caller may not set an operator_override");
        }
        Ok(())
    }

    /// Counts a call of a workspace against its rate limit.
    fn check_rate(&self, name: &str) -> Result<(), Status> {
        let over = |spent: governor::NotUntil<Duration>| {
            let words = format!("{} calls a minute", self.per_minute);
            limit_reached("callers.workspace_calls_per_minute", &words, spent.wait_time_from(self.rates.clock().now()))
        };
        self.rates.check_key(&name.to_owned()).map_err(over)
    }
}

fn not_an_operators() -> Status {
    error(ErrorReason::MethodNotAllowed, "an `operator` caller may not ask for decisions")
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn roles_rule_over_methods_and_a_workspace_has_a_low_rate() {
        let authorizer = Authorizer::new(NonZeroU32::new(2).unwrap());
        let known = |role| Caller { name: "test".into(), role };
        let may =
            |caller: &Caller, method| authorizer.call(caller, Some(method)).map_or_else(|status| status.code(), |()| Code::Ok);
        let (operator, platform) = (known(Role::Operator), known(Role::Platform));
        for method in ["Decide", "BatchDecide", "ResolveProvider", "ListModels", "GetRegistryStatus"] {
            assert_eq!(may(&platform, method), Code::Ok);
            let expect = if method.ends_with("Decide") { Code::PermissionDenied } else { Code::Ok };
            assert_eq!(may(&operator, method), expect, "{method}");
        }
        let workspace = known(Role::Workspace(BTreeSet::from(["ws-1".to_owned()])));
        for method in ["BatchDecide", "ResolveProvider", "ListModels", "GetRegistryStatus"] {
            assert_eq!(may(&workspace, method), Code::PermissionDenied, "{method}");
        }
        assert!(authorizer.call(&workspace, None).is_err(), "reflection is not a workspace's");
        assert_eq!([may(&workspace, "Decide"), may(&workspace, "Decide")], [Code::Ok; 2]);
        assert_eq!(may(&workspace, "Decide"), Code::ResourceExhausted);
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!([may(&workspace, "Decide"), may(&workspace, "Decide")], [Code::Ok, Code::ResourceExhausted]);
    }

    #[test]
    fn a_role_covers_what_may_no_more() {
        let workspaces = |ids: &[&str]| Role::Workspace(ids.iter().map(|id| (*id).to_owned()).collect());
        for (role, other, expect) in [
            (Role::Platform, workspaces(&["a"]), true),
            (workspaces(&["a", "b"]), workspaces(&["b"]), true),
            (workspaces(&["b"]), workspaces(&["a", "b"]), false),
            (workspaces(&["a"]), Role::Platform, false),
            (Role::Operator, workspaces(&["a"]), false),
        ] {
            assert_eq!(role.covers(&other), expect, "{role} {other}");
        }
    }
}
