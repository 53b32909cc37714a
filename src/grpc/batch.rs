//! BatchDecide. Its items are decided independently, a few at a time, until the deadline. Results are kept until the caller reads them, so a slow
//! reader does not delay any item.

use futures_util::{Stream, StreamExt, stream};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::{
    call_record::{BATCH_DEADLINE, CallRecord},
    convert::{
        About, Violations,
        pb::{self, ErrorReason},
    },
    deadline::Deadline,
    decide::Decider,
    errors::{self, error, invalid},
};

/// The results of a batch as they become ready. When the stream is dropped, items in progress are cancelled.
pub(super) fn run(
    decider: Decider,
    message: pb::BatchDecideRequest,
    deadline: Deadline,
    record: &CallRecord,
) -> Result<impl Stream<Item = Result<pb::BatchDecideResponse, Status>> + Send + use<>, Status> {
    let (requests, limits) = (message.requests, &decider.shared.limits);
    if requests.is_empty() || requests.len() > limits.batch_items {
        let found = format!("holds {}; it must hold 1 to {} (limits.batch_items)", requests.len(), limits.batch_items);
        return Err(invalid(Violations(vec![("requests".to_owned(), found)])));
    }
    // From here on, errors belong to single items.
    record.end(Code::Ok, "");
    // The channel has room for every result, so no item waits for the reader.
    let (sender, results) = mpsc::channel(requests.len());
    let concurrency = limits.batch_concurrency;
    let items: Vec<_> =
        (0_u32..).zip(requests).map(|(index, message)| (index, message, record.item(index, deadline.answer_by))).collect();
    let mut running = JoinSet::new();
    running.spawn(async move {
        let decided = stream::iter(items).map(|(index, message, record)| decide(&decider, index, message, deadline, record));
        let mut decided = std::pin::pin!(decided.buffer_unordered(concurrency));
        while let Some(item) = decided.next().await {
            // Sending fails only if the reader has gone.
            drop(sender.try_send(Ok(item)));
        }
    });
    // The tasks are owned by the stream, so that they end with it.
    Ok(ReceiverStream::new(results).map(move |result| {
        let _while_read = &running;
        result
    }))
}

/// Decides one item. Errors become its status.
async fn decide(
    decider: &Decider,
    index: u32,
    message: pb::DecideRequest,
    deadline: Deadline,
    record: CallRecord,
) -> pb::BatchDecideResponse {
    // An item has the time of a Decide call, within the time of the batch.
    let own = deadline.answer_by.min(Instant::now() + decider.shared.deadlines.decide);
    let decided = timeout_at(deadline.answer_by, decider.item(message, own, &record)).await.unwrap_or_else(|_| {
        let status = error(ErrorReason::Deadline, BATCH_DEADLINE);
        record.failed(&status, About::default());
        Err(status)
    });
    let result = match decided {
        Ok(response) => pb::batch_decide_response::Result::Response(Box::new(response)),
        Err(status) => pb::batch_decide_response::Result::Status(errors::item_status(&status)),
    };
    pb::BatchDecideResponse { index, result: Some(result) }
}
