//! How long a call may take: the caller's `grpc-timeout` up to a maximum, less a margin so that the answer arrives in time.

use std::time::Duration;

use http::{HeaderMap, HeaderName};
use tokio::time::Instant;

/// The margin is a tenth of the caller's time, within these bounds. A caller with less than the lower bound could not receive an answer in time.
const MIN_MARGIN: Duration = Duration::from_millis(5);
const MAX_MARGIN: Duration = Duration::from_millis(100);

/// The header with the caller's timeout.
static GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The deadlines of a call, counted from the arrival of its headers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    /// When an answer must be made, whatever it is.
    pub(crate) answer_by: Instant,
    /// When the caller's time ends and no answer is sent any more.
    pub(crate) end: Instant,
}

// === impl Deadline ===

impl Deadline {
    /// What the caller gives a call with these headers.
    pub(crate) fn given(headers: &HeaderMap) -> Option<Duration> {
        headers.get(&GRPC_TIMEOUT).and_then(|value| grpc_timeout(value.to_str().ok()?))
    }

    /// The deadlines of a call that begins now. `None` if there is no time for an answer.
    pub(crate) fn within(given: Option<Duration>, cap: Duration) -> Option<Self> {
        let time = given.unwrap_or(cap).min(cap);
        let margin = (time / 10).clamp(MIN_MARGIN, MAX_MARGIN);
        let now = Instant::now();
        (time > margin).then(|| Self { answer_by: now + (time - margin), end: now + time })
    }
}

/// One to eight digits and a unit. Anything else is ignored, as in the gRPC library.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let digits = text.strip_suffix(unit)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number = digits.parse::<u64>().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(number * 3600),
        'M' => Duration::from_secs(number * 60),
        'S' => Duration::from_secs(number),
        'm' => Duration::from_millis(number),
        'u' => Duration::from_micros(number),
        'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_parse_or_are_none() {
        for (text, expect) in [
            ("1n", Some(Duration::from_nanos(1))),
            ("250m", Some(Duration::from_millis(250))),
            ("4S", Some(Duration::from_secs(4))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("0S", Some(Duration::ZERO)),
            ("", None),
            ("S", None),
            ("123456789S", None),
            ("1.5S", None),
            ("4x", None),
            ("4é", None),
        ] {
            assert_eq!(grpc_timeout(text), expect, "{text:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_due_a_margin_before_the_callers_end_and_both_are_capped() {
        let after = |text: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(text) = text {
                headers.insert("grpc-timeout", text.parse().unwrap());
            }
            let now = Instant::now();
            Deadline::within(Deadline::given(&headers), Duration::from_secs(5))
                .map(|due| ((due.answer_by - now).as_millis(), (due.end - now).as_millis()))
        };
        assert_eq!(after(None), Some((4900, 5000)));
        assert_eq!(after(Some("60S")), Some((4900, 5000)));
        assert_eq!(after(Some("99999999H")), Some((4900, 5000)));
        assert_eq!(after(Some("soon")), Some((4900, 5000)));
        assert_eq!(after(Some("500m")), Some((450, 500)));
        assert_eq!(after(Some("20m")), Some((15, 20)));
        assert_eq!(after(Some("1n")), None);
        assert_eq!(after(Some("0S")), None);
    }
}
