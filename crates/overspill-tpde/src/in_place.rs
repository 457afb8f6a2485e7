//! Applying to weights where they lie, and what a device needs to do so.
//!
//! A model that is resident knows the state it is in, so nothing of it is hashed: the patch's own bytes are
//! authenticated, then every segment is decoded over its base. That cannot be undone; after an error from the
//! decoding the weights must be reloaded.

use std::sync::{Mutex, PoisonError};

use overspill_codec::{BaseKind, SegmentSpec, SegmentView};

use crate::container::{Patch, PatchType, Segment};
use crate::manifest::Entry;
use crate::state::StateId;
use crate::work::{Meter, Options, Progress, Workers};
use crate::{Error, Result};

/// Turns tensors that are in the state `known_base` into the final ones: `tensors` holds one buffer for each entry
/// of the patch's manifest, in its order, or `None` for one that is the same memory as another (tied weights).
/// Tensors coded without a base are overwritten.
///
/// # Errors
/// A damaged patch, another base, buffers of other sizes, a tensor whose base is quantized: before the first write.
/// A payload that its base does not fit: after it.
pub fn apply_in_place(
    patch: &Patch<'_>,
    known_base: Option<StateId>,
    tensors: Vec<Option<&mut [u8]>>,
    options: &Options,
    progress: Progress<'_>,
) -> Result<StateId> {
    expect_base(patch, known_base)?;
    let slots = cut(patch, tensors)?;
    let workers = authenticated(patch, options)?;
    let meter = Meter::new(progress, slots.iter().map(|slot| slot.segment.raw_bytes() as u64).sum());
    workers.run(
        &slots,
        |slot| slot.segment.raw_bytes(),
        |slot| {
            let mut words = slot.words.lock().unwrap_or_else(PoisonError::into_inner);
            patch.with_view(slot.segment, |view| view.apply(&mut words))?;
            meter.add(words.len());
            Ok(())
        },
        |_, ()| Ok(()),
    )?;
    Ok(patch.final_id())
}

/// A segment and the words that it changes.
struct Slot<'s> {
    segment: &'s Segment,
    words: Mutex<&'s mut [u8]>,
}

/// Cuts buffers into one for each segment.
fn cut<'s>(patch: &'s Patch<'_>, tensors: Vec<Option<&'s mut [u8]>>) -> Result<Vec<Slot<'s>>> {
    let entries = patch.manifest().entries();
    let fits = |(entry, words): (&Entry, &Option<&mut [u8]>)| {
        words.as_ref().is_none_or(|words| words.len() as u64 == entry.tensor.bytes)
    };
    if tensors.len() != entries.len() || !entries.iter().zip(&tensors).all(fits) {
        let what = format!("{}: buffers that are not its tensors' sizes", patch.path().display());
        return Err(Error::misuse(what));
    }
    let mut rests = tensors;
    let mut slots = Vec::new();
    for segment in &patch.segments {
        let Some(rest) = rests[segment.entry].take() else { continue };
        let (words, rest) = rest.split_at_mut(segment.raw_bytes());
        slots.push(Slot { segment, words: Mutex::new(words) });
        rests[segment.entry] = Some(rest);
    }
    Ok(slots)
}

/// Whether a patch's tensors may be made where their base lies.
///
/// # Errors
/// A tensor whose base is quantized, and so of another size.
pub fn expect_in_place(patch: &Patch<'_>) -> Result<()> {
    let quantized =
        patch.manifest().entries().iter().find(|entry| matches!(entry.base, BaseKind::Quantized(_)));
    quantized.map_or(Ok(()), |entry| {
        let why = "a quantized base cannot be patched in place";
        Err(Error::tensor(patch.path(), &entry.tensor.name, None, why))
    })
}

fn authenticated(patch: &Patch<'_>, options: &Options) -> Result<Workers> {
    expect_in_place(patch)?;
    let workers = Workers::new(options, patch.largest_segment_bytes())?;
    patch.authenticate(&workers)?;
    Ok(workers)
}

/// Whether a state that is known without hashing is one that the patch may be applied to.
///
/// # Errors
/// Another state, or none where one is needed.
pub fn expect_base(patch: &Patch<'_>, known: Option<StateId>) -> Result<()> {
    let Some(expected) = patch.kind().base() else { return Ok(()) };
    match (patch.kind(), known) {
        (_, Some(found)) if found == expected => Ok(()),
        (PatchType::Absolute(_), Some(found)) if found == patch.final_id() => Ok(()),
        (_, Some(found)) => Err(Error::WrongBase { path: patch.path().to_owned(), expected, found }),
        (_, None) => Err(Error::misuse(format!(
            "{}: starts from state {expected}; say which state the tensors are in",
            patch.path().display()
        ))),
    }
}

/// One segment of a patch for a decoder of one's own.
#[derive(Debug, Clone, Copy)]
pub struct SegmentParts<'p> {
    /// Its tensor, as an index of the manifest's entries.
    pub entry: usize,
    /// What it holds.
    pub spec: SegmentSpec,
    /// The heads section from its head on.
    pub heads: &'p [u8],
    /// The index section from its first record on.
    pub index: &'p [u8],
    /// Where its payloads start in the blob section.
    pub blob_start: u64,
    /// Bytes of its payloads.
    pub blob_bytes: usize,
}

impl Patch<'_> {
    /// The segments, tensors in order of name.
    pub fn segment_parts(&self) -> impl ExactSizeIterator<Item = SegmentParts<'_>> {
        self.segments.iter().map(|segment| SegmentParts {
            entry: segment.entry,
            spec: segment.spec,
            heads: &self.heads()[segment.head_start..],
            index: &self.index()[segment.index_start..],
            blob_start: segment.blob_start,
            blob_bytes: segment.blob_bytes,
        })
    }

    /// Hands the view of segment `number` to `use_view`.
    ///
    /// # Errors
    /// A file that cannot be read, or whatever `use_view` returns.
    pub fn view_segment<R>(
        &self,
        number: usize,
        use_view: impl FnOnce(&SegmentView<'_>) -> std::result::Result<R, overspill_codec::CodecError>,
    ) -> Result<R> {
        self.with_view(&self.segments[number], use_view)
    }
}
