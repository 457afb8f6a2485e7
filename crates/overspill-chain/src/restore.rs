//! Rebuilding a step: keyframe, anchor, step.

use std::path::{Path, PathBuf};

use overspill_tpde::checkpoint::MemoryTensor;
use overspill_tpde::{Checkpoint, Entry, Kind, Patch, Progress, apply, apply_into, apply_two};

use crate::chain::Chain;
use crate::lineage::cache_name;
use crate::record::{Object, Part};
use crate::{Error, Result};

impl Chain {
    /// Writes `part` of `step` to `target`: a safetensors file, or a new folder where the state was sharded.
    /// Two applications at most, in one pass; one where the step starts from the keyframe or its anchor's state is
    /// cached.
    ///
    /// # Errors
    /// No such step or part, damaged objects, a target that cannot be written. Nothing is left behind.
    pub fn restore(&self, step: u64, part: &str, target: &Path, progress: Progress<'_>) -> Result<()> {
        let found = self.part_of(step, part)?;
        let patch = Patch::open(&self.files.path(&found.patch.name()))?;
        if let Some(anchor) = &found.anchor
            && !self.files.path(&cache_name(&found.base_state)).exists()
        {
            let anchor = Patch::open(&self.files.path(&anchor.name()))?;
            let keyframe = Checkpoint::open(&self.files.path(&found.keyframe.name()))?;
            match apply_two(&anchor, &patch, &keyframe, target, &self.options, progress) {
                // One application after the other finds out which file is damaged.
                Err(overspill_tpde::Error::Format { .. }) => {}
                outcome => return Ok(outcome.map(|_| ())?),
            }
        }
        self.with_base(&found, target, |base| {
            apply(&patch, Some(base), target, &self.options, progress)?;
            Ok(())
        })
    }

    /// The files that `part` of `step` is rebuilt from, for a caller that applies them itself: keyframe, anchor where
    /// there is one, patch, and the state that the patch starts from.
    ///
    /// # Errors
    /// No such step or part.
    pub fn route(&self, step: u64, part: &str) -> Result<(PathBuf, Option<PathBuf>, PathBuf, String)> {
        let found = self.part_of(step, part)?;
        let place = |object: &Object| self.files.path(&object.name());
        let anchor = found.anchor.as_ref().map(place);
        Ok((place(&found.keyframe), anchor, place(&found.patch), found.base_state))
    }

    fn part_of(&self, step: u64, part: &str) -> Result<Part> {
        let mut record = self.record(step)?;
        record.parts.shift_remove(part).ok_or_else(|| {
            let names: Vec<&str> = record.parts.keys().map(String::as_str).collect();
            Error::misuse(format!("step {step} has no {part:?}, it has {}", names.join(", ")))
        })
    }

    /// Calls `work` with the state that `part`'s patch starts from; one that has to be made lies in memory where half
    /// of the budget holds it, else beside `target`.
    pub(crate) fn with_base<R>(
        &self,
        part: &Part,
        target: &Path,
        work: impl Fn(&Checkpoint<'_>) -> Result<R>,
    ) -> Result<R> {
        let keyframe = self.files.path(&part.keyframe.name());
        let Some(anchor) = &part.anchor else { return work(&Checkpoint::open(&keyframe)?) };
        let cached = self.files.path(&cache_name(&part.base_state));
        if cached.exists() {
            // A cached state is only a hint: every application compares the state of its base.
            match Checkpoint::open(&cached).map_err(Error::from).and_then(|base| work(&base)) {
                Err(Error::Tpde(
                    overspill_tpde::Error::WrongBase { .. } | overspill_tpde::Error::Format { .. },
                )) => {}
                outcome => return outcome,
            }
        }
        let patch = Patch::open(&self.files.path(&anchor.name()))?;
        if patch.manifest().total_bytes() <= self.options.memory_bytes as u64 / 2 {
            return self.in_memory(&keyframe, &patch, work);
        }
        let beside = target.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let passing = tempfile::Builder::new()
            .prefix(".overspill-")
            .tempdir_in(beside)
            .map_err(Error::io(target, "create a folder beside"))?;
        let made = passing.path().join("anchor.safetensors");
        self.apply_once(&keyframe, patch.path(), &made)?;
        work(&Checkpoint::open(&made)?)
    }

    /// Calls `work` with the state that `patch` makes of the keyframe, in memory.
    fn in_memory<R>(
        &self,
        keyframe: &Path,
        patch: &Patch<'_>,
        work: impl Fn(&Checkpoint<'_>) -> Result<R>,
    ) -> Result<R> {
        let base = Checkpoint::open(keyframe)?;
        let entries = patch.manifest().entries();
        let mut buffers: Vec<Vec<u8>> = entries.iter().map(|e| vec![0; e.tensor.bytes as usize]).collect();
        let outs = buffers.iter_mut().map(Vec::as_mut_slice).collect();
        apply_into(patch, Some(&base), None, outs, &self.options, &|_, _| ())?;
        let tensors = entries.iter().zip(&buffers).map(|(Entry { tensor, .. }, bytes)| {
            let Kind::Plain(dtype) = tensor.kind else {
                return Err(Error::damaged(patch.path(), "an anchor of a quantized type"));
            };
            let kind = Kind::Plain(dtype);
            Ok(MemoryTensor { name: tensor.name.clone(), kind, shape: tensor.shape.clone(), bytes })
        });
        work(&Checkpoint::from_memory("anchor", tensors.collect::<Result<_>>()?)?)
    }

    /// One application between files.
    pub(crate) fn apply_once(&self, base: &Path, patch: &Path, target: &Path) -> Result<()> {
        let base = Checkpoint::open(base)?;
        apply(&Patch::open(patch)?, Some(&base), target, &self.options, &|_, _| ())?;
        Ok(())
    }
}
