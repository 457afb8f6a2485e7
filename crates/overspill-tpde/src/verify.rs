//! Verifying: everything that applying would check, without writing.

use crate::Result;
use crate::apply::{expect_final, fill, prepare, run};
use crate::checkpoint::Checkpoint;
use crate::container::{Patch, PatchType, Segment};
use crate::work::{Meter, Options, Progress, Workers};

/// How far a patch was verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verification {
    /// Bytes of the patch that were compared with its hash: all of it.
    pub patch_bytes: u64,
    /// Whether it was decoded and its result compared with the state it promises.
    pub decoded: bool,
}

/// Authenticates `patch`, and with its base (or where it needs none) decodes it and checks the result.
///
/// # Errors
/// A damaged patch, a wrong base, a result that is not what the patch promises.
pub fn verify(
    patch: &Patch<'_>,
    base: Option<&Checkpoint<'_>>,
    options: &Options,
    progress: Progress<'_>,
) -> Result<Verification> {
    let patch_bytes = patch.file_bytes();
    if base.is_none() && patch.kind() != PatchType::Standalone {
        let workers = Workers::new(options, patch.largest_segment_bytes())?;
        let meter = Meter::new(progress, patch_bytes);
        patch.authenticate(&workers)?;
        workers.run(
            &patch.segments,
            |segment| segment.blob_bytes,
            |segment| {
                patch.with_view(segment, |view| {
                    (0..view.chunks()).try_for_each(|chunk| view.check_chunk(chunk))
                })?;
                meter.add(segment.blob_bytes);
                Ok(())
            },
            |_, ()| Ok(()),
        )?;
        return Ok(Verification { patch_bytes, decoded: false });
    }
    let (workers, meter) = prepare(patch, base, None, options, progress)?;
    let fill = |segment: &Segment, out: &mut [u8]| fill(patch, base, segment, &workers, out);
    let made = run(patch, &workers, &meter, fill, |_, segment, decode| {
        let mut buffer = workers.buffer();
        decode(buffer.room(segment.raw_bytes())?)?;
        workers.give_back(buffer);
        Ok(())
    })?;
    expect_final(patch, made)?;
    Ok(Verification { patch_bytes, decoded: true })
}
