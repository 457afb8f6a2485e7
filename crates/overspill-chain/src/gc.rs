//! Dropping steps, and what no step needs.
//!
//! Records go first, and durably, then objects: after a crash in between there is more than is needed, never less.

use std::collections::HashSet;
use std::fs;

use crate::chain::Chain;
use crate::lineage::cache_name;
use crate::lock::Lock;
use crate::record::{Part, record_name, step_of};
use crate::{Error, Result};

/// Which steps stay. The newest always does.
#[derive(Debug, Clone, Copy, Default)]
pub struct Keep {
    /// So many of the newest; all, if neither this nor `every` is given.
    pub last: Option<u64>,
    /// Steps that are multiples of this, beside `last`.
    pub every: Option<u64>,
    /// Nothing after this step: a run is taken up from it.
    pub up_to: Option<u64>,
}

/// What was dropped.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Collected {
    /// Steps that are gone.
    pub steps: Vec<u64>,
    /// Objects and leftovers of interrupted commits.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Keep {
    /// Whether step number `rank` of `count` (in order) stays.
    fn keeps(&self, step: u64, rank: usize, count: usize) -> bool {
        let limited = self.last.is_some() || self.every.is_some();
        let newest = (count - rank) as u64 <= self.last.unwrap_or(1).max(1);
        !limited || newest || self.every.is_some_and(|every| step.is_multiple_of(every))
    }
}

impl Chain {
    /// Drops the steps that `keep` does not keep, then every object that no step needs.
    ///
    /// # Errors
    /// Another writer, a damaged record (nothing is removed then), files that cannot be removed.
    pub fn gc(&self, keep: Keep) -> Result<Collected> {
        let _lock = Lock::take(&self.path())?;
        if keep.every == Some(0) {
            return Err(Error::misuse("every 0th step is none"));
        }
        let log = self.log()?;
        let mut collected = Collected::default();
        let staying: Vec<u64> = log
            .iter()
            .map(|record| record.step)
            .filter(|&step| keep.up_to.is_none_or(|up_to| step <= up_to))
            .collect();
        if staying.is_empty() && !log.is_empty() {
            return Err(Error::NoStep { step: keep.up_to.unwrap_or(0), steps: self.steps()? });
        }
        let kept: HashSet<u64> = staying
            .iter()
            .enumerate()
            .filter(|&(rank, &step)| keep.keeps(step, rank, staying.len()))
            .map(|(_, &step)| step)
            .collect();
        let mut needed = HashSet::new();
        for record in &log {
            if kept.contains(&record.step) {
                needed
                    .extend(record.parts.values().flat_map(Part::objects).map(|object| object.hash.clone()));
            } else {
                self.files.remove(&record_name(record.step))?;
                collected.steps.push(record.step);
            }
        }
        self.files.flush_dir("steps")?;
        let states: HashSet<String> = log
            .iter()
            .rfind(|record| kept.contains(&record.step))
            .into_iter()
            .flat_map(|record| record.parts.values().map(|part| cache_name(&part.base_state)))
            .collect();
        self.remove_others("objects", &mut collected, |name| needed.contains(name))?;
        self.remove_others("cache", &mut collected, |name| states.contains(&format!("cache/{name}")))?;
        self.remove_others("steps", &mut collected, |name| step_of(name).is_some())?;
        Ok(collected)
    }

    fn remove_others(
        &self,
        dir: &str,
        collected: &mut Collected,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<()> {
        for name in self.files.list(dir)?.iter().filter(|name| !wanted(name)) {
            let name = format!("{dir}/{name}");
            collected.bytes += fs::metadata(self.files.path(&name)).map_or(0, |meta| meta.len());
            collected.files += 1;
            self.files.remove(&name)?;
        }
        self.files.flush_dir(dir)
    }
}
