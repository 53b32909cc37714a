//! A provider for tests that move time: answers by script, after a scripted time, and counts. Real sockets and paused time do not
//! work together, since an idle runtime jumps to the next timer while an answer is on its way.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use byok_gate::{
    core::{
        classify::Finding,
        engine::{Boxed, ProbeRequest, Prober},
    },
    domain::verdict::Verdict,
};

/// What it answers next.
#[derive(Debug, Clone)]
pub(crate) struct Script {
    pub(crate) finding: Finding,
    pub(crate) takes: Duration,
    pub(crate) panics: bool,
    /// Each answer takes a millisecond more than the one before, so that no two come together.
    pub(crate) staggered: bool,
}

/// Answers by its script.
pub(crate) struct Scripted {
    script: Mutex<Script>,
    asked: AtomicUsize,
    under_way: Arc<UnderWay>,
}

/// How many are being answered, and how many were at most.
#[derive(Debug, Default)]
struct UnderWay {
    now: AtomicUsize,
    most: AtomicUsize,
}

pub(crate) fn finding(verdict: Verdict) -> Finding {
    Finding { status: Some(200), probe: "models".into(), ..Finding::bare(verdict) }
}

impl Scripted {
    pub(crate) fn new(verdict: Verdict) -> Arc<Self> {
        let script = Script { finding: finding(verdict), takes: Duration::ZERO, panics: false, staggered: false };
        Arc::new(Self { script: Mutex::new(script), asked: AtomicUsize::new(0), under_way: Arc::default() })
    }

    pub(crate) fn set(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }

    pub(crate) fn verdict(&self, verdict: Verdict) {
        self.set(|script| script.finding = finding(verdict));
    }

    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// How many were under way at a time, at most, since this was last looked at.
    pub(crate) fn most_at_once(&self) -> usize {
        self.under_way.most.swap(0, Ordering::SeqCst)
    }
}

impl Prober for Scripted {
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding> {
        request.started.set();
        let before = self.asked.fetch_add(1, Ordering::SeqCst);
        let Script { finding, takes, panics, staggered } = self.script.lock().unwrap().clone();
        let takes = if staggered { takes + Duration::from_millis(before as u64) } else { takes };
        let under_way = Arc::clone(&self.under_way);
        Box::pin(async move {
            under_way.most.fetch_max(under_way.now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(takes).await;
            under_way.now.fetch_sub(1, Ordering::SeqCst);
            assert!(!panics, "made to panic");
            finding
        })
    }
}
