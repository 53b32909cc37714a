//! Durations as settings write them: `500ms`, `10s`, `5m`, `1h 30m`.

use std::time::Duration;

use jiff::fmt::friendly::{Designator, SpanPrinter};
pub use jiff::fmt::serde::unsigned_duration::friendly::compact::required::{deserialize, serialize};

/// Longer than any setting needs, and short enough that arithmetic on instants cannot overflow.
pub const MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// A duration as a settings file writes it.
pub fn text(duration: Duration) -> String {
    SpanPrinter::new().designator(Designator::Compact).unsigned_duration_to_string(&duration)
}

/// A measured time, to a hundredth of a second: `0.14 s`.
pub fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Holder {
        #[serde(with = "super")]
        length: Duration,
    }

    #[test]
    fn lengths_are_written_with_their_unit() {
        let read = |text: &str| serde_json::from_value::<Holder>(serde_json::json!({"length": text})).map(|holder| holder.length);
        for (written, shown) in
            [("500ms", "500ms"), ("10s", "10s"), ("5m", "5m"), ("90s", "1m 30s"), ("1h", "1h"), ("0s", "0s"), ("300s", "5m")]
        {
            let length = read(written).unwrap();
            assert_eq!(text(length), shown, "{written}");
            let again = serde_json::to_value(Holder { length }).unwrap();
            assert_eq!(read(again["length"].as_str().unwrap()).unwrap(), length, "{written}");
        }
        for wrong in ["10", "s", "", "-1s", "soon", "1é"] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }
}
