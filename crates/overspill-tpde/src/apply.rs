//! Applying: base and patch in, final out.
//!
//! Order: patch authenticated, base's tensors compared with the manifest, base hashed, all before the first
//! byte is written. Then segments are decoded and hashed on workers, each written to its own place; the result's
//! state id is compared before an output file gets its name.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use overspill_codec::{BaseKind, SegmentSpec};

use crate::checkpoint::{Checkpoint, Kind, Tensor};
use crate::container::{Patch, PatchType, Segment};
use crate::output::{OutputFile, OutputFolder};
use crate::safetensors::write_header;
use crate::state::{SegmentHash, StateHasher, StateId, hash_checkpoint, hash_segment};
use crate::work::{Meter, Options, Progress, Workers};
use crate::{Error, Result};

/// Writes the state that `patch` makes of `base` to `target`: a safetensors file, or a new folder of shards if
/// the final that was packed was sharded. Returns its state id.
///
/// # Errors
/// A damaged patch, a wrong base, files that cannot be read or written. Nothing is left behind.
pub fn apply(
    patch: &Patch<'_>,
    base: Option<&Checkpoint<'_>>,
    target: &Path,
    options: &Options,
    progress: Progress<'_>,
) -> Result<StateId> {
    let (workers, meter) = prepare(patch, base, None, options, progress)?;
    let output = Output::create(patch, target)?;
    write_out(patch, output, &workers, &meter, |segment, out| fill(patch, base, segment, &workers, out))
}

/// Writes the segments that `fill` makes to `output`, which gets its name if they are the state that `patch` promises.
pub(crate) fn write_out(
    patch: &Patch<'_>,
    output: Output,
    workers: &Workers,
    meter: &Meter<'_>,
    fill: impl Fn(&Segment, &mut [u8]) -> Result<()> + Sync,
) -> Result<StateId> {
    let made = run(patch, workers, meter, fill, |_, segment, decode| {
        let mut buffer = workers.buffer();
        let bytes = buffer.room(segment.raw_bytes())?;
        decode(bytes)?;
        output.write(patch, segment, bytes)?;
        workers.give_back(buffer);
        Ok(())
    })?;
    expect_final(patch, made)?;
    output.commit()?;
    Ok(made)
}

/// Decodes into memory: `outs` holds one buffer for each entry of the patch's manifest, in its order.
///
/// A caller that already knows its base's state passes it as `known_base`; the base is then not hashed.
///
/// # Errors
/// As [`apply`], and buffers of other sizes. Before a damaged patch or a wrong base is reported nothing is
/// written; where the result turns out wrong the buffers hold it and must be dropped.
pub fn apply_into(
    patch: &Patch<'_>,
    base: Option<&Checkpoint<'_>>,
    known_base: Option<StateId>,
    outs: Vec<&mut [u8]>,
    options: &Options,
    progress: Progress<'_>,
) -> Result<StateId> {
    let slots = cut(patch, outs)?;
    let (workers, meter) = prepare(patch, base, known_base, options, progress)?;
    let fill = |segment: &Segment, out: &mut [u8]| fill(patch, base, segment, &workers, out);
    let made = run(patch, &workers, &meter, fill, |i, _, decode| {
        decode(&mut slots[i].lock().unwrap_or_else(PoisonError::into_inner))
    })?;
    expect_final(patch, made)?;
    Ok(made)
}

/// Everything that is checked before the first write.
pub(crate) fn prepare<'p>(
    patch: &Patch<'_>,
    base: Option<&Checkpoint<'_>>,
    known_base: Option<StateId>,
    options: &Options,
    progress: Progress<'p>,
) -> Result<(Workers, Meter<'p>)> {
    let largest = patch.largest_segment_bytes().max(base.map_or(0, |base| base.largest_segment_bytes()));
    let workers = Workers::new(options, largest)?;
    let hashed_bytes = if known_base.is_some() { 0 } else { base.map_or(0, |base| base.total_bytes()) };
    let meter = Meter::new(progress, hashed_bytes + patch.manifest().total_bytes());
    patch.authenticate(&workers)?;
    match (patch.kind(), base) {
        (PatchType::Standalone, None) => {}
        (PatchType::Standalone, Some(_)) => {
            return Err(Error::misuse(format!(
                "{}: starts from nothing, give no base",
                patch.path().display()
            )));
        }
        (kind, None) => {
            let what = format!("{}: a {} patch, give its base", patch.path().display(), kind.name());
            return Err(Error::misuse(what));
        }
        (kind, Some(base)) => {
            check_tensors(patch, base)?;
            let found = match known_base {
                Some(id) => id,
                None => hash_checkpoint(base, &workers, &meter)?,
            };
            let accepted = match kind {
                PatchType::Absolute(id) => found == id || found == patch.final_id(),
                _ => kind.base() == Some(found),
            };
            if let (false, Some(expected)) = (accepted, kind.base()) {
                return Err(Error::WrongBase { path: base.path.clone(), expected, found });
            }
        }
    }
    Ok((workers, meter))
}

/// Every tensor that the patch needs is in the base, with the type and the words it asks for.
pub(crate) fn check_tensors(patch: &Patch<'_>, base: &Checkpoint<'_>) -> Result<()> {
    for entry in patch.manifest().entries() {
        let kind = match entry.base {
            BaseKind::None => continue,
            BaseKind::Words => entry.tensor.kind,
            BaseKind::Quantized(layout) => Kind::Quantized(layout),
        };
        let name = &entry.tensor.name;
        let fail = |cause: String| Err(Error::tensor(&base.path, name, None, format!("wrong base: {cause}")));
        match base.get(name) {
            None => return fail("no such tensor".into()),
            Some(found) if found.kind != kind || found.words() != entry.tensor.words() => {
                return fail(format!(
                    "{} of {:?}, the patch needs {} of {} words",
                    found.kind.name(),
                    found.shape,
                    kind.name(),
                    entry.tensor.words()
                ));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Decodes one segment into the buffer it is given and hashes it.
pub(crate) type Decode<'d> = &'d mut dyn FnMut(&mut [u8]) -> Result<()>;

/// Makes every segment with `fill` on a worker, in the buffer that `place` has for it, and returns the state made.
///
/// `place` gets the segment's number, the segment, and the function to call with a buffer of its size.
pub(crate) fn run(
    patch: &Patch<'_>,
    workers: &Workers,
    meter: &Meter<'_>,
    fill: impl Fn(&Segment, &mut [u8]) -> Result<()> + Sync,
    place: impl Fn(usize, &Segment, Decode<'_>) -> Result<()> + Sync,
) -> Result<StateId> {
    let jobs: Vec<(usize, &Segment)> = patch.segments.iter().enumerate().collect();
    let mut hashes: Vec<SegmentHash> = Vec::with_capacity(jobs.len());
    workers.run(
        &jobs,
        |(_, segment)| segment.raw_bytes(),
        |&(i, segment)| {
            let mut hash = None;
            place(i, segment, &mut |buffer| {
                fill(segment, buffer)?;
                hash = Some(hash_segment(buffer));
                Ok(())
            })?;
            meter.add(segment.raw_bytes());
            hash.ok_or_else(|| Error::misuse("a segment without a buffer"))
        },
        |_, hash| {
            hashes.push(hash);
            Ok(())
        },
    )?;
    let mut hasher = StateHasher::new();
    let mut rest = hashes.as_slice();
    for &i in &patch.manifest().by_name {
        let tensor = &patch.manifest().entries()[i].tensor;
        let (own, others) = rest.split_at(overspill_codec::segments(tensor.words()).count());
        hasher.add(tensor, own);
        rest = others;
    }
    Ok(hasher.finish())
}

/// Makes the final words of a segment of `patch` in `out`.
pub(crate) fn fill(
    patch: &Patch<'_>,
    base: Option<&Checkpoint<'_>>,
    segment: &Segment,
    workers: &Workers,
    out: &mut [u8],
) -> Result<()> {
    let (Some(base), true) = (base, segment.spec.base != BaseKind::None) else {
        return patch.decode(segment, &[], out);
    };
    let name = &patch.entry(segment).tensor.name;
    let tensor =
        base.get(name).ok_or_else(|| Error::tensor(&base.path, name, None, "wrong base: no such tensor"))?;
    let (store, SegmentSpec { first_word, words, .. }) = (base.store(tensor), segment.spec);
    if segment.spec.base == BaseKind::Words && store.is_file() {
        tensor.read_into(store, first_word, out)?;
        return patch.with_view(segment, |view| view.apply(out));
    }
    let mut scratch = workers.buffer();
    patch.decode(segment, tensor.read(store, first_word, words, &mut scratch)?, out)?;
    workers.give_back(scratch);
    Ok(())
}

pub(crate) fn expect_final(patch: &Patch<'_>, made: StateId) -> Result<()> {
    if made == patch.final_id() {
        return Ok(());
    }
    let cause = format!("decodes to state {made}, its header promises {}", patch.final_id());
    Err(Error::format(patch.path(), cause))
}

/// Cuts one buffer an entry into one buffer a segment, in segment order.
fn cut<'o>(patch: &Patch<'_>, outs: Vec<&'o mut [u8]>) -> Result<Vec<Mutex<&'o mut [u8]>>> {
    let entries = patch.manifest().entries();
    if outs.len() != entries.len() {
        return Err(Error::misuse(format!("{} buffers for {} tensors", outs.len(), entries.len())));
    }
    let mut outs: Vec<Option<&mut [u8]>> = outs.into_iter().map(Some).collect();
    let mut slots = Vec::with_capacity(patch.segments.len());
    for &i in &patch.manifest().by_name {
        let Tensor { name, kind, bytes, .. } = &entries[i].tensor;
        let mut rest = outs[i].take().unwrap_or_default();
        if rest.len() as u64 != *bytes {
            return Err(Error::misuse(format!("{name:?}: a buffer of {} bytes for {bytes}", rest.len())));
        }
        for (_, words) in overspill_codec::segments(entries[i].tensor.words()) {
            let (own, others) = rest.split_at_mut(kind.bytes_of(words as u64) as usize);
            slots.push(Mutex::new(own));
            rest = others;
        }
    }
    Ok(slots)
}

/// The files being written, and where each one's tensors start.
pub(crate) struct Output {
    place: OutputPlace,
    files: Vec<(PathBuf, File, u64)>,
}

enum OutputPlace {
    File(OutputFile),
    Folder(OutputFolder),
}

impl Output {
    pub fn create(patch: &Patch<'_>, target: &Path) -> Result<Self> {
        let layout = &patch.manifest().layout;
        let place = match &layout.index {
            None => OutputPlace::File(OutputFile::create(target)?),
            Some(_) => OutputPlace::Folder(OutputFolder::create(target)?),
        };
        let mut files = Vec::with_capacity(layout.files.len());
        for (number, described) in layout.files.iter().enumerate() {
            let (path, file) = match &place {
                OutputPlace::File(output) => {
                    (output.path().to_owned(), output.file().try_clone().map_err(Error::io(target, "write"))?)
                }
                OutputPlace::Folder(folder) => {
                    (folder.path().join(&described.name), folder.create_file(&described.name)?)
                }
            };
            let own = || patch.manifest().entries().iter().map(|e| &e.tensor).filter(|t| t.store == number);
            let tensors = own().map(|t| (t.name.as_str(), t.kind.name(), t.shape.as_slice(), t.bytes));
            let header = write_header(described.metadata.as_ref(), tensors, 8);
            let data_start = header.len() as u64;
            let data_bytes: u64 = own().map(|t| t.bytes).sum();
            file.write_all_at(&header, 0)
                .and_then(|()| file.set_len(data_start + data_bytes))
                .map_err(Error::io(&path, "write"))?;
            files.push((path, file, data_start));
        }
        if let (OutputPlace::Folder(folder), Some(metadata)) = (&place, &layout.index) {
            write_index(patch, folder, metadata)?;
        }
        Ok(Output { place, files })
    }

    fn write(&self, patch: &Patch<'_>, segment: &Segment, bytes: &[u8]) -> Result<()> {
        let tensor = &patch.entry(segment).tensor;
        let (path, file, data_start) = &self.files[tensor.store];
        let offset_bytes = data_start + tensor.offset_bytes + tensor.kind.bytes_of(segment.spec.first_word);
        file.write_all_at(bytes, offset_bytes).map_err(Error::io(path, "write"))
    }

    fn commit(self) -> Result<()> {
        for (path, file, _) in &self.files {
            file.sync_all().map_err(Error::io(path, "flush"))?;
        }
        match self.place {
            OutputPlace::File(output) => output.commit(),
            OutputPlace::Folder(folder) => folder.commit(),
        }
    }
}

/// The index of a sharded checkpoint, in the form that transformers writes.
fn write_index(patch: &Patch<'_>, folder: &OutputFolder, metadata: &serde_json::Value) -> Result<()> {
    const NAME: &str = "model.safetensors.index.json";
    let manifest = patch.manifest();
    let weight_map: serde_json::Map<String, serde_json::Value> = manifest
        .by_name
        .iter()
        .map(|&i| &manifest.entries()[i].tensor)
        .map(|t| (t.name.clone(), manifest.layout.files[t.store].name.clone().into()))
        .collect();
    let index = serde_json::json!({ "metadata": metadata, "weight_map": weight_map });
    let mut text = serde_json::to_string_pretty(&index)
        .map_err(|error| Error::format(patch.path(), error.to_string()))?;
    text.push('\n');
    let path = folder.path().join(NAME);
    let file = folder.create_file(NAME)?;
    file.write_all_at(text.as_bytes(), 0).and_then(|()| file.sync_all()).map_err(Error::io(&path, "write"))
}
