//! What the log says of a fault of the store, and the pause after several. After a few faults in a row, nothing is sent to it for a time (in
//! events and metrics: it is left alone). The pause doubles with each failed trial, and one trial runs at a time.

use std::time::Duration;

use redis::{ErrorKind, RedisError};
use tokio::time::Instant;

use crate::domain::secret::Secret;

/// So many faults in a row start a pause. One lost packet must not.
const MAX_FAULTS: u32 = 5;
/// The first pause.
const MIN_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause. A repaired store is noticed within it.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// The most characters of a code and of a text. The store chooses both.
const MAX_CODE: usize = 32;
const MAX_TEXT: usize = 200;
/// What a server puts before the words of a command that it does not know. A password may be one of them.
const ECHO: &str = "with args beginning with";

/// A fault of the store.
#[derive(Debug)]
pub struct StoreFault {
    /// The server that it is of, as `HOST:PORT`.
    pub(super) server: String,
    pub(super) error: RedisError,
    /// They are in no text.
    pub(super) passwords: Vec<Secret>,
}

/// The faults in a row, and the pause if there is one.
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// A command succeeded once.
    worked: bool,
    in_a_row: u32,
    pause: Option<Pause>,
}

#[derive(Debug)]
struct Pause {
    until: Instant,
    length: Duration,
    trial_running: bool,
}

/// What the log has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// The first command of all failed.
    NeverWorked,
    /// A pause began.
    LeftAlone,
    /// The pause ended, or the first command succeeded.
    InUse,
}

// === impl StoreFault ===

impl From<RedisError> for StoreFault {
    fn from(error: RedisError) -> Self {
        Self { server: String::new(), error, passwords: Vec::new() }
    }
}

impl StoreFault {
    pub(super) fn kind(&self) -> &str {
        // The library has no name for a right that is missing.
        Some(self.error.category()).filter(|kind| !kind.is_empty()).unwrap_or("no permission")
    }

    /// The code of the server's reply, also of one that a script got.
    pub(super) fn code(&self) -> String {
        let (code, detail) = (self.error.code().unwrap_or_default(), self.error.detail().unwrap_or_default());
        let code = match code {
            "ERR" if detail.contains("The user executing the script can't") || detail.contains("ACL failure in script") => {
                "NOPERM"
            }
            // Redis 6 wraps it.
            "ERR" => detail.split_once(": -").and_then(|(_, reply)| reply.split(' ').next()).unwrap_or(code),
            _ => code,
        };
        code.chars().filter(|&it| matches!(it, 'A'..='Z' | '0'..='9' | '_')).take(MAX_CODE).collect()
    }

    pub(super) fn text(&self) -> String {
        let mut text = self.error.to_string();
        for password in &self.passwords {
            text = text.replace(password.expose(), "***");
        }
        let end = text.find(ECHO).unwrap_or(text.len());
        text.get(..end).unwrap_or_default().chars().filter(|it| !it.is_control()).take(MAX_TEXT).collect()
    }

    /// Whether the next command needs another connection.
    pub(super) fn ends_connection(&self) -> bool {
        match self.error.kind() {
            // The server itself replied, so the connection is not broken. But another server may be the primary by now, or have the slot.
            ErrorKind::Server(_) | ErrorKind::Extension => {
                matches!(self.code().as_str(), "READONLY" | "MASTERDOWN" | "LOADING" | "MOVED" | "CLUSTERDOWN")
            }
            _ => true,
        }
    }

    /// Of several servers' faults, the one with the greatest says most.
    pub(super) fn says(&self) -> u8 {
        match self.error.kind() {
            ErrorKind::Io if self.error.is_timeout() => 0,
            ErrorKind::Io if self.error.is_connection_dropped() => 1,
            ErrorKind::Io => 2,
            _ => 3,
        }
    }
}

// === impl Faults ===

impl Faults {
    /// Whether a command may be sent now. A trial without a result is given up after the length of the pause.
    pub(super) fn may_send(&mut self, now: Instant) -> bool {
        match &mut self.pause {
            None => true,
            Some(pause) if now < pause.until => false,
            Some(pause) => {
                pause.trial_running = true;
                pause.until = now + pause.length;
                true
            }
        }
    }

    pub(super) fn succeeded(&mut self) -> Option<Change> {
        self.in_a_row = 0;
        // A command that was sent before the pause and succeeds in it proves as much as a trial.
        let is_news = self.pause.take().is_some() || !self.worked;
        self.worked = true;
        is_news.then_some(Change::InUse)
    }

    pub(super) fn failed(&mut self, now: Instant) -> Option<Change> {
        self.in_a_row = self.in_a_row.saturating_add(1);
        match &mut self.pause {
            None if self.in_a_row == 1 && !self.worked => Some(Change::NeverWorked),
            None if self.in_a_row < MAX_FAULTS => None,
            None => {
                self.pause = Some(Pause { until: now + MIN_PAUSE, length: MIN_PAUSE, trial_running: false });
                Some(Change::LeftAlone)
            }
            Some(pause) => {
                // A command that was sent before the pause is no trial.
                if pause.trial_running {
                    let length = (pause.length * 2).min(MAX_PAUSE);
                    *pause = Pause { until: now + length, length, trial_running: false };
                }
                None
            }
        }
    }

    pub(super) const fn is_in_use(&self) -> bool {
        self.pause.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    fn fail(faults: &mut Faults, times: u32, now: Instant) {
        for _ in 0..times {
            faults.failed(now);
        }
    }

    /// What a server says in such a reply.
    fn replied(code: &str, text: &str) -> StoreFault {
        let reply = redis::parse_redis_value(format!("-{code} {text}\r\n").as_bytes()).and_then(redis::Value::extract_error);
        StoreFault { passwords: vec![Secret::new("made-up-canary".to_owned())], ..reply.unwrap_err().into() }
    }

    #[test]
    fn a_text_is_short_and_holds_no_password() {
        let long = "SK".repeat(1 << 19);
        let fault = replied(&long, &long);
        assert_eq!((fault.code().len(), fault.text().len()), (MAX_CODE, MAX_TEXT));
        let text = replied("ERR", "no 'made-up-canary' \u{7}here").text();
        assert!(text.contains("no '***' here"), "{text}");
        // The password may be cut there.
        let text = replied("ERR", "unknown command 'AUTH', with args beginning with: 'gate' 'made-up-can").text();
        assert!(text.contains("unknown command 'AUTH'") && !text.contains("made"), "{text}");
    }

    #[test]
    fn the_code_of_a_reply_in_a_script_is_found() {
        let wrapped =
            "Error running script (call to f_0a): @user_script:5: @user_script: 5: -READONLY You can't write against it.";
        for (code, text, expect, ends) in [
            ("READONLY", "You can't write against a read only replica.", "READONLY", true),
            ("ERR", wrapped, "READONLY", true),
            ("ERR", &wrapped.replace("READONLY", "MASTERDOWN"), "MASTERDOWN", true),
            ("LOADING", "Redis is loading the dataset in memory", "LOADING", true),
            ("ERR", "The user executing the script can't run this command or subcommand", "NOPERM", false),
            ("NOPERM", "this user has no permissions", "NOPERM", false),
            ("ERR", "unknown command", "ERR", false),
            ("OOM", "command not allowed", "OOM", false),
        ] {
            let fault = replied(code, text);
            assert_eq!((fault.code().as_str(), fault.ends_connection()), (expect, ends), "{text}");
        }
        assert!(!replied("NOPERM", "this user").kind().is_empty());
    }

    #[test]
    fn five_faults_in_a_row_start_a_pause_of_a_second() {
        let (mut faults, start) = (Faults::default(), Instant::now());
        assert_eq!(faults.failed(start), Some(Change::NeverWorked));
        for _ in 1..4 {
            assert_eq!(faults.failed(start), None);
        }
        assert_eq!((faults.succeeded(), faults.succeeded()), (Some(Change::InUse), None));
        for _ in 0..4 {
            assert_eq!(faults.failed(start), None);
            assert!(faults.may_send(start));
        }
        assert_eq!(faults.failed(start), Some(Change::LeftAlone));
        assert!(!faults.is_in_use() && !faults.may_send(after(start, 999)));
        // One trial, and no second one beside it.
        assert!(faults.may_send(after(start, 1_000)));
        assert!(!faults.may_send(after(start, 1_001)));
        assert_eq!(faults.succeeded(), Some(Change::InUse));
        assert!(faults.is_in_use() && faults.may_send(after(start, 1_002)));
    }

    #[test]
    fn each_failed_trial_doubles_the_pause_up_to_its_limit() {
        let (mut faults, mut now) = (Faults::default(), Instant::now());
        fail(&mut faults, 5, now);
        // Commands that were sent before the pause do not lengthen it.
        fail(&mut faults, 100, now);
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            let end = now + Duration::from_secs(seconds);
            assert!(!faults.may_send(end - Duration::from_millis(1)), "{seconds}");
            assert!(faults.may_send(end), "{seconds}");
            now = end + Duration::from_millis(350);
            assert_eq!(faults.failed(now), None);
        }
    }

    #[test]
    fn a_trial_without_a_result_is_followed_by_another() {
        let (mut faults, start) = (Faults::default(), Instant::now());
        fail(&mut faults, 5, start);
        assert!(faults.may_send(after(start, 1_000)));
        assert!(!faults.may_send(after(start, 1_999)));
        assert!(faults.may_send(after(start, 2_000)));
    }
}
