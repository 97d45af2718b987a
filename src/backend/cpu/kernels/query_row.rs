//! One query row: the keys that it sees, its place in the mask, and how its softmax ends.

use std::ops::Range;

use super::call::{Call, HeadTask};

/// What is kept of one query row while the strips of its keys go by.
#[derive(Debug, Clone)]
pub(super) struct QueryRow {
    pub(super) head: usize,
    pub(super) position: usize,
    /// The keys that it sees, mask apart.
    pub(super) keys: Range<usize>,
    /// Key that stands at its own position.
    pub(super) diagonal: i64,
    /// ALiBi slope; 0 without.
    pub(super) slope: f32,
    /// Its row in the mask.
    pub(super) mask: usize,
}

impl QueryRow {
    /// Row `f` of a head task, in the order of [`HeadTask::rows`].
    pub(super) fn new(call: &Call<'_>, task: &HeadTask, f: usize) -> Self {
        let (position, head) = (f / call.group, task.kv_head * call.group + f % call.group);
        let sequence = &task.sequence;
        let slope = if call.at.alibi_slopes.is_null() {
            0.0
        } else {
            // SAFETY: there is a slope for each head.
            unsafe { *call.at.alibi_slopes.add(head) }
        };
        Self {
            head,
            position,
            keys: sequence.visibility.keys(position as i64, sequence.key_len),
            diagonal: position as i64 + sequence.visibility.q_offset,
            slope,
            mask: call.problem.mask_at(sequence, head, position),
        }
    }

    /// Whether visibility and mask treat this row as `other`.
    pub(super) fn sees_as(&self, other: &Self, call: &Call<'_>) -> bool {
        let masked_alike =
            || call.mask.is_none() || self.position == other.position && self.mask == other.mask;
        self.keys == other.keys && masked_alike()
    }

    /// What the row's sums are to be multiplied by, and its log-sum-exp, the sink included.
    pub(super) fn close(&self, call: &Call<'_>, max: f32, sum: f32) -> (f32, f32) {
        let max = f64::from(max) * std::f64::consts::LOG2_E;
        let lse = |max: f64, sum: f64| {
            if call.at.lse.is_null() {
                0.0
            } else {
                (max * std::f64::consts::LN_2 + sum.ln()) as f32
            }
        };
        if call.at.sinks.is_null() {
            return (1.0 / sum, lse(max, f64::from(sum)));
        }
        // SAFETY: there is a sink for each head.
        let sink = f64::from(unsafe { *call.at.sinks.add(self.head) });
        let sink = sink * std::f64::consts::LOG2_E;
        let sum = f64::from(sum);
        if sink <= max {
            let sum = sum + (sink - max).exp2();
            ((1.0 / sum) as f32, lse(max, sum))
        } else {
            let own = (max - sink).exp2();
            let sum = sum * own + 1.0;
            ((own / sum) as f32, lse(sink, sum))
        }
    }
}
