//! What the next step of a part starts from, read off the records.

use crate::policy::{Costs, Growth, Role};
use crate::record::{Object, Record};

/// What the next step of one part starts from.
pub(crate) struct Lineage {
    pub keyframe: Object,
    pub keyframe_state: String,
    pub anchor: Option<Object>,
    pub base_state: String,
    pub since_anchor: Growth,
    pub since_keyframe: Growth,
}

impl Lineage {
    /// From the records of a chain, `None` where no step has the part.
    pub fn of(log: &[Record], name: &str) -> Option<Self> {
        let mut lineage: Option<Lineage> = None;
        for part in log.iter().filter_map(|record| record.parts.get(name)) {
            let same = lineage.take_if(|known| known.keyframe == part.keyframe);
            let start = || Lineage::start(part.keyframe.clone(), part.keyframe_state.clone());
            let mut known = same.unwrap_or_else(start);
            match part.role {
                Role::Keyframe => {}
                Role::Anchor => {
                    known.anchor = Some(part.patch.clone());
                    known.base_state.clone_from(&part.state);
                    known.since_keyframe.add(part.patch.bytes);
                    known.since_anchor = Growth::default();
                }
                Role::Step => {
                    known.anchor.clone_from(&part.anchor);
                    known.base_state.clone_from(&part.base_state);
                    known.since_anchor.add(part.patch.bytes);
                }
            }
            lineage = Some(known);
        }
        lineage
    }

    /// Right behind a keyframe.
    pub fn start(keyframe: Object, state: String) -> Self {
        Lineage {
            keyframe,
            keyframe_state: state.clone(),
            anchor: None,
            base_state: state,
            since_anchor: Growth::default(),
            since_keyframe: Growth::default(),
        }
    }

    pub fn costs(&self, raw_bytes: u64) -> Costs {
        Costs {
            raw_bytes,
            anchor_bytes: self.anchor.as_ref().map(|anchor| anchor.bytes),
            since_anchor: self.since_anchor,
            since_keyframe: self.since_keyframe,
        }
    }

    pub fn cache_name(&self) -> String {
        cache_name(&self.base_state)
    }
}

/// Where the state of an anchor is kept while steps are packed against it.
pub(crate) fn cache_name(state: &str) -> String {
    format!("cache/{state}.safetensors")
}
