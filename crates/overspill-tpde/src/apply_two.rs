//! Applying two patches in one pass: base to anchor to step, as chains restore.
//!
//! Each segment is read once, patched twice where it lies, hashed once and written: the state between is never whole,
//! neither in memory nor on disk. Only the result is compared with what its patch promises, which no wrong base and
//! no damage passes; which of the two it was, a caller finds out with one application after the other.

use std::collections::HashMap;
use std::path::Path;

use overspill_codec::BaseKind;

use crate::apply::{Output, check_tensors, fill, write_out};
use crate::checkpoint::Checkpoint;
use crate::container::{Patch, Segment};
use crate::state::StateId;
use crate::work::{Meter, Options, Progress, Workers};
use crate::{Error, Result};

/// Writes the state that `second` makes of the one that `first` makes of `base`, as [`crate::apply`] would after
/// another one. Returns its state id.
///
/// # Errors
/// Patches that do not follow each other, a damaged patch, a wrong base, files that cannot be read or written.
/// Nothing is left behind.
pub fn apply_two(
    first: &Patch<'_>,
    second: &Patch<'_>,
    base: &Checkpoint<'_>,
    target: &Path,
    options: &Options,
    progress: Progress<'_>,
) -> Result<StateId> {
    if second.kind().base() != Some(first.final_id()) {
        return Err(Error::misuse(format!(
            "{}: does not start from the state that {} makes",
            second.path().display(),
            first.path().display()
        )));
    }
    let workers = Workers::new(options, second.largest_segment_bytes().max(base.largest_segment_bytes()))?;
    first.authenticate(&workers)?;
    second.authenticate(&workers)?;
    check_tensors(first, base)?;
    let firsts = segments_by_place(first);
    let meter = Meter::new(progress, second.manifest().total_bytes());
    let output = Output::create(second, target)?;
    write_out(second, output, &workers, &meter, |segment, out| {
        if segment.spec.base == BaseKind::None {
            return second.decode(segment, &[], out);
        }
        let tensor = &second.entry(segment).tensor;
        let before = firsts.get(&(tensor.name.as_str(), segment.spec.first_word));
        let fits = |before: &&&Segment| {
            segment.spec.base == BaseKind::Words
                && (before.spec.dtype, before.spec.words) == (segment.spec.dtype, segment.spec.words)
        };
        let Some(before) = before.filter(fits) else {
            let cause = format!("starts from what {} does not make", first.path().display());
            return Err(Error::tensor(second.path(), &tensor.name, None, cause));
        };
        fill(first, Some(base), before, &workers, out)?;
        second.with_view(segment, |view| view.apply(out))
    })
}

/// The segments of a patch by name of their tensor and first word.
fn segments_by_place<'p>(patch: &'p Patch<'_>) -> HashMap<(&'p str, u64), &'p Segment> {
    let place = |segment: &'p Segment| (patch.entry(segment).tensor.name.as_str(), segment.spec.first_word);
    patch.segments.iter().map(|segment| (place(segment), segment)).collect()
}
