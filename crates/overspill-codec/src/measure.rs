//! How many bytes of each section a segment takes, without its payloads: what a reader needs to stream.

use crate::head::Head;
use crate::record::parse_records;
use crate::{CodecError, RECORD_BYTES, SegmentSpec};

/// Bytes of a segment in each of the three sections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentSizes {
    /// Bytes of its head.
    pub head_bytes: usize,
    /// Bytes of its index records.
    pub index_bytes: usize,
    /// Bytes of its payloads.
    pub blob_bytes: usize,
}

/// Sizes of the segment whose head and records stand at the front of `heads` and `index`.
///
/// # Errors
/// A head or records that [`crate::SegmentView::take`] would refuse too.
pub fn measure_segment(spec: SegmentSpec, heads: &[u8], index: &[u8]) -> Result<SegmentSizes, CodecError> {
    let mut rest = heads;
    let chunks = Head::take(&mut rest, &spec)?.chunk_count(spec.words);
    let records = parse_records(index, chunks)?;
    Ok(SegmentSizes {
        head_bytes: heads.len() - rest.len(),
        index_bytes: chunks * RECORD_BYTES,
        blob_bytes: records.last().map_or(0, |record| record.end_bytes as usize),
    })
}
