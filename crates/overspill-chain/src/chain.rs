//! Opening a chain, committing a step, and reading what was committed.
//!
//! The order of a commit: objects are written under a passing name, flushed, and renamed to their hash; the folder of
//! objects is flushed; the record is written and flushed under a passing name, renamed, and its folder flushed. Only
//! the last rename makes the step visible. What a crash leaves behind is named by nothing, and `gc` removes it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use overspill_tpde::{Checkpoint, Options, PackOptions, PackReport, Progress, flatten, pack, state_id};

use crate::files::{Files, Folder};
use crate::lineage::Lineage;
use crate::lock::{Lock, now_s};
use crate::policy::{Role, choose};
use crate::record::{Object, Part, Record, record_name, step_of};
use crate::{Error, Result};

/// The part that every chain has: the weights.
pub const PARAMS: &str = "params";
const HEAD: &str = "chain.json";
const FORMAT: &str = "{\"format\":\"overspill chain\",\"version\":1}\n";
/// Passing names of what is being written; the lock keeps them to one writer.
const PASSING_OBJECT: &str = "objects/passing";
const PASSING_RECORD: &str = "steps/passing";

/// A chain of checkpoints in a folder.
pub struct Chain {
    pub(crate) files: Box<dyn Files>,
    pub(crate) options: Options,
}

impl Chain {
    /// Makes an empty chain in `folder`, which is new or empty (or holds what an interrupted call left).
    ///
    /// # Errors
    /// A folder with other things in it, or one that cannot be written.
    pub fn init(folder: &Path, options: Options) -> Result<Self> {
        Self::init_in(Box::new(Folder::new(folder)), options)
    }

    /// Opens the chain in `folder`.
    ///
    /// # Errors
    /// [`Error::NotAChain`] where there is none, or one of a later version.
    pub fn open(folder: &Path, options: Options) -> Result<Self> {
        Self::open_in(Box::new(Folder::new(folder)), options)
    }

    /// [`Chain::init`] over any [`Files`].
    ///
    /// # Errors
    /// As [`Chain::init`].
    pub fn init_in(files: Box<dyn Files>, options: Options) -> Result<Self> {
        const OWN: [&str; 5] = ["cache", "lock", "objects", "steps", "chain.json.passing"];
        let found = files.list("")?;
        if found.iter().any(|name| name == HEAD) {
            return Err(Error::misuse(format!("{}: is a chain already", files.path("").display())));
        }
        if let Some(stranger) = found.iter().find(|name| !OWN.contains(&name.as_str())) {
            let what = format!("{}: is not empty, it holds {stranger:?}", files.path("").display());
            return Err(Error::misuse(what));
        }
        for dir in ["", "objects", "steps", "cache"] {
            files.create_dir(dir)?;
        }
        let passing = "chain.json.passing";
        write_small(&*files, passing, FORMAT.as_bytes())?;
        files.flush(passing)?;
        files.rename(passing, HEAD)?;
        files.flush_dir("")?;
        Ok(Chain { files, options })
    }

    /// [`Chain::open`] over any [`Files`].
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn open_in(files: Box<dyn Files>, options: Options) -> Result<Self> {
        let path = files.path(HEAD);
        let not = |cause: String| Error::NotAChain { path: files.path(""), cause };
        let head = fs::read_to_string(&path)
            .map_err(|error| not(format!("no chain ({error}); `overspill chain init` makes one")))?;
        if head != FORMAT {
            return Err(not(format!("a chain of another version: {}", head.trim())));
        }
        Ok(Chain { files, options })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.files.path("")
    }

    /// Committed steps, in order.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let mut steps: Vec<u64> = self.files.list("steps")?.iter().filter_map(|name| step_of(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The record of `step`.
    ///
    /// # Errors
    /// [`Error::NoStep`], or a damaged record.
    pub fn record(&self, step: u64) -> Result<Record> {
        let path = self.files.path(&record_name(step));
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::NoStep { step, steps: self.steps()? });
            }
            bytes => bytes.map_err(Error::io(&path, "read"))?,
        };
        let record = Record::from_bytes(&path, &bytes)?;
        if record.step != step {
            return Err(Error::damaged(&path, format!("it is the record of step {}", record.step)));
        }
        Ok(record)
    }

    /// All records, in order.
    ///
    /// # Errors
    /// As [`Chain::record`].
    pub fn log(&self) -> Result<Vec<Record>> {
        self.steps()?.into_iter().map(|step| self.record(step)).collect()
    }

    /// Commits `parts` as `step`, which comes after every step there is. When this returns, the step is durable.
    ///
    /// A step that is there already is left as it is if it has the same states: a run that is resumed before its
    /// last step commits again what it had.
    ///
    /// # Errors
    /// Another writer, states that cannot be read, a step out of order or there with other states, a full disk.
    /// Whatever the error, the chain is as it was.
    pub fn commit(
        &self,
        step: u64,
        parts: &[(&str, &Checkpoint<'_>)],
        progress: Progress<'_>,
    ) -> Result<Record> {
        let _lock = Lock::take(&self.path())?;
        if parts.is_empty() {
            return Err(Error::misuse("a step needs at least one part"));
        }
        let log = self.log()?;
        if let Some(last) = log.last().filter(|last| last.step >= step) {
            let record = self.record(step).map_err(|error| match error {
                Error::NoStep { .. } => {
                    Error::misuse(format!("step {step} does not come after step {}", last.step))
                }
                error => error,
            })?;
            return self.expect_same(record, parts, progress);
        }
        let mut made = IndexMap::new();
        for &(name, state) in parts {
            let part = self.commit_part(name, state, &log, progress)?;
            if made.insert(name.to_owned(), part).is_some() {
                return Err(Error::misuse(format!("part {name:?} is given twice")));
            }
        }
        self.files.flush_dir("objects")?;
        let record = Record { step, committed_s: now_s(), parts: made };
        write_small(&*self.files, PASSING_RECORD, &record.to_bytes())?;
        self.files.flush(PASSING_RECORD)?;
        self.files.rename(PASSING_RECORD, &record_name(step))?;
        self.files.flush_dir("steps")?;
        Ok(record)
    }

    fn expect_same(
        &self,
        record: Record,
        parts: &[(&str, &Checkpoint<'_>)],
        progress: Progress<'_>,
    ) -> Result<Record> {
        for &(name, state) in parts {
            let found = state_id(state, &self.options, progress)?.to_string();
            if record.parts.get(name).is_none_or(|part| part.state != found) {
                return Err(Error::misuse(format!(
                    "step {} is in the chain with another state of {name:?}; `overspill chain gc --after` drops it",
                    record.step
                )));
            }
        }
        Ok(record)
    }

    /// Encodes one part and stores its objects; nothing refers to them yet.
    fn commit_part(
        &self,
        name: &str,
        state: &Checkpoint<'_>,
        log: &[Record],
        progress: Progress<'_>,
    ) -> Result<Part> {
        let raw_bytes = state.total_bytes();
        let Some(lineage) = Lineage::of(log, name) else { return self.keyframe(state, raw_bytes, progress) };
        let report = self.pack_to_base(&lineage, state, progress)?;
        let role = choose(&lineage.costs(raw_bytes), report.packed_bytes);
        match role {
            Role::Keyframe => self.keyframe(state, raw_bytes, progress),
            Role::Anchor if lineage.anchor.is_some() => {
                let start = Lineage { anchor: None, base_state: lineage.keyframe_state.clone(), ..lineage };
                let report = self.pack_to_base(&start, state, progress)?;
                self.part(role, &report, start)
            }
            role => self.part(role, &report, lineage),
        }
    }

    /// Packs `state` against the newest anchor (or the keyframe) into the passing object.
    fn pack_to_base(
        &self,
        lineage: &Lineage,
        state: &Checkpoint<'_>,
        progress: Progress<'_>,
    ) -> Result<PackReport> {
        let cached = lineage.cache_name();
        let is_cached = lineage.anchor.is_some() && self.files.path(&cached).exists();
        match self.try_pack(lineage, state, progress) {
            // A cached state may be anything, cut short by a crash or changed: it is made again.
            Err(Error::Tpde(overspill_tpde::Error::Format { .. }) | Error::Damaged { .. }) if is_cached => {
                self.files.remove(&cached)?;
                self.try_pack(lineage, state, progress)
            }
            outcome => outcome,
        }
    }

    fn try_pack(
        &self,
        lineage: &Lineage,
        state: &Checkpoint<'_>,
        progress: Progress<'_>,
    ) -> Result<PackReport> {
        let base = self.base_of(lineage)?;
        let report = self.pack_passing(&base, state, progress)?;
        match report.kind.base().map(|id| id.to_string()) {
            Some(found) if found == lineage.base_state => Ok(report),
            found => {
                let cause = format!("is state {found:?}, the chain says {}", lineage.base_state);
                Err(Error::damaged(&self.files.path(&lineage.keyframe.name()), cause))
            }
        }
    }

    /// What the next step is a patch to.
    fn base_of(&self, lineage: &Lineage) -> Result<Checkpoint<'static>> {
        let keyframe = self.files.path(&lineage.keyframe.name());
        let Some(anchor) = &lineage.anchor else { return Ok(Checkpoint::open(&keyframe)?) };
        let cached = lineage.cache_name();
        if !self.files.path(&cached).exists() {
            let patch = self.files.path(&anchor.name());
            self.files.create(&cached, &mut |path| self.apply_once(&keyframe, &patch, path))?;
        }
        Ok(Checkpoint::open(&self.files.path(&cached))?)
    }

    fn pack_passing(
        &self,
        base: &Checkpoint<'_>,
        state: &Checkpoint<'_>,
        progress: Progress<'_>,
    ) -> Result<PackReport> {
        let options = PackOptions { run: self.options, ..PackOptions::default() };
        let mut report = None;
        self.files.create(PASSING_OBJECT, &mut |path| {
            report = Some(pack(Some(base), state, path, &options, progress)?);
            Ok(())
        })?;
        report.ok_or_else(|| Error::misuse("nothing was packed"))
    }

    /// Stores the whole state, and the step as an empty patch to it.
    fn keyframe(&self, state: &Checkpoint<'_>, raw_bytes: u64, progress: Progress<'_>) -> Result<Part> {
        self.files.create(PASSING_OBJECT, &mut |path| Ok(flatten(state, path, &self.options, progress)?))?;
        let keyframe = self.store_passing()?;
        let base = Checkpoint::open(&self.files.path(&keyframe.name()))?;
        let report = self.pack_passing(&base, state, progress)?;
        debug_assert_eq!(report.raw_bytes, raw_bytes);
        self.part(Role::Keyframe, &report, Lineage::start(keyframe, report.final_id.to_string()))
    }

    /// The part whose patch is the passing object, coded against what `from` ends in.
    fn part(&self, role: Role, report: &PackReport, from: Lineage) -> Result<Part> {
        let Lineage { keyframe, keyframe_state, anchor, base_state, .. } = from;
        let (state, raw_bytes) = (report.final_id.to_string(), report.raw_bytes);
        let patch = self.store_passing()?;
        Ok(Part { state, role, keyframe, keyframe_state, anchor, base_state, patch, raw_bytes })
    }

    /// Gives the passing object its name.
    fn store_passing(&self) -> Result<Object> {
        let path = self.files.path(PASSING_OBJECT);
        let (hash, bytes) = hash_file(&path)?;
        let object = Object { hash, bytes };
        self.files.flush(PASSING_OBJECT)?;
        self.files.rename(PASSING_OBJECT, &object.name())?;
        Ok(object)
    }
}

/// Writes a file of a few bytes.
fn write_small(files: &dyn Files, name: &str, bytes: &[u8]) -> Result<()> {
    files.create(name, &mut |path| fs::write(path, bytes).map_err(Error::io(path, "write")))
}

/// BLAKE3 and size of a file.
pub(crate) fn hash_file(path: &Path) -> Result<(String, u64)> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    let bytes = file.metadata().map_err(Error::io(path, "read the size"))?.len();
    hasher.update_reader(file).map_err(Error::io(path, "read"))?;
    Ok((hasher.finalize().to_hex().to_string(), bytes))
}
