//! What a step is made of: one small JSON file a step, checked by its own hash.

use std::path::Path;

use indexmap::IndexMap;
use overspill_tpde::StateId;
use serde::{Deserialize, Serialize};

use crate::policy::Role;
use crate::{Error, Result};

/// One committed step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The step.
    pub step: u64,
    /// Seconds since 1970 when it was committed.
    pub committed_s: u64,
    /// Its parts by name: `params`, `moments`, or what the caller named.
    pub parts: IndexMap<String, Part>,
}

/// One part of a step: how to rebuild it, and what that costs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// State that it is.
    pub state: String,
    /// What the step is in the chain of this part.
    pub role: Role,
    /// The whole state that everything starts from.
    pub keyframe: Object,
    /// Its state.
    pub keyframe_state: String,
    /// The patch from the keyframe to the anchor; absent where the step starts from the keyframe.
    pub anchor: Option<Object>,
    /// State of what `patch` starts from.
    pub base_state: String,
    /// The patch that makes this step.
    pub patch: Object,
    /// Bytes of the tensors.
    pub raw_bytes: u64,
}

/// A file of the chain, named by the BLAKE3 of its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Object {
    /// 64 hexadecimal digits.
    pub hash: String,
    /// Its size.
    pub bytes: u64,
}

impl Part {
    /// Bytes that this step added to the chain.
    #[must_use]
    pub fn new_bytes(&self) -> u64 {
        self.patch.bytes + if self.role == Role::Keyframe { self.keyframe.bytes } else { 0 }
    }

    fn is_well_formed(&self) -> bool {
        let states = [&self.state, &self.keyframe_state, &self.base_state];
        states.iter().all(|state| state.parse::<StateId>().is_ok())
            && self.objects().all(Object::is_well_formed)
    }

    /// Objects that restoring needs, first to last.
    pub fn objects(&self) -> impl Iterator<Item = &Object> {
        [Some(&self.keyframe), self.anchor.as_ref(), Some(&self.patch)].into_iter().flatten()
    }
}

impl Object {
    pub(crate) fn name(&self) -> String {
        format!("objects/{}", self.hash)
    }

    fn is_well_formed(&self) -> bool {
        self.hash.len() == 64 && self.hash.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
    }
}

/// Name of a step's record; as many digits as any step has, so that names sort like steps.
pub(crate) fn record_name(step: u64) -> String {
    format!("steps/{step:020}.json")
}

/// The step of a file name in `steps/`, `None` for what is no record.
pub(crate) fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".json")?;
    if digits.len() == 20 { digits.parse().ok() } else { None }
}

impl Record {
    /// The record's file: its JSON, and a line with the hash of it.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut text = serde_json::to_string(self).unwrap_or_default();
        text.push('\n');
        let hash = blake3::hash(text.as_bytes()).to_hex();
        text.push_str(&hash);
        text.push('\n');
        text.into_bytes()
    }

    pub(crate) fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(bytes).map_err(|_| Error::damaged(path, "not text"))?;
        let (json, hash) = text
            .strip_suffix('\n')
            .and_then(|text| text.split_once('\n'))
            .ok_or_else(|| Error::damaged(path, "cut short"))?;
        if blake3::hash(format!("{json}\n").as_bytes()).to_hex().as_str() != hash {
            return Err(Error::damaged(path, "its bytes do not have the hash that it names"));
        }
        let record: Record =
            serde_json::from_str(json).map_err(|error| Error::damaged(path, error.to_string()))?;
        if !record.parts.values().all(Part::is_well_formed) {
            return Err(Error::damaged(path, "it names a state or an object that is no hash"));
        }
        Ok(record)
    }
}
