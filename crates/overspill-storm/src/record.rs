//! What happened in one step.
//!
//! A step is what lies between the first saved tensor and the moment when no saved tensor is left:
//! one forward and backward, or several forwards before a backward. It is a list of events (a unit
//! was packed, needed, or freed), each with its time and with the bytes that are in use whatever is
//! decided about the units: parameters, gradients, optimizer state, the working set of the
//! operation at hand.

use serde::{Deserialize, Serialize};

/// A moment of a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Compute time since the step began in microseconds, without waits for transfers and without
    /// what overspill computes itself.
    pub time_us: f64,
    /// Most bytes allocated since the event before, that are not units held by overspill.
    pub other_bytes: u64,
}

/// How to compute a unit again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Indices of the units it reads.
    pub inputs: Vec<usize>,
    /// Time of it on the device, in microseconds.
    pub cost_us: f64,
}

/// What the link codec makes of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Coded {
    /// Length in bytes.
    pub bytes: u64,
    /// Time to make it on the device, in microseconds.
    pub encode_us: f64,
    /// Time to make the unit of it again, in microseconds.
    pub decode_us: f64,
}

/// A piece of storage that autograd saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unit {
    /// Length in bytes.
    pub bytes: u64,
    /// Index of the event at which it was packed.
    pub packed_at: usize,
    /// Index of the event at which backward first asked for it.
    pub needed_at: Option<usize>,
    /// Index of the event at which its last saved tensor was gone.
    pub freed_at: Option<usize>,
    /// How to rebuild it, if that was proved.
    pub recipe: Option<Recipe>,
    /// What it is on the link if it is compressed, if that was proved.
    #[serde(default)]
    pub coded: Option<Coded>,
    /// Whether it is a narrow copy of the unit before it, made only where that is rebuilt from it.
    pub is_narrow: bool,
}

impl Unit {
    /// A unit that was just packed.
    #[must_use]
    pub fn packed(bytes: u64, packed_at: usize) -> Self {
        Self {
            bytes,
            packed_at,
            needed_at: None,
            freed_at: None,
            recipe: None,
            coded: None,
            is_narrow: false,
        }
    }
}

/// A step, as it went.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Units in the order in which they were packed.
    pub units: Vec<Unit>,
    /// Events in order.
    pub events: Vec<Event>,
    /// Bytes in use beyond what any event saw.
    pub hidden_bytes: u64,
}

impl StepRecord {
    /// Bytes that autograd saved: what keeping everything holds on top of the rest, if no unit is
    /// freed before the last is packed.
    #[must_use]
    pub fn unit_bytes(&self) -> u64 {
        self.units.iter().filter(|unit| !unit.is_narrow).map(|unit| unit.bytes).sum()
    }

    /// Index one past the last event at which `unit` occupies memory if it is kept.
    #[must_use]
    pub fn end_of(&self, unit: &Unit) -> usize {
        unit.freed_at.map_or(self.events.len(), |at| at + 1)
    }

    /// Most bytes in use at once if every unit is kept.
    #[must_use]
    pub fn keep_all_peak_bytes(&self) -> u64 {
        let mut change = vec![0i128; self.events.len() + 1];
        for unit in self.units.iter().filter(|unit| !unit.is_narrow) {
            change[unit.packed_at] += i128::from(unit.bytes);
            change[self.end_of(unit)] -= i128::from(unit.bytes);
        }
        let mut kept = 0i128;
        let mut peak = 0i128;
        for (event, change) in self.events.iter().zip(change) {
            kept += change;
            peak = peak.max(kept + i128::from(event.other_bytes));
        }
        u64::try_from(peak).unwrap_or(0) + self.hidden_bytes
    }
}
