#![deny(unsafe_code)]
//! Encoders and reference decoders of the TPDE weight delta format: pure functions over byte slices.
//!
//! The unit of work is the **segment**: at most [`SEGMENT_WORDS`] consecutive words of one tensor. A segment
//! encodes into a head (tables shared by its chunks), fixed-size [`ChunkRecord`]s and a blob of chunk payloads;
//! `docs/tpde-format.md` is the specification and the modules here mirror it. Any chunk decodes on its own,
//! given the head and the base's words of that chunk.
//!
//! This crate does no I/O, knows no file names, keeps no state between calls, and starts no threads: callers
//! spread segments or chunks over cores as they like.

mod bits;
mod chunk;
mod classes;
mod counted;
mod dense;
mod dtype;
mod elias;
mod encode;
mod error;
mod flags;
mod flat;
mod gap;
mod groups;
mod half;
mod head;
mod link;
mod measure;
mod plan;
mod planes;
mod quant;
mod rans;
mod record;
mod scan;
mod segment;
mod simd;
mod sparse;
mod survey;
mod tables;
mod values;
mod words;

pub use chunk::ChunkMode;
pub use counted::{
    COUNT_GRAIN_WORDS, PlaneCounts, SegmentCounts, flags_head, key_field, planes_head, sampled_one_in,
    sparse_head,
};
pub use dtype::{Dtype, FloatLayout};
pub use encode::{
    CodecChoice, EncodeOptions, EncodedSegment, ModeCount, SegmentStats, ZSTD_PROBE_WORDS, encode_segment,
};
pub use error::CodecError;
pub use flat::{FLAT_CLASSES, FlatSegment, FlatTables};
pub use link::{LINK_CHUNK_WORDS, LinkFormat, LinkPacked, link_decode, link_encode};
pub use measure::{SegmentSizes, measure_segment};
pub use quant::{dequantize, quantize};
pub use record::{ChunkRecord, RECORD_BYTES};
#[doc(hidden)]
pub use segment::decode_unchecked;
pub use segment::{
    Base, BaseKind, PatchKind, QuantLayout, SEGMENT_WORDS, SegmentSpec, SegmentView, segments,
};
