//! A plan: one action per unit, made from a record and limits by a pure function.

use serde::{Deserialize, Serialize};

use crate::{Link, Prediction, StepRecord, simulate};

/// What to do with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Leave it on the device.
    Keep,
    /// Send it away when it is packed, bring it back before it is needed.
    Offload,
}

/// What a plan has to respect.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Most bytes in use on the device, all included.
    pub budget_bytes: u64,
    /// Bytes set aside for units that are brought back early.
    pub lookahead_bytes: u64,
    /// The link that offloaded units travel on.
    pub link: Link,
}

/// Actions for the units of a step, with what they should cost.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// One per unit, in the order of packing.
    pub actions: Vec<Action>,
    /// What the simulator says of it.
    pub predicted: Prediction,
}

/// Keeps as much as fits, last packed first: that is needed first in backward, so it occupies
/// memory for the shortest time and saves the transfer with the closest deadline. The rest goes.
#[must_use]
pub fn make_plan(record: &StepRecord, limits: &Limits) -> Plan {
    let reserved = limits.lookahead_bytes + record.hidden_bytes;
    let limit = limits.budget_bytes.saturating_sub(reserved);
    let mut load: Vec<u64> = record.events.iter().map(|event| event.other_bytes).collect();
    let mut actions = vec![Action::Offload; record.units.len()];
    for (unit, action) in record.units.iter().zip(&mut actions).rev() {
        let alive = &mut load[unit.packed_at..record.end_of(unit)];
        if alive.iter().all(|&bytes| bytes + unit.bytes <= limit) {
            alive.iter_mut().for_each(|bytes| *bytes += unit.bytes);
            *action = Action::Keep;
        }
    }
    let predicted = simulate(record, &actions, limits);
    Plan { actions, predicted }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Event, Unit};

    /// Forward packs `n` units, backward needs and frees them in reverse.
    pub(crate) fn stack(n: usize, bytes: u64) -> StepRecord {
        let events = (0..2 * n).map(|i| Event { time_us: 100.0 * i as f64, other_bytes: 1000 }).collect();
        let unit = |i| Unit {
            bytes,
            packed_at: i,
            needed_at: Some(2 * n - 1 - i),
            freed_at: Some((2 * n - i).min(2 * n)),
        };
        StepRecord { units: (0..n).map(unit).collect(), events, hidden_bytes: 0 }
    }

    fn limits(budget_bytes: u64) -> Limits {
        Limits { budget_bytes, lookahead_bytes: 0, link: Link { offload_gbps: 1.0, onboard_gbps: 1.0 } }
    }

    #[test]
    fn keeps_everything_when_it_fits() {
        let record = stack(10, 500);
        let plan = make_plan(&record, &limits(record.keep_all_peak_bytes()));
        assert!(plan.actions.iter().all(|action| *action == Action::Keep));
        assert_eq!(plan.predicted.peak_bytes, record.keep_all_peak_bytes());
        assert_eq!(plan.predicted.stall_us, 0.0);
    }

    #[test]
    fn offloads_the_first_packed_and_stays_within_the_budget() {
        let record = stack(10, 500);
        let plan = make_plan(&record, &limits(1000 + 4 * 500));
        let kept = plan.actions.iter().filter(|action| **action == Action::Keep).count();
        assert_eq!(kept, 4);
        assert!(plan.actions[6..].iter().all(|action| *action == Action::Keep));
    }

    #[test]
    fn a_budget_below_the_rest_offloads_all() {
        let plan = make_plan(&stack(3, 500), &limits(10));
        assert!(plan.actions.iter().all(|action| *action == Action::Offload));
    }

    #[test]
    fn an_empty_step_has_an_empty_plan() {
        let plan = make_plan(&StepRecord::default(), &limits(0));
        assert_eq!(plan.actions, []);
    }
}
