//! Prices a plan: two copy engines and one compute stream, replayed over the recorded step.
//!
//! Offloads are sent when they are packed and leave in order. Onboards return in the order in which
//! they are needed, as early as the lookahead lets them. Compute stalls when a unit is not there;
//! everything after moves by as much.

use serde::{Deserialize, Serialize};

use crate::{Action, Limits, StepRecord};

/// Speed of the way out and back, in GB/s (1e9 bytes).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// Device to host (and on to disk, if it has to).
    pub offload_gbps: f64,
    /// Host (or disk) to device.
    pub onboard_gbps: f64,
}

/// What a plan should cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Most bytes in use on the device.
    pub peak_bytes: u64,
    /// Time of the step in microseconds, stalls included.
    pub step_us: f64,
    /// Time that compute waits for transfers, in microseconds.
    pub stall_us: f64,
    /// Bytes that leave the device.
    pub offloaded_bytes: u64,
}

/// Replays `record` under `actions`.
#[must_use]
pub fn simulate(record: &StepRecord, actions: &[Action], limits: &Limits) -> Prediction {
    let offloaded =
        || record.units.iter().zip(actions).filter(|(_, action)| **action == Action::Offload).map(|(u, _)| u);
    let time_at = |event: usize| record.events.get(event).map_or(0.0, |event| event.time_us);
    let us = |bytes: u64, gbps: f64| bytes as f64 / (gbps * 1e3);

    let mut out_free_us = 0.0f64;
    for unit in offloaded() {
        out_free_us = out_free_us.max(time_at(unit.packed_at)) + us(unit.bytes, limits.link.offload_gbps);
    }

    let mut returns: Vec<_> =
        offloaded().filter_map(|unit| unit.needed_at.map(|at| (at, unit.bytes))).collect();
    returns.sort_unstable();
    let backward_us = returns.first().map_or(0.0, |&(at, _)| time_at(at));
    let (mut in_free_us, mut stall_us) = (backward_us, 0.0f64);
    // Needed times of the units that are back or on their way and not yet used: the lookahead.
    let mut ahead: std::collections::VecDeque<(f64, u64)> = std::collections::VecDeque::new();
    let mut ahead_bytes = 0;
    for (at, bytes) in returns {
        while ahead_bytes > 0 && ahead_bytes + bytes > limits.lookahead_bytes {
            let Some((used_us, used)) = ahead.pop_front() else { break };
            in_free_us = in_free_us.max(used_us);
            ahead_bytes -= used;
        }
        in_free_us += us(bytes, limits.link.onboard_gbps);
        let needed_us = time_at(at) + stall_us;
        stall_us += (in_free_us - needed_us).max(0.0);
        ahead.push_back((time_at(at) + stall_us, bytes));
        ahead_bytes += bytes;
    }

    let last_us = record.events.last().map_or(0.0, |event| event.time_us);
    Prediction {
        peak_bytes: peak(record, actions, limits),
        step_us: last_us + stall_us,
        stall_us,
        offloaded_bytes: offloaded().map(|unit| unit.bytes).sum(),
    }
}

fn peak(record: &StepRecord, actions: &[Action], limits: &Limits) -> u64 {
    let mut change = vec![0i128; record.events.len() + 1];
    let mut any_offloaded = false;
    for (unit, action) in record.units.iter().zip(actions) {
        match action {
            Action::Keep => {
                change[unit.packed_at] += i128::from(unit.bytes);
                change[record.end_of(unit)] -= i128::from(unit.bytes);
            }
            Action::Offload => any_offloaded = true,
        }
    }
    let (mut kept, mut peak) = (0i128, 0i128);
    for (event, change) in record.events.iter().zip(change) {
        kept += change;
        peak = peak.max(kept + i128::from(event.other_bytes));
    }
    let lookahead = if any_offloaded { limits.lookahead_bytes } else { 0 };
    u64::try_from(peak).unwrap_or(0) + record.hidden_bytes + lookahead
}
