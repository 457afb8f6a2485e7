//! The step under way: its units, where each of them is, and the bytes that takes.

use super::Sample;
use crate::{Event, StepRecord, Unit};

/// The step under way.
#[derive(Debug, Default)]
pub(super) struct Step {
    pub record: StepRecord,
    pub live: Vec<Live>,
    /// Bytes that each unit takes while it is brought back early: fewer than its own if it is compressed.
    pub ahead: Vec<u64>,
    pub live_count: usize,
    /// Events so far, recorded or not.
    pub events: usize,
    /// How much of the plan's schedule has been given out.
    pub releases_done: usize,
    pub fetches_done: usize,
    pub began_us: f64,
    pub base_bytes: u64,
    pub stalled_us: f64,
    /// Bytes of units that overspill holds on the device now: kept, on their way out, brought back.
    pub held_bytes: u64,
    /// Of those, brought back and not yet asked for.
    pub ahead_bytes: u64,
    pub peak_bytes: u64,
    pub deviates: bool,
}

/// Where a unit of this step is, as far as device memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Live {
    Kept,
    Leaving,
    Away,
    Ahead,
    Back,
    Freed,
}

impl Step {
    pub fn begun(sample: Sample) -> Self {
        Self { began_us: sample.now_us, base_bytes: sample.allocated_bytes, ..Self::default() }
    }

    pub fn push(&mut self, unit: Unit, live: Live, ahead_bytes: u64) {
        if live != Live::Freed {
            self.live_count += 1;
        }
        self.record.units.push(unit);
        self.live.push(live);
        self.ahead.push(ahead_bytes);
    }

    /// Counts an event, and records it where that is wanted; its index.
    pub fn event(&mut self, sample: Sample, is_recording: bool) -> usize {
        let peak_bytes = sample.peak_bytes.max(sample.allocated_bytes);
        self.peak_bytes = self.peak_bytes.max(peak_bytes);
        self.events += 1;
        if is_recording {
            self.record.events.push(Event {
                time_us: sample.now_us - self.began_us - self.stalled_us,
                other_bytes: peak_bytes.saturating_sub(self.held_bytes),
            });
        }
        self.events - 1
    }

    /// Moves the unit at `index` if it is where the caller thinks.
    pub fn move_to(&mut self, index: usize, from: Live, to: Live) {
        if self.live[index] != from {
            return;
        }
        let held = |state: Live| match state {
            Live::Ahead => self.ahead[index],
            Live::Kept | Live::Leaving | Live::Back => self.record.units[index].bytes,
            Live::Away | Live::Freed => 0,
        };
        let (before, after) = (held(from), held(to));
        self.held_bytes = self.held_bytes + after - before;
        if from == Live::Ahead {
            self.ahead_bytes -= before;
        }
        if to == Live::Ahead {
            self.ahead_bytes += after;
        }
        self.live[index] = to;
    }
}
