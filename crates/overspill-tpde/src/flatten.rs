//! A checkpoint as one plain safetensors file, whatever files or memory it lies in.

use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::checkpoint::{Checkpoint, Kind};
use crate::output::OutputFile;
use crate::safetensors::write_header;
use crate::work::{Meter, Options, Progress, Workers};
use crate::{Error, Result};

/// Bytes that a worker moves at a time.
const PIECE_BYTES: u64 = 16 << 20;

/// Writes the tensors of `checkpoint`, in order of name, to the file `target`. Sharding and free-form metadata
/// are not kept.
///
/// # Errors
/// Quantized tensors, files that cannot be read, a target that cannot be written. Nothing is left behind.
pub fn flatten(
    checkpoint: &Checkpoint<'_>,
    target: &Path,
    options: &Options,
    progress: Progress<'_>,
) -> Result<()> {
    if let Some(tensor) = checkpoint.tensors().iter().find(|t| matches!(t.kind, Kind::Quantized(_))) {
        return Err(Error::tensor(&checkpoint.path, &tensor.name, None, "quantized: not a safetensors type"));
    }
    let output = OutputFile::create(target)?;
    let described =
        checkpoint.sorted().map(|t| (t.name.as_str(), t.kind.name(), t.shape.as_slice(), t.bytes));
    let header = write_header(None, described, 8);
    let mut at = header.len() as u64;
    output.file().write_all_at(&header, 0).map_err(Error::io(target, "write"))?;
    let mut pieces = Vec::new();
    for tensor in checkpoint.sorted() {
        for start in (0..tensor.bytes).step_by(PIECE_BYTES as usize) {
            let bytes = (tensor.bytes - start).min(PIECE_BYTES) as usize;
            pieces.push((checkpoint.store(tensor), tensor.offset_bytes + start, at + start, bytes));
        }
        at += tensor.bytes;
    }
    let workers = Workers::new(options, PIECE_BYTES as usize)?;
    let meter = Meter::new(progress, checkpoint.total_bytes());
    workers.run(
        &pieces,
        |&(.., bytes)| bytes,
        |&(store, from, to, bytes)| {
            let mut scratch = workers.buffer();
            let piece = store.read(from, bytes, &mut scratch)?;
            output.file().write_all_at(piece, to).map_err(Error::io(target, "write"))?;
            workers.give_back(scratch);
            meter.add(bytes);
            Ok(())
        },
        |_, ()| Ok(()),
    )?;
    output.commit()
}
