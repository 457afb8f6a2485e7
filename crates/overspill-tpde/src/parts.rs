//! Patches whose words never come here: a device hashes and encodes segments, and this puts the parts together.
//!
//! Base and final are [`Checkpoint::elsewhere`]. [`Parts::plan`] says which segments there are; whoever encodes them
//! hashes payloads in order as they land ([`BlobHasher`]), and says at last how many bytes they take; they stand at
//! [`Parts::blob_start`] of the patch. The patch is the same, byte for byte, as [`crate::pack`]
//! makes of equal segments, but for the manifest's compression: here it is made while a trainer waits.

use overspill_codec::{BaseKind, PatchKind, SegmentSpec, segments};

use crate::checkpoint::{Checkpoint, Kind};
use crate::container::{ALIGN_BYTES, PatchHasher, PatchType, aligned, patch_header};
use crate::manifest::FAST_ZSTD_LEVEL;
use crate::pack::{PackReport, counterpart, describe};
use crate::state::StateId;
use crate::{Error, Result};

/// Where payloads start in a patch that has many of them: most likely [`Parts::blob_start`], before that is known.
pub const LARGE_BLOB_START: usize = ALIGN_BYTES;

/// A segment of a final state that is to be encoded.
#[derive(Debug, Clone, Copy)]
pub struct Coded {
    /// Its tensor, as an index of the final state's.
    pub tensor: usize,
    /// The tensor that it is coded against, as an index of the base's; `None` if it stands alone.
    pub base: Option<usize>,
    /// What it is.
    pub spec: SegmentSpec,
}

/// A patch that is being put together.
pub struct Parts {
    kind: PatchType,
    final_id: StateId,
    raw_bytes: u64,
    used_bytes: u64,
    header_bytes: usize,
    /// Index, heads, manifest.
    tables: [Vec<u8>; 3],
}

/// The hash of a patch's payloads so far.
pub struct BlobHasher(PatchHasher);

impl BlobHasher {
    /// Of none.
    #[expect(clippy::new_without_default, reason = "a hash under way is no value to default to")]
    pub fn new() -> Self {
        BlobHasher(PatchHasher::new())
    }

    /// The next payloads, on all cores.
    pub fn add(&mut self, piece: &[u8]) {
        self.0.add_blob(piece);
    }
}

impl Parts {
    /// The segments of `final_state`, relative to `base` where it has a counterpart, in the order of a patch.
    ///
    /// # Errors
    /// A quantized tensor, which only stands in files.
    pub fn plan(base: Option<&Checkpoint<'_>>, final_state: &Checkpoint<'_>) -> Result<Vec<Coded>> {
        let mut found = Vec::new();
        for &index in final_state.by_name() {
            let tensor = &final_state.tensors()[index];
            let against = counterpart(base, tensor, PatchKind::Relative);
            let (Kind::Plain(dtype), None | Some((_, Kind::Plain(_)))) =
                (tensor.kind, against.map(|(index, tensor)| (index, tensor.kind)))
            else {
                let cause = "quantized blocks are not packed here";
                return Err(Error::tensor(&final_state.path, &tensor.name, None, cause));
            };
            let kind = if against.is_some() { BaseKind::Words } else { BaseKind::None };
            found.extend(segments(tensor.words()).map(|(first_word, words)| {
                let row_words = tensor.row_words();
                let patch = PatchKind::Relative;
                let spec = SegmentSpec { dtype, words, row_words, first_word, base: kind, kind: patch };
                Coded { tensor: index, base: against.map(|(index, _)| index), spec }
            }));
        }
        Ok(found)
    }

    /// Starts a patch: states with their ids, changed words of each final tensor (0 where it stands alone), the records
    /// and heads of all segments in order, and how many bytes their payloads take.
    ///
    /// # Errors
    /// More tensors than a manifest holds.
    pub fn new(
        base: Option<(&Checkpoint<'_>, StateId)>,
        (final_state, final_id): (&Checkpoint<'_>, StateId),
        changed: &[u64],
        index: Vec<u8>,
        heads: Vec<u8>,
        used_bytes: u64,
    ) -> Result<Self> {
        let kind = base.map_or(PatchType::Standalone, |(_, id)| PatchType::Relative(id));
        let manifest = describe(base.map(|(base, _)| base), final_state, kind.codec_kind(), changed);
        let manifest = manifest.encode(&final_state.path, FAST_ZSTD_LEVEL)?;
        let mut parts = Parts {
            kind,
            final_id,
            raw_bytes: final_state.total_bytes(),
            used_bytes,
            header_bytes: 0,
            tables: [index, heads, manifest],
        };
        // Any hash takes as many bytes.
        parts.header_bytes = parts.header(final_id).len();
        Ok(parts)
    }

    fn header(&self, hash: StateId) -> Vec<u8> {
        let (align_bytes, blob_bytes) = aligned(self.used_bytes);
        let [index, heads, manifest] = self.tables.each_ref().map(|table| table.len() as u64);
        patch_header(self.kind, self.final_id, hash, [blob_bytes, index, heads, manifest], align_bytes)
    }

    /// Where in the patch its first payload starts.
    pub fn blob_start(&self) -> usize {
        self.header_bytes
    }

    /// Bytes of the whole patch.
    fn total_bytes(&self) -> usize {
        let tables: usize = self.tables.iter().map(Vec::len).sum();
        self.header_bytes + aligned(self.used_bytes).1 as usize + tables
    }

    /// What stands in front of the payloads, what stands behind them, and what was packed; `hasher` has had them all.
    pub fn finish(self, mut hasher: BlobHasher) -> ([Vec<u8>; 2], PackReport) {
        let padding = (aligned(self.used_bytes).1 - self.used_bytes) as usize;
        let mut behind = vec![0; padding];
        hasher.add(&behind);
        let [index, heads, manifest] = &self.tables;
        let hash = hasher.0.finish(index, heads, manifest, self.kind, self.final_id);
        let front = self.header(hash);
        self.tables.iter().for_each(|table| behind.extend_from_slice(table));
        let packed_bytes = self.total_bytes() as u64;
        let (kind, final_id, raw_bytes) = (self.kind, self.final_id, self.raw_bytes);
        ([front, behind], PackReport { kind, final_id, raw_bytes, packed_bytes })
    }
}
