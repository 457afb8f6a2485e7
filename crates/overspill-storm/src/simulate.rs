//! Schedules and prices a choice of actions: two copy engines and one compute stream, replayed over
//! the recorded step.
//!
//! Offloads leave in the order of packing; their memory is free from the event at which compute is
//! made to wait for them, which is the first one after the copy is done, or an earlier one where the
//! memory is needed (a stall). Onboards return in the order of their deadlines, each from the
//! earliest event of backward on at which the memory stays within the limit until it is needed. A
//! rebuild happens where the unit is first needed, be it as the input of another rebuild. What is compressed is
//! encoded by compute when it is packed, beside its source for a moment, and decoded when it is needed.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::{Action, Coded, Limits, StepRecord, profile::Profile};

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
    /// Time of the step in microseconds, stalls, rebuilds and the link codec included.
    pub step_us: f64,
    /// Time that compute waits for transfers, in microseconds.
    pub stall_us: f64,
    /// Time of rebuilds, in microseconds.
    pub rebuild_us: f64,
    /// Time of the link codec, in microseconds.
    pub codec_us: f64,
    /// Bytes that leave the device as they are.
    pub offloaded_bytes: u64,
    /// Bytes that leave it compressed, before they are.
    pub compressed_bytes: u64,
    /// Bytes that have left at the end of forward, as they crossed the link.
    #[serde(default)]
    pub host_bytes: u64,
    /// Bytes that are rebuilt.
    pub rebuilt_bytes: u64,
    /// Bytes that stay.
    pub kept_bytes: u64,
}

/// When the transfers of a plan happen.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// `(event, unit)` in order: from this event on the memory of the unit may be reused.
    pub releases: Vec<(usize, usize)>,
    /// `(event, unit)` in order: at this event the unit starts on its way back.
    pub fetches: Vec<(usize, usize)>,
}

/// First event at which each unit has to be on the device: its own need, or that of a unit that is
/// rebuilt from it.
pub(crate) fn needs(record: &StepRecord, actions: &[Action]) -> Vec<Option<usize>> {
    let mut needs: Vec<Option<usize>> = record.units.iter().map(|unit| unit.needed_at).collect();
    // A recipe reads units that were packed before, and its own narrow copy, which reads none.
    for (index, unit) in record.units.iter().enumerate().rev() {
        if let (Action::Rebuild, Some(recipe), Some(need)) = (actions[index], &unit.recipe, needs[index]) {
            for &input in &recipe.inputs {
                needs[input] = Some(needs[input].map_or(need, |own| own.min(need)));
            }
        }
    }
    needs
}

/// Replays `record` under `actions`.
#[must_use]
pub fn simulate(record: &StepRecord, actions: &[Action], limits: &Limits) -> (Schedule, Prediction) {
    let mut replay = Replay::new(record, actions, limits);
    replay.plan_releases();
    replay.plan_fetches();
    let Times { step_us, stall_us, rebuild_us, codec_us } = replay.time();
    let sum = |wanted: Action| {
        let units = record.units.iter().zip(actions);
        units.filter(|(_, action)| **action == wanted).map(|(unit, _)| unit.bytes).sum()
    };
    let host_bytes = (0..actions.len()).filter_map(|unit| replay.crossing(unit)).sum();
    let prediction = Prediction {
        peak_bytes: u64::try_from(replay.peak).unwrap_or(0) + record.hidden_bytes,
        step_us,
        stall_us,
        rebuild_us,
        codec_us,
        offloaded_bytes: sum(Action::Offload),
        compressed_bytes: sum(Action::Compress),
        host_bytes,
        rebuilt_bytes: sum(Action::Rebuild),
        kept_bytes: sum(Action::Keep),
    };
    (replay.schedule, prediction)
}

struct Times {
    step_us: f64,
    stall_us: f64,
    rebuild_us: f64,
    codec_us: f64,
}

struct Replay<'a> {
    record: &'a StepRecord,
    actions: &'a [Action],
    link: Link,
    /// Of what events see; hidden bytes are off already.
    limit: i64,
    needs: Vec<Option<usize>>,
    /// Units packed at an event, and units first needed at one.
    packs: Vec<(usize, usize)>,
    due: Vec<(usize, usize)>,
    /// Of a unit that leaves: the event of its release; `usize::MAX` while it has none.
    released: Vec<usize>,
    schedule: Schedule,
    peak: i64,
}

impl<'a> Replay<'a> {
    fn new(record: &'a StepRecord, actions: &'a [Action], limits: &Limits) -> Self {
        let needs = needs(record, actions);
        let packs = record.units.iter().enumerate().map(|(index, unit)| (unit.packed_at, index)).collect();
        let mut due: Vec<_> =
            needs.iter().enumerate().filter_map(|(index, need)| need.map(|at| (at, index))).collect();
        due.sort_unstable();
        Self {
            record,
            actions,
            link: limits.link,
            limit: signed(limits.budget_bytes.saturating_sub(record.hidden_bytes)),
            released: vec![usize::MAX; record.units.len()],
            needs,
            packs,
            due,
            schedule: Schedule::default(),
            peak: 0,
        }
    }

    fn us(bytes: u64, gbps: f64) -> f64 {
        bytes as f64 / (gbps * 1e3)
    }

    /// Bytes at each event without units that leave before they return.
    fn load(&self) -> Vec<i64> {
        let mut load = Load::of(self.record);
        for (index, unit) in self.record.units.iter().enumerate() {
            let end = self.record.end_of(unit);
            match self.actions[index] {
                Action::Keep => load.add(unit.packed_at..end, unit.bytes),
                // The source is there until the next event, beside what is made of it.
                Action::Rebuild | Action::Compress => {
                    load.add(unit.packed_at..(unit.packed_at + 2).min(end), unit.bytes);
                }
                Action::Offload | Action::Absent => {}
            }
            let Some(need) = self.needs[index] else { continue };
            if !matches!(self.actions[index], Action::Keep | Action::Absent) {
                load.add(need + 1..end, unit.bytes);
            }
            if self.actions[index] == Action::Compress {
                load.add(need + 1..(need + 2).min(end), self.crossing(index).unwrap_or(0));
            }
        }
        load.values(self.record)
    }

    /// Decides when the memory of each unit that leaves is given up.
    fn plan_releases(&mut self) {
        let load = self.load();
        let (mut out_free_us, mut shift_us) = (0.0f64, 0.0f64);
        let mut leaving: VecDeque<(usize, f64)> = VecDeque::new();
        let mut leaving_bytes = 0i64;
        let (mut packs, mut due) = (self.packs.iter().peekable(), self.due.iter().peekable());
        for (at, event) in self.record.events.iter().enumerate() {
            let now_us = event.time_us + shift_us;
            while let Some(&(_, unit)) = packs.next_if(|(packed_at, _)| *packed_at == at) {
                let Some(bytes) = self.crossing(unit) else { continue };
                out_free_us = out_free_us.max(now_us) + Self::us(bytes, self.link.offload_gbps);
                leaving.push_back((unit, out_free_us));
                leaving_bytes += signed(self.record.units[unit].bytes);
            }
            // One that is needed before it has left does not leave.
            while let Some(&(_, unit)) = due.next_if(|(need, _)| *need == at) {
                if self.leaves(unit) && self.released[unit] == usize::MAX {
                    leaving.retain(|&(other, _)| other != unit);
                    leaving_bytes -= signed(self.record.units[unit].bytes);
                }
            }
            while let Some(&(unit, done_us)) = leaving.front() {
                if done_us > event.time_us + shift_us {
                    let next = load.get(at + 1).copied().unwrap_or(0) + self.packed_at(at + 1);
                    if next + leaving_bytes <= self.limit {
                        break;
                    }
                    shift_us = done_us - event.time_us;
                }
                leaving.pop_front();
                leaving_bytes -= signed(self.record.units[unit].bytes);
                self.released[unit] = at;
                self.schedule.releases.push((at, unit));
            }
        }
    }

    /// Bytes of units that leave and are packed at event `at`.
    fn packed_at(&self, at: usize) -> i64 {
        let first = self.packs.partition_point(|&(packed_at, _)| packed_at < at);
        let packed = self.packs[first..].iter().take_while(|(packed_at, _)| *packed_at == at);
        packed
            .filter(|&&(_, unit)| self.leaves(unit))
            .map(|&(_, unit)| signed(self.record.units[unit].bytes))
            .sum()
    }

    /// Decides when each unit that has left starts on its way back.
    fn plan_fetches(&mut self) {
        let mut profile = Profile::new(&self.load());
        for (index, unit) in self.record.units.iter().enumerate() {
            if self.leaves(index) {
                let end = if self.released[index] == usize::MAX {
                    // Never left: from its return on it is in the load already.
                    self.needs[index].map_or(self.record.end_of(unit), |need| need + 1)
                } else {
                    self.released[index] + 1
                };
                profile.add(unit.packed_at..end, signed(unit.bytes));
            }
        }
        let mut earliest = self.due.first().map_or(0, |&(need, _)| need);
        for &(need, unit) in &self.due {
            let released = self.released[unit];
            let Some(bytes) = self.crossing(unit).filter(|_| released != usize::MAX).map(signed) else {
                continue;
            };
            let first = earliest.max(released).min(need);
            let blocked = profile.last_above(first + 1..need + 1, self.limit - bytes);
            let start = blocked.unwrap_or(first);
            profile.add(start + 1..need + 1, bytes);
            self.schedule.fetches.push((start, unit));
            earliest = start;
        }
        self.peak = profile.max(0..self.record.events.len()).max(0);
    }

    /// Time of the step, and what of it is not the model's.
    fn time(&self) -> Times {
        let (mut stall_us, mut rebuild_us, mut codec_us) = (0.0f64, 0.0f64, 0.0f64);
        let (mut out_free_us, mut in_free_us) = (0.0f64, 0.0f64);
        let mut done_us = vec![0.0f64; self.record.units.len()];
        let mut packs = self.packs.iter().peekable();
        let mut due = self.due.iter().peekable();
        let mut releases = self.schedule.releases.iter().peekable();
        let mut fetches = self.schedule.fetches.iter().peekable();
        for (at, event) in self.record.events.iter().enumerate() {
            while let Some(&(_, unit)) = packs.next_if(|(packed_at, _)| *packed_at == at) {
                let Some(bytes) = self.crossing(unit) else { continue };
                codec_us += self.coded(unit).map_or(0.0, |coded| coded.encode_us);
                let now_us = event.time_us + stall_us + rebuild_us + codec_us;
                out_free_us = out_free_us.max(now_us) + Self::us(bytes, self.link.offload_gbps);
                done_us[unit] = out_free_us;
            }
            let own_us = event.time_us + rebuild_us + codec_us;
            while let Some(&(_, unit)) = releases.next_if(|(release, _)| *release <= at) {
                stall_us += (done_us[unit] - own_us - stall_us).max(0.0);
            }
            while let Some(&(_, unit)) = fetches.next_if(|(start, _)| *start <= at) {
                let bytes = self.crossing(unit).unwrap_or(0);
                in_free_us = in_free_us.max(own_us + stall_us) + Self::us(bytes, self.link.onboard_gbps);
                done_us[unit] = in_free_us;
            }
            while let Some(&(_, unit)) = due.next_if(|(need, _)| *need == at) {
                if self.leaves(unit) && self.released[unit] != usize::MAX {
                    let now_us = event.time_us + stall_us + rebuild_us + codec_us;
                    stall_us += (done_us[unit] - now_us).max(0.0);
                }
                codec_us += self.coded(unit).map_or(0.0, |coded| coded.decode_us);
                if self.actions[unit] == Action::Rebuild {
                    rebuild_us +=
                        self.record.units[unit].recipe.as_ref().map_or(0.0, |recipe| recipe.cost_us);
                }
            }
        }
        let last_us = self.record.events.last().map_or(0.0, |event| event.time_us);
        Times { step_us: last_us + stall_us + rebuild_us + codec_us, stall_us, rebuild_us, codec_us }
    }

    /// Whether a unit leaves the device, as it is or compressed.
    fn leaves(&self, unit: usize) -> bool {
        matches!(self.actions[unit], Action::Offload | Action::Compress)
    }

    /// What a unit that is compressed becomes.
    fn coded(&self, unit: usize) -> Option<Coded> {
        self.record.units[unit].coded.filter(|_| self.actions[unit] == Action::Compress)
    }

    /// Bytes of a unit that leaves, as they cross the link.
    fn crossing(&self, unit: usize) -> Option<u64> {
        self.leaves(unit).then(|| self.coded(unit).map_or(self.record.units[unit].bytes, |coded| coded.bytes))
    }
}

/// Bytes on top of what is in use anyhow, by the events at which they come and go.
pub(crate) struct Load {
    change: Vec<i64>,
}

impl Load {
    pub fn of(record: &StepRecord) -> Self {
        Self { change: vec![0; record.events.len() + 2] }
    }

    pub fn add(&mut self, range: std::ops::Range<usize>, bytes: u64) {
        if range.start < range.end {
            self.change[range.start] += signed(bytes);
            self.change[range.end] -= signed(bytes);
        }
    }

    /// All bytes at each event.
    pub fn values(&self, record: &StepRecord) -> Vec<i64> {
        let mut total = 0;
        let each = record.events.iter().zip(&self.change).map(|(event, change)| {
            total += change;
            signed(event.other_bytes) + total
        });
        each.collect()
    }
}

pub(crate) fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX / 8)
}
