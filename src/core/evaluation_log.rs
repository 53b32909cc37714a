//! What a decision records while it is evaluated: the owner of the model, warnings, steps and names.

use crate::domain::{
    decision::{RelevantNames, Resolution, TraceStep, Warning},
    verdict::WarningCode,
};

/// The records of one evaluation.
#[derive(Debug)]
pub struct EvaluationLog {
    /// The owner of the model, as far as it is known.
    pub resolution: Resolution,
    /// Warnings so far.
    pub warnings: Vec<Warning>,
    /// The steps, if the caller wants them explained.
    pub trace: Trace,
    /// The names that mattered.
    pub relevant: RelevantNames,
}

/// The steps of one decision. Kept only if the caller wants them.
#[derive(Debug, Default)]
pub struct Trace {
    pub(super) on: bool,
    steps: Vec<TraceStep>,
}

// === impl EvaluationLog ===

impl EvaluationLog {
    pub(super) fn new(explain: bool) -> Self {
        Self {
            resolution: Resolution::empty(),
            warnings: Vec::new(),
            trace: Trace { on: explain, steps: Vec::new() },
            relevant: RelevantNames::default(),
        }
    }

    pub(super) fn warn(&mut self, code: WarningCode, message: String, env_names: Vec<String>) {
        self.warnings.push(Warning { code, message, env_names });
    }
}

// === impl Trace ===

impl Trace {
    /// Records a step, if steps are wanted.
    pub fn step(&mut self, step: &'static str, detail: impl FnOnce() -> String) {
        if self.on {
            self.steps.push(TraceStep { step, detail: detail() });
        }
    }

    /// The steps in order.
    pub fn into_steps(self) -> Vec<TraceStep> {
        self.steps
    }
}
