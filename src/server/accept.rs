//! Accepts connections up to the limit, which leaves file descriptors for the rest of the work.

use std::{convert::Infallible, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use super::{
    connection::{ConnectionContext, reject_over_limit},
    connections::{ConnectionCounts, Connections, top_peers},
    listen::Listener,
    unreported::Unreported,
};
use crate::domain::request::Peer;

/// How long to wait for an evicted connection to close. It takes longer only on a very busy machine.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(100);
/// Descriptors that are reserved for probes, files and the log.
const RESERVED_DESCRIPTORS: usize = 256;

/// How many connections each listener may have: the setting, or fewer if the process has too few descriptors. It raises the process's limit of
/// descriptors as far as the system allows.
pub(super) fn affordable_connections(limit: usize, listeners: usize) -> usize {
    let Ok(descriptors) = rlimit::increase_nofile_limit(rlimit::INFINITY) else { return limit };
    let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
    let affordable = share(descriptors, listeners);
    if affordable < limit {
        tracing::warn!(
            event = "descriptor_limit",
            descriptors,
            connections = affordable,
            wanted = limit,
            "the process may have too few open files for limits.connections; raise its limit (ulimit -n), or lower the setting"
        );
    }
    limit.min(affordable)
}

fn share(descriptors: usize, listeners: usize) -> usize {
    let reserved = RESERVED_DESCRIPTORS.min(descriptors / 2);
    ((descriptors - reserved) / listeners.max(1)).max(1)
}

/// Accepts connections for ever. At the limit, the connection that is needed least is evicted. If none may be evicted, the new one is refused at
/// once instead of waiting in the kernel's queue.
pub(super) async fn accept(
    listener: Listener,
    connections: Arc<Connections>,
    context: Arc<ConnectionContext>,
    counts: Arc<ConnectionCounts>,
    open: mpsc::Sender<Infallible>,
) {
    let limit = connections.limit();
    let (mut refused, mut made_room) = (Unreported::default(), Unreported::default());
    let peers =
        || top_peers([&connections]).iter().map(|(peer, count)| format!("{peer}: {count}")).collect::<Vec<_>>().join(", ");
    loop {
        let accepted = listener.accept().await;
        let Some(admitted) = connections.admit(accepted.peer) else {
            counts.refused.inc();
            if let Some(refused) = refused.add(Instant::now(), || true) {
                tracing::warn!(
                    event = "connection_limit",
                    address = %listener.address(),
                    limit,
                    refused,
                    peers = peers(),
                    "connections are refused, since there are as many as limits.connections allows; `peers` have the most: let them open \
                     fewer, or raise the limit"
                );
            }
            let is_plain = context.tls.is_none() || matches!(accepted.peer, Peer::Unix { .. });
            if is_plain {
                tokio::spawn(reject_over_limit(accepted.io, limit));
            }
            continue;
        };
        if let Some(evicted) = &admitted.evicted {
            counts.evicted.inc();
            if let Some(made_room) = made_room.add(Instant::now(), || true) {
                tracing::warn!(
                    event = "connection_limit",
                    address = %listener.address(),
                    limit,
                    made_room,
                    peers = peers(),
                    "idle connections, or connections of unknown callers, are closed to make room for new ones, since there are as many as \
                     limits.connections allows; `peers` have the most: let them open fewer, or raise the limit"
                );
            }
            // Wait until its descriptor is free, so that a flood of connections does not use up descriptors faster than evictions free them.
            drop(timeout(CLOSE_TIMEOUT, evicted.closed()).await);
        }
        counts.accepted.inc();
        let (context, open) = (Arc::clone(&context), open.clone());
        tokio::spawn(async move {
            context.serve(accepted, &admitted.place).await;
            drop((admitted, open));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_kept_for_the_rest_of_the_work() {
        for (descriptors, listeners, expect) in
            [(1_048_576, 1, 1_048_320), (4_096, 2, 1_920), (1_024, 1, 768), (64, 2, 16), (1, 1, 1), (0, 0, 1)]
        {
            assert_eq!(share(descriptors, listeners), expect, "{descriptors} descriptors, {listeners} listeners");
        }
    }
}
