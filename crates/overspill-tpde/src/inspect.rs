//! Inspecting: what a patch holds, tensor by tensor, from the patch alone.

use overspill_codec::{BaseKind, ChunkMode, ModeCount, RECORD_BYTES};
use serde_json::{Value, json};

use crate::container::{Patch, Segment};
use crate::work::{Options, Workers};
use crate::{Entry, Result};

/// One tensor of a patch, or their total.
#[derive(Debug, Clone)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// Its safetensors dtype.
    pub dtype: &'static str,
    /// Its shape.
    pub shape: Vec<u64>,
    /// What it is coded against: `none`, `words` or a GGUF type.
    pub base: &'static str,
    /// Bytes of the tensor.
    pub raw_bytes: u64,
    /// Bytes of its heads, records and payloads.
    pub packed_bytes: u64,
    /// Share of its words that differ from the base, 0 to 1; `None` without a base.
    pub changed_share: Option<f64>,
    /// Chunks and bytes by mode.
    pub modes: [ModeCount; ChunkMode::ALL.len()],
}

/// What [`inspect`] finds.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// The tensors, in the order of the output's files.
    pub tensors: Vec<TensorReport>,
    /// Bytes of all tensors.
    pub raw_bytes: u64,
    /// Bytes of the file, everything counted.
    pub packed_bytes: u64,
    /// Share of changed words over tensors with a base; `None` if there is none.
    pub changed_share: Option<f64>,
}

/// Authenticates the patch and reads off what it holds.
///
/// # Errors
/// A damaged patch.
pub fn inspect(patch: &Patch<'_>, options: &Options) -> Result<Inspection> {
    let workers = Workers::new(options, patch.largest_segment_bytes())?;
    patch.authenticate(&workers)?;
    let mut tensors: Vec<TensorReport> = patch.manifest().entries().iter().map(report_of).collect();
    workers.run(
        &patch.segments,
        |segment| segment.blob_bytes,
        |segment| count_modes(patch, segment),
        |segment, (modes, packed_bytes)| {
            let tensor = &mut tensors[segment.entry];
            tensor.packed_bytes += packed_bytes;
            for (sum, more) in tensor.modes.iter_mut().zip(modes) {
                sum.chunks += more.chunks;
                sum.bytes += more.bytes;
            }
            Ok(())
        },
    )?;
    let with_base = || patch.manifest().entries().iter().filter(|e| e.base != BaseKind::None);
    let words: u64 = with_base().map(|e| e.tensor.words()).sum();
    let changed: u64 = with_base().map(|e| e.changed).sum();
    Ok(Inspection {
        raw_bytes: patch.manifest().total_bytes(),
        packed_bytes: patch.file_bytes(),
        changed_share: (words > 0).then(|| changed as f64 / words as f64),
        tensors,
    })
}

fn report_of(entry: &Entry) -> TensorReport {
    let words = entry.tensor.words();
    let share = if words == 0 { 0.0 } else { entry.changed as f64 / words as f64 };
    TensorReport {
        name: entry.tensor.name.clone(),
        dtype: entry.tensor.kind.name(),
        shape: entry.tensor.shape.clone(),
        base: match entry.base {
            BaseKind::None => "none",
            BaseKind::Words => "words",
            BaseKind::Quantized(layout) => crate::Kind::Quantized(layout).name(),
        },
        raw_bytes: entry.tensor.bytes,
        packed_bytes: 0,
        changed_share: (entry.base != BaseKind::None).then_some(share),
        modes: [ModeCount::default(); ChunkMode::ALL.len()],
    }
}

type Modes = [ModeCount; ChunkMode::ALL.len()];

fn count_modes(patch: &Patch<'_>, segment: &Segment) -> Result<(Modes, u64)> {
    patch.with_view(segment, |view| {
        let mut modes = Modes::default();
        for chunk in 0..view.chunks() {
            let mode = &mut modes[view.mode(chunk)? as usize];
            mode.chunks += 1;
            mode.bytes += view.payload(chunk).len() as u64;
        }
        let packed_bytes = segment.head_bytes + view.chunks() * RECORD_BYTES + segment.blob_bytes;
        Ok((modes, packed_bytes as u64))
    })
}

/// Names of the modes, in the order of [`TensorReport::modes`].
pub fn mode_names() -> impl Iterator<Item = &'static str> {
    ChunkMode::ALL.iter().map(|mode| mode.name())
}

impl TensorReport {
    /// Raw over packed bytes.
    pub fn ratio(&self) -> f64 {
        self.raw_bytes as f64 / self.packed_bytes.max(1) as f64
    }

    fn to_json(&self) -> Value {
        let modes: serde_json::Map<String, Value> = mode_names()
            .zip(self.modes)
            .filter(|(_, count)| count.chunks > 0)
            .map(|(name, count)| (name.to_owned(), json!({ "chunks": count.chunks, "bytes": count.bytes })))
            .collect();
        json!({
            "name": self.name, "dtype": self.dtype, "shape": self.shape, "base": self.base,
            "raw_bytes": self.raw_bytes, "packed_bytes": self.packed_bytes, "ratio": self.ratio(),
            "changed_share": self.changed_share, "modes": modes,
        })
    }
}

impl Inspection {
    /// Raw over packed bytes.
    pub fn ratio(&self) -> f64 {
        self.raw_bytes as f64 / self.packed_bytes.max(1) as f64
    }

    /// The report as JSON, with the patch's identity.
    pub fn to_json(&self, patch: &Patch<'_>) -> Value {
        json!({
            "kind": patch.kind().name(),
            "base_id": patch.kind().base().map(|id| id.to_string()),
            "final_id": patch.final_id().to_string(),
            "raw_bytes": self.raw_bytes, "packed_bytes": self.packed_bytes, "ratio": self.ratio(),
            "changed_share": self.changed_share,
            "tensors": self.tensors.iter().map(TensorReport::to_json).collect::<Vec<_>>(),
        })
    }
}
