//! When a step becomes an anchor or a keyframe: rent or buy.
//!
//! A step is a patch to its anchor, an anchor a patch to its keyframe, a keyframe the whole state. Patches grow
//! with the distance from what they start from. What they have grown by, over the first one, is the rent of
//! staying; once the rent paid reaches the price of a new anchor, one is made. So the bytes stored are at most
//! twice those of the best choice in hindsight (the classical bound of ski rental), and no knob is needed.

use serde::{Deserialize, Serialize};

/// What a step is in its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The whole state is stored; the step itself is an (empty) patch to it.
    Keyframe,
    /// A patch to the keyframe, from which later steps start.
    Anchor,
    /// A patch to the anchor, or to the keyframe where no anchor was made since.
    Step,
}

impl Role {
    /// As records, tables and Python spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Keyframe => "keyframe",
            Role::Anchor => "anchor",
            Role::Step => "step",
        }
    }
}

/// Bytes of the patches so far, of one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Costs {
    /// Raw bytes of the state: the price of a keyframe.
    pub raw_bytes: u64,
    /// The newest anchor, as a patch to its keyframe; `None` while steps start from the keyframe.
    pub anchor_bytes: Option<u64>,
    /// The first patch since the anchor (or keyframe), and the sum of all of them.
    pub since_anchor: Growth,
    /// Anchors since the keyframe.
    pub since_keyframe: Growth,
}

/// Patches that start from the same state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Growth {
    /// Bytes of the first.
    pub first_bytes: u64,
    /// How many.
    pub count: u64,
    /// Bytes of all.
    pub total_bytes: u64,
}

impl Growth {
    /// Adds one patch.
    pub fn add(&mut self, bytes: u64) {
        if self.count == 0 {
            self.first_bytes = bytes;
        }
        self.count += 1;
        self.total_bytes += bytes;
    }

    /// What the patches cost over staying as small as the first.
    fn rent_bytes(self) -> u64 {
        self.total_bytes.saturating_sub(self.count * self.first_bytes)
    }
}

/// What the next step becomes, whose patch to the newest anchor has `step_bytes`.
#[must_use]
pub fn choose(costs: &Costs, step_bytes: u64) -> Role {
    let mut anchors = costs.since_keyframe;
    let mut steps = costs.since_anchor;
    steps.add(step_bytes);
    // Before the first anchor, the patch at hand already is a patch to the keyframe.
    let anchor_bytes = costs.anchor_bytes.unwrap_or(step_bytes);
    if steps.rent_bytes() < anchor_bytes {
        return Role::Step;
    }
    anchors.add(anchor_bytes);
    if anchors.rent_bytes() < costs.raw_bytes { Role::Anchor } else { Role::Keyframe }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAW: u64 = 1_000_000;

    /// Commits 200 steps whose patches have `bytes_at(distance)` bytes: roles and bytes stored.
    fn play(bytes_at: impl Fn(u64) -> u64) -> (Vec<Role>, u64) {
        let mut costs = Costs {
            raw_bytes: RAW,
            anchor_bytes: None,
            since_anchor: Growth::default(),
            since_keyframe: Growth::default(),
        };
        let (mut keyframe, mut anchor, mut stored) = (0, 0, RAW);
        let mut roles = Vec::new();
        for step in 1..200 {
            let role = choose(&costs, bytes_at(step - anchor));
            match role {
                Role::Step => {
                    costs.since_anchor.add(bytes_at(step - anchor));
                    stored += bytes_at(step - anchor);
                }
                Role::Anchor => {
                    let bytes = bytes_at(step - keyframe);
                    costs.anchor_bytes = Some(bytes);
                    costs.since_keyframe.add(bytes);
                    costs.since_anchor = Growth::default();
                    anchor = step;
                    stored += bytes;
                }
                Role::Keyframe => {
                    costs.anchor_bytes = None;
                    costs.since_anchor = Growth::default();
                    costs.since_keyframe = Growth::default();
                    (keyframe, anchor) = (step, step);
                    stored += RAW;
                }
            }
            roles.push(role);
        }
        (roles, stored)
    }

    #[test]
    fn patches_that_do_not_grow_need_no_anchor() {
        let (roles, _) = play(|_| 5_000);
        assert!(roles.iter().all(|&role| role == Role::Step));
    }

    #[test]
    fn patches_that_grow_get_anchors_and_cost_less_than_without() {
        let growing = |distance: u64| (4_000.0 * (distance as f64).sqrt()) as u64;
        let (roles, stored) = play(growing);
        assert!(roles.contains(&Role::Anchor), "{roles:?}");
        let without: u64 = RAW + (1..200).map(growing).sum::<u64>();
        assert!(stored < without * 2 / 3, "{stored} of {without}");
    }

    #[test]
    fn weights_that_move_far_get_a_keyframe() {
        let (roles, _) = play(|distance| RAW.min(40_000 * distance));
        assert!(roles.contains(&Role::Keyframe), "{roles:?}");
    }
}
